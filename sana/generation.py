"""From a list of prompts to image files: resumable, and the same files however the work is divided.

A folder holds the images of one set of settings. Noise is drawn for each image from (seed, index of the prompt, number
of the sample), so that an image does not depend on its neighbours, on the process or on the run in which it is made.
The composition of a batch shows in the last bit of float32: with another batch size, single pixels differ by one level
of 255. Batches are therefore cut from the whole list, and an interrupted one is drawn again as a whole: with one batch
size, files are equal to the byte for any number of processes and interruptions.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from sana import __version__
from sana.data.prompts import Prompt, read_picture, sample_stem
from sana.data.prompts import file_stem as file_stem  # for callers
from sana.pipeline import NULL_MASKS, SAMPLERS, Callback, SanaPipeline, image_seed
from sana.resolution import parse_prompt_size
from sana.runtime.keeping import Keeper
from sana.runtime.stages import PromptFeatures
from sana.runtime.streaming import Background, Drawn, stream
from sana.utils import distributed, images
from sana.utils.archive import pack, unpack
from sana.utils.files import write_atomic
from sana.utils.logging import get_logger
from sana.utils.manifest import Manifest, Row

logger = get_logger(__name__)


class IncompleteError(ArithmeticError):
    """Some images of a run could not be made; the others are there, and the manifest says why these are not."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides a picture beside its prompt and the model; the fields of `SanaPipeline.__call__`, and the file format.

    Raises:
        ValueError: a value that no run could use.
    """

    seed: int = 0
    height: int | None = None
    """Pixels; None is the model's own size. A prompt's `--ar H:W` or `--hw H:W` comes first."""
    width: int | None = None
    negative_prompt: str = ""
    num_inference_steps: int | None = None
    """None is the sampler's usual number."""
    guidance_scale: float = 4.5
    pag_guidance_scale: float = 1.0
    sampler: str | None = None
    """None is the config's."""
    interval_guidance: tuple[float, float] = (0.0, 1.0)
    use_resolution_binning: bool = True
    null_mask: str = "prompt"
    """Which tokens of the negative prompt are seen: `prompt` as in the reference, `own` as in diffusers."""
    max_timesteps: float | None = None
    """Sprint's angles, see `SanaPipeline.__call__`; None is the published one."""
    intermediate_timesteps: float | None = None
    timesteps: tuple[float, ...] | None = None
    image_format: str = "png"
    """`png`, with prompt, seed and settings as text in the file, or `jpg`."""
    jpeg_quality: int = 95
    """1 to 100."""
    jpeg_subsampling: str = "4:4:4"
    """Resolution of colours: `4:4:4` full, `4:2:0` halved both ways, which Pillow does unasked and published pictures have."""

    def __post_init__(self) -> None:
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.sampler!r}; choose from {', '.join(SAMPLERS)}")
        if self.null_mask not in NULL_MASKS:
            raise ValueError(f"unknown null_mask {self.null_mask!r}; choose from {', '.join(NULL_MASKS)}")
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(f"the number of steps must be at least 1, got {self.num_inference_steps}")
        if self.image_format not in ("png", "jpg"):
            raise ValueError(f"unknown image format {self.image_format!r}; choose from png, jpg")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg quality must be from 1 to 100, got {self.jpeg_quality}")
        if self.jpeg_subsampling not in ("4:4:4", "4:2:0"):
            raise ValueError(f"jpeg subsampling is 4:4:4 or 4:2:0, got {self.jpeg_subsampling!r}")

    @classmethod
    def from_names(cls, values: Mapping[str, object]) -> "Settings":
        """From the values in a mapping that are named like fields; the rest of it is ignored."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    def resolved(self, pipeline: SanaPipeline) -> "Settings":
        """The same, with every None replaced by what it means for this model."""
        sampler = self.sampler or pipeline.config.scheduler.vis_sampler
        own = pipeline.config.model.image_size
        usual = len(self.timesteps) - 1 if self.timesteps else SAMPLERS[sampler]
        return replace(
            self,
            sampler=sampler,
            num_inference_steps=self.num_inference_steps or usual,
            height=own if self.height is None else self.height,
            width=own if self.width is None else self.width,
        )

    def record(self, pipeline: SanaPipeline) -> dict[str, object]:
        """Settings and model, resolved, in the types of JSON: what must be equal for files to be equal."""
        model = {
            "model": pipeline.config.model.model,
            "weights_sha256": pipeline.weights_sha256,
            "loras": pipeline.loras,
            "lowercase": pipeline.text_encoder.lowercase,
            "dtype": str(pipeline.dtype).removeprefix("torch."),
            "flow_shift": pipeline.flow_shift,
        }
        if pipeline.quantize:
            model["quantize"] = pipeline.quantize
        record = json.loads(json.dumps(asdict(self.resolved(pipeline)) | model))
        if self.jpeg_subsampling == "4:4:4":
            del record["jpeg_subsampling"]  # folders from before there was a choice are gone on with
        return record


@dataclass(frozen=True, kw_only=True)
class Task:
    """One image to draw."""

    file: str
    prompt: Prompt
    sample: int
    seed: int
    """Of this image's noise: `pipeline(text, seed=[seed])` draws it again."""
    size: tuple[int, int]
    """(height, width)."""

    def row(self) -> Row:
        """The manifest's line, without settings and versions."""
        return {
            "file": self.file,
            "index": self.prompt.index,
            "key": self.prompt.key,
            "prompt": self.prompt.text,
            "sample": self.sample,
            "seed": self.seed,
            "height": self.size[0],
            "width": self.size[1],
        }


