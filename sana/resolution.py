"""Aspect-ratio buckets: the sizes at which images of one nominal resolution are trained and generated.

A table maps a ratio key, the text of round(height / width, 2), to (height, width) in pixels, wide ratios first. The
areas of a table are about equal. All sides are multiples of 32 (the autoencoder's factor), but those of the 256 table
only of 16.

Each size has a training table and a smaller table for generation (`_TEST`) without the extreme ratios.
"""

import re
from collections.abc import Sequence

from sana.utils.logging import get_logger

Table = dict[str, tuple[int, int]]

logger = get_logger(__name__)

# fmt: off
_1024: Table = {
    "0.25": (512, 2048), "0.26": (512, 1984), "0.27": (512, 1920), "0.28": (512, 1856), "0.32": (576, 1792),
    "0.33": (576, 1728), "0.35": (576, 1664), "0.4": (640, 1600), "0.42": (640, 1536), "0.48": (704, 1472),
    "0.5": (704, 1408), "0.52": (704, 1344), "0.57": (768, 1344), "0.6": (768, 1280), "0.68": (832, 1216),
    "0.72": (832, 1152), "0.78": (896, 1152), "0.82": (896, 1088), "0.88": (960, 1088), "0.94": (960, 1024),
    "1.0": (1024, 1024), "1.07": (1024, 960), "1.13": (1088, 960), "1.21": (1088, 896), "1.29": (1152, 896),
    "1.38": (1152, 832), "1.46": (1216, 832), "1.67": (1280, 768), "1.75": (1344, 768), "2.0": (1408, 704),
    "2.09": (1472, 704), "2.4": (1536, 640), "2.5": (1600, 640), "2.89": (1664, 576), "3.0": (1728, 576),
    "3.11": (1792, 576), "3.62": (1856, 512), "3.75": (1920, 512), "3.88": (1984, 512), "4.0": (2048, 512),
}
# The first four keys and the last are not what their sizes round to; they are the published ones.
_2880: Table = {
    "0.25": (1408, 5760), "0.26": (1408, 5568), "0.27": (1408, 5376), "0.28": (1408, 5184),
    "0.32": (1600, 4992), "0.33": (1600, 4800), "0.34": (1600, 4672), "0.4": (1792, 4480),
    "0.42": (1792, 4288), "0.47": (1920, 4096), "0.49": (1920, 3904), "0.51": (1920, 3776),
    "0.55": (2112, 3840), "0.59": (2112, 3584), "0.68": (2304, 3392), "0.72": (2304, 3200),
    "0.78": (2496, 3200), "0.83": (2496, 3008), "0.89": (2688, 3008), "0.93": (2688, 2880),
    "1.0": (2880, 2880), "1.07": (2880, 2688), "1.12": (3008, 2688), "1.21": (3008, 2496),
    "1.28": (3200, 2496), "1.39": (3200, 2304), "1.47": (3392, 2304), "1.7": (3584, 2112),
    "1.82": (3840, 2112), "2.03": (3904, 1920), "2.13": (4096, 1920), "2.39": (4288, 1792),
    "2.5": (4480, 1792), "2.92": (4672, 1600), "3.0": (4800, 1600), "3.12": (4992, 1600),
    "3.68": (5184, 1408), "3.82": (5376, 1408), "3.95": (5568, 1408), "4.0": (5760, 1408),
}
# Places in a table of 40 that generation leaves out. The published 1024 table drops the key 0.26, 2048 drops 0.28.
_UNUSED_TO_1024 = (1, 2, 33, 35, 36, 37, 38)
_UNUSED_FROM_2048 = (2, 3, 33, 35, 36, 37, 38)
# fmt: on