def generate(
    pipeline: SanaPipeline,
    prompts: Sequence[Prompt],
    folder: str | Path,
    settings: Settings | None = None,
    *,
    batch_size: int = 1,
    num_images_per_prompt: int = 1,
    progress: bool = False,
    stem: Callable[[Prompt, int], str] | None = None,
) -> list[Row]:
    """Draw the images that `folder` lacks, each process of the run its share, and return the manifest's lines of all.

    Args:
        prompts: their indices decide noise and file names; size options in them are taken out and honoured.
        batch_size: images drawn at once, prompts mixed.
        progress: show a bar on stderr.
        stem: `(prompt, number of the sample) -> path in the folder without extension`; None is `sample_stem`.

    Returns:
        One line for each image, prompt by prompt, also for those that were there before; in every process.

    Raises:
        ValueError: the folder holds images of other settings, two prompts have one file name, or a setting is wrong.
        IncompleteError: at the end, if images failed: for lack of memory or disk, or because they are not finite. Latents of
            those that got so far lie beside them.
    """
    if batch_size < 1 or num_images_per_prompt < 1:
        raise ValueError(
            f"batch_size and num_images_per_prompt must be at least 1, got {batch_size} and {num_images_per_prompt}"
        )
    settings = settings or Settings()
    tasks = plan(pipeline, prompts, settings, num_images_per_prompt, stem)
    manifest, record = Manifest(Path(folder)), settings.record(pipeline)
    known = manifest.rows()
    _require_same_settings(known, record, folder)
    # The share is cut before the finished images are left out: processes may read the manifest at different moments.
    share = _batches(tasks, batch_size)[distributed.rank() :: distributed.world_size()]
    missing = {task for batch in share for task in batch if not _is_done(task, known, Path(folder))}
    share = [batch for batch in share if not missing.isdisjoint(batch)]
    if share:
        hidden = not (progress and distributed.is_main())
        with (
            manifest.part(distributed.rank()) as part,
            Background() as background,
            tqdm(total=len(missing), unit="image", disable=hidden) as bar,
        ):
            keeper = Keeper(
                folder=manifest.folder,
                part=part,
                rest={"settings": record, "versions": _versions()},
                autoencoder=str(pipeline.config.vae.vae_pretrained),
                dtype=pipeline.autoencoder.dtype,
            )
            for drawn in _draw_all(pipeline, share, settings.resolved(pipeline), bar, manifest.folder):
                if drawn.task in missing:
                    background.submit(partial(keeper.keep, drawn))
                    bar.update()
    distributed.barrier()
    if distributed.is_main():
        manifest.merge()
    distributed.barrier()
    rows = manifest.rows()
    rows = [rows[task.file] for task in tasks]
    if failed := [row for row in rows if "error" in row]:
        first = failed[0]
        raise IncompleteError(
            f"{len(failed)} of {len(rows)} images failed, see {manifest.path}; {first['file']}: {first['error']}"
        )
    return rows