def _scaled(table: Table, image_size: int) -> Table:
    return {key: (h * image_size // 1024, w * image_size // 1024) for key, (h, w) in table.items()}


def _without(table: Table, places: tuple[int, ...]) -> Table:
    return {key: size for place, (key, size) in enumerate(table.items()) if place not in places}


def _tables() -> dict[str, Table]:
    base = {
        size: _2880 if size == 2880 else _scaled(_1024, size) for size in (256, 512, 1024, 2048, 2880, 4096)
    }
    test = {size: _without(base[size], _UNUSED_TO_1024) for size in (256, 512, 1024)}
    # The published ASPECT_RATIO_2880_TEST holds the sizes of 4096, so that a 2880 model would draw twice its pixels.
    # Here it is what its name says: the 2880 table without the places that 2048 leaves out.
    test |= {size: _without(base[size], _UNUSED_FROM_2048) for size in (2048, 2880)}
    test[4096] = base[4096]
    test |= {size: {"1.0": (size, size)} for size in (768, 1280, 1536)}
    named = {f"ASPECT_RATIO_{size}": table for size, table in base.items()}
    return named | {f"ASPECT_RATIO_{size}_TEST": test[size] for size in sorted(test)}


TABLES: dict[str, Table] = _tables()
"""Published name (`ASPECT_RATIO_1024`, `ASPECT_RATIO_1024_TEST`, ...) to its table."""


def table_for(image_size: int, *, training: bool = False) -> Table:
    """The table of a nominal resolution: for generation (`ASPECT_RATIO_<n>_TEST`), or for training (`ASPECT_RATIO_<n>`).

    Raises:
        ValueError: there is none; the message lists the resolutions that have one.
    """
    suffix = "" if training else "_TEST"
    name = f"ASPECT_RATIO_{image_size}{suffix}"
    if name not in TABLES:
        sizes = sorted(int(known.split("_")[2]) for known in TABLES if known.endswith("_TEST") != training)
        purpose = "training" if training else "generation"
        raise ValueError(
            f"no aspect-ratio table for {purpose} at {image_size} pixels; there is one for {sizes}"
        )
    return TABLES[name]


def generation_table(image_size: int, multiple: int) -> Table:
    """The sizes of a model of `image_size` pixels whose tokens cover `multiple`: one square where there is no table."""
    table = TABLES.get(f"ASPECT_RATIO_{image_size}_TEST", {"1.0": (image_size, image_size)})
    # Some sides at 256 pixels are multiples of 16 only.
    return {key: size for key, size in table.items() if not any(side % multiple for side in size)}


def nearest_bucket(height: float, width: float, table: Table) -> tuple[str, tuple[int, int]]:
    """The bucket whose ratio key is nearest to height / width, as (key, (height, width)); the first one of a tie.

    Raises:
        ValueError: a side is not positive.
    """
    if not (height > 0 and width > 0):
        raise ValueError(f"image size must be positive, got height {height}, width {width}")
    key = min(table, key=lambda ratio: abs(float(ratio) - height / width))
    return key, table[key]


_SIZE_OPTION = re.compile(r"(?<!\S)--(aspect_ratio|ar|hw)(?:[=\s]+(\S*)|$)")
_PAIR = re.compile(r"(\d+):(\d+)[.,;]?")


def parse_prompt_size(prompt: str, table: Table) -> tuple[str, tuple[int, int] | None]:
    """Take a size option out of a prompt: `--ar h:w` (or `--aspect_ratio h:w`) or `--hw height:width`.

    Returns the prompt without the option and the (height, width) it asks for, None if there is no option: `--ar` gives
    the bucket of `table` that is nearest to h / w, `--hw` gives that size itself, in pixels. The reference cuts the
    prompt at the option and then draws a square; here the rest of the prompt stays and the size counts.

    Raises:
        ValueError: more than one option, or one without two positive integers.
    """
    options = list(_SIZE_OPTION.finditer(prompt))
    if not options:
        return prompt, None
    if len(options) > 1:
        raise ValueError(f"prompt has {len(options)} size options, one is allowed: {prompt!r}")
    name, text = options[0].groups()
    pair = _PAIR.fullmatch(text or "")
    height, width = map(int, pair.groups()) if pair else (0, 0)
    if height == 0 or width == 0:
        example = f"--{name} {'1344:768' if name == 'hw' else '16:9'}"
        raise ValueError(
            f"expected --{name} height:width such as {example}, got {options[0][0]!r} in prompt {prompt!r}"
        )
    size = (height, width) if name == "hw" else nearest_bucket(height, width, table)[1]
    start, end = options[0].span()
    return " ".join(part for part in (prompt[:start].strip(), prompt[end:].strip()) if part), size


def read_sizes(
    prompts: Sequence[str], default: tuple[int, int], table: Table
) -> tuple[list[str], tuple[int, int]]:
    """The prompts without their size options, and the one (height, width) that all of them ask for.

    Raises:
        ValueError: as `parse_prompt_size`; or they ask for several sizes.
    """
    parsed = [parse_prompt_size(text, table) for text in prompts]
    sizes = dict.fromkeys(size or default for _, size in parsed)
    if len(sizes) > 1:
        listed = ", ".join(f"{height} x {width}" for height, width in sizes)
        raise ValueError(
            f"one call draws one size, but these prompts ask for {listed}: call once for each (sana.generation does)"
        )
    return [text for text, _ in parsed], next(iter(sizes), default)


def drawn_size(height: int, width: int, table: Table, *, multiple: int, binning: bool) -> tuple[int, int]:
    """The (height, width) at which an image of `height` x `width` pixels is drawn.

    Args:
        table: of the model.
        multiple: pixels that one token covers along each side.
        binning: take the bucket of the table with the nearest ratio; else the size itself.

    Raises:
        ValueError: it cannot be; the message holds the nearest size that can.
    """
    if binning and (height, width) in table.values():  # some keys of 2880 are not their sizes' ratios
        return height, width
    if binning and height > 0 and width > 0:
        drawn = nearest_bucket(height, width, table)[1]
        ratios = [float(key) for key in table]
        if not min(ratios) - 0.01 <= height / width <= max(ratios) + 0.01:
            raise ValueError(
                f"the model draws height / width from {min(ratios)} to {max(ratios)}, not {height} x {width}; the "
                f"nearest size is {drawn[0]} x {drawn[1]}"
            )
        if height * width > 2 * drawn[0] * drawn[1]:
            logger.warning("drawn at %d x %d and enlarged to %d x %d", *drawn, height, width)
        return drawn
    if height <= 0 or width <= 0 or height % multiple or width % multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        raise ValueError(
            f"height and width must be positive multiples of {multiple}, got {height} x {width}; the nearest "
            f"size is {near[0]} x {near[1]}, or let use_resolution_binning scale and crop"
        )
    return height, width