def _draw_all(
    pipeline: SanaPipeline,
    batches: Sequence[Sequence[Task]],
    settings: Settings,
    bar: tqdm,
    folder: Path,
) -> Iterator[Drawn]:
    def encode(batch: Sequence[Task]) -> PromptFeatures:
        bar.set_postfix_str("prompts")
        negatives = [settings.negative_prompt] * len(batch)
        how = {"null_mask": settings.null_mask, "sampler": settings.sampler}
        return pipeline.encode([task.prompt.text for task in batch], negatives, **how)

    return stream(
        batches,
        encode=None if pipeline.offload == "none" else encode,
        draw=partial(draw_latents, pipeline, settings=settings),
        decode=lambda batch, latents: pipeline.decode(latents, batch[0].size, "pil"),
        callback=lambda step, total, x, x0: bar.set_postfix_str(f"step {step}/{total}"),
        device=pipeline.device,
        folder=folder,
    )


def generate_folder(
    pipeline: SanaPipeline,
    prompts: Sequence[Prompt],
    folder: Path,
    settings: Settings,
    *,
    batch_size: int = 1,
    num_images_per_prompt: int = 1,
    grid: Path | None = None,
    tar_and_del: bool = False,
    save_name: bool = False,
) -> list[Path]:
    """`generate` as the command line does it, with a bar and these extras.

    Args:
        grid: also write one PNG with all images.
        tar_and_del: leave `<folder>.tar` instead of the folder; a later run goes on from it.
        save_name: write the folder's name to `metrics/tmp_<folder>.txt` beside it, for scripts that measure it.

    Returns:
        The paths of all files, in the order of the prompts; nothing in processes other than the main one.
    """
    if grid is not None and grid.suffix.lower() != ".png":
        raise ValueError(f"the grid is written as PNG; name it .png, not {grid}")
    if distributed.is_main():
        unpack(folder)
    distributed.barrier()
    rows = generate(
        pipeline,
        prompts,
        folder,
        settings,
        batch_size=batch_size,
        num_images_per_prompt=num_images_per_prompt,
        progress=True,
    )
    if not distributed.is_main():
        return []
    paths = [folder / row["file"] for row in rows]
    if grid is not None:
        images.save_png(images.grid([images.load(path) for path in paths]), grid)
    if save_name:
        write_atomic(folder.parent / "metrics" / f"tmp_{folder.name}.txt", f"{folder.name}\n".encode())
    if tar_and_del:
        paths = [pack(folder)]
    return [*paths, grid] if grid is not None else paths


def plan(
    pipeline: SanaPipeline,
    prompts: Sequence[Prompt],
    settings: Settings,
    num_images_per_prompt: int = 1,
    stem: Callable[[Prompt, int], str] | None = None,
) -> list[Task]:
    """The images of a run, in order; everything about prompts and sizes that can be wrong is found here."""
    default = settings.resolved(pipeline)
    tasks = []
    for prompt in prompts:
        try:
            text, size = parse_prompt_size(prompt.text, pipeline.buckets)
            size = size or (default.height, default.width)
            pipeline.sizes(*size, settings.use_resolution_binning)
        except ValueError as error:
            raise ValueError(
                f"prompt {prompt.index if prompt.key is None else repr(prompt.key)}: {error}"
            ) from error
        prompt = replace(prompt, text=text)
        for sample in range(num_images_per_prompt):
            seed = image_seed(settings.seed, prompt.index, sample)
            if prompt.seed is not None and sample == 0:
                seed = prompt.seed
            file = f"{(stem or sample_stem)(prompt, sample)}.{settings.image_format}"
            tasks.append(Task(file=file, prompt=prompt, sample=sample, seed=seed, size=size))
    files = [task.file for task in tasks]
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise ValueError(
            f"two prompts would be written to {twice}: give every prompt an index or key of its own"
        )
    return tasks


def folder_name(pipeline: SanaPipeline, settings: Settings, dataset: str, label: str = "") -> str:
    """A folder's name from its settings, as the published scripts build it: readable, and another one for every change.

    What has no place in it (negative prompt, weights, ...) is in the eight digits of a hash of all settings. Batch size
    and number of prompts are not in it, for the images do not depend on them.
    """
    record = settings.record(pipeline)
    found = re.search(r"epoch_(\d+).*step_(\d+)", str(pipeline.weights or ""))
    epoch, step = found.groups() if found else ("unknown", "unknown")
    height, width = record["height"], record["width"]
    interval = record["interval_guidance"]
    parts = [
        f"{dataset}_epoch{epoch}_step{step}_scale{record['guidance_scale']}",
        f"pagscale{record['pag_guidance_scale']}" if record["pag_guidance_scale"] != 1 else "",
        f"step{record['num_inference_steps']}_size{height if height == width else f'{height}x{width}'}",
        f"samp{record['sampler']}_seed{record['seed']}_{record['dtype']}",
        f"flowshift{record['flow_shift']}" if record["flow_shift"] != 1 else "",
        f"intervalguidance{interval[0]}{interval[1]}" if interval != [0, 1] else "",
        f"maxT{record['max_timesteps']}" if record["max_timesteps"] is not None else "",
        f"midT{record['intermediate_timesteps']}" if record["intermediate_timesteps"] is not None else "",
        sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8],
    ]
    return "_".join(part for part in parts if part) + label


def _require_same_settings(known: dict[str, Row], record: dict[str, object], folder: str | Path) -> None:
    for row in known.values():
        if row["settings"] != record:
            then, now = row["settings"], record
            changed = [key for key in now if then.get(key) != now[key]] or sorted(then.keys() - now.keys())
            listed = ", ".join(f"{key} {then.get(key)!r} (now {now.get(key)!r})" for key in changed)
            raise ValueError(
                f"{folder} holds images made with other settings: {listed}; use another folder, or remove it"
            )


def _is_done(task: Task, known: dict[str, Row], folder: Path) -> bool:
    row = known.get(task.file, {})
    if "error" in row:
        return False
    return all(row.get(key) == value for key, value in task.row().items()) and (folder / task.file).is_file()


def compare_with_picture(path: str | Path, now: Row) -> None:
    """Log in what the record that a picture holds differs from that of the present settings.

    Raises:
        ValueError: the weights differ, so that it could not be the same picture.
    """
    _, then = read_picture(path)
    of_the_file = {"image_format", "jpeg_quality", "jpeg_subsampling"}
    keys = (then.keys() | now.keys()) - of_the_file
    different = {
        key: f"{key} {then.get(key)!r} (now {now.get(key)!r})"
        for key in sorted(keys)
        if json.dumps(then.get(key)) != json.dumps(now.get(key))  # a tuple is a list there
    }
    if weights := different.keys() & {"model", "weights_sha256"}:
        listed = ", ".join(different[key] for key in sorted(weights))
        raise ValueError(f"{path} was drawn with other weights: {listed}; name its own with --model_path")
    if different:
        logger.warning("%s was drawn with other settings: %s", path, ", ".join(different.values()))


def draw(
    pipeline: SanaPipeline,
    batch: Sequence[Task],
    settings: Settings,
    *,
    negative_prompts: Sequence[str] | None = None,
    callback: Callback | None = None,
) -> list[Image]:
    """The pictures of tasks of one size, in one batch, under `settings.resolved(pipeline)`.

    Args:
        negative_prompts: one for each task; None is that of the settings for all.
        callback: see `SanaPipeline.__call__`.
    """
    latents = draw_latents(pipeline, batch, settings, negative_prompts=negative_prompts, callback=callback)
    return pipeline.decode(latents, batch[0].size, "pil")


def draw_latents(
    pipeline: SanaPipeline,
    batch: Sequence[Task],
    settings: Settings,
    *,
    negative_prompts: Sequence[str] | None = None,
    callback: Callback | None = None,
    features: PromptFeatures | None = None,
) -> Tensor:
    """`draw` up to the latents (n, C, h, w); `features` are those of these prompts, if there are already."""
    return pipeline(
        [task.prompt.text for task in batch],
        *batch[0].size,
        negative_prompt=settings.negative_prompt if negative_prompts is None else negative_prompts,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        pag_guidance_scale=settings.pag_guidance_scale,
        use_resolution_binning=settings.use_resolution_binning,
        seed=[task.seed for task in batch],
        sampler=settings.sampler,
        interval_guidance=settings.interval_guidance,
        null_mask=settings.null_mask,
        max_timesteps=settings.max_timesteps,
        intermediate_timesteps=settings.intermediate_timesteps,
        timesteps=settings.timesteps,
        output_type="latent",
        callback=callback,
        features=features,
    )


def _batches(tasks: Sequence[Task], batch_size: int) -> list[list[Task]]:
    """Tasks of one size together, else in their order."""
    sizes = dict.fromkeys(task.size for task in tasks)
    groups = [[task for task in tasks if task.size == size] for size in sizes]
    return [
        group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)
    ]


def _versions() -> dict[str, str]:
    return {"sana": __version__} | {name: version(name) for name in ("torch", "diffusers", "transformers")}
