"""The one loop of all metrics over pictures: several processes, batches, and results that outlive an interruption."""

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sana.metrics.image_set import ScoredImage, open_image
from sana.utils import distributed
from sana.utils.files import write_atomic
from sana.utils.logging import get_logger
from sana.utils.manifest import Manifest

log = get_logger(__name__)

Row = Mapping[str, Any]
"""What a metric says of one picture: JSON values, and float32 arrays (numpy)."""

_SETTINGS = "settings.json"


def score_images(
    items: Sequence[ScoredImage],
    score_batch: Callable[[Sequence[ScoredImage], list[Any]], Sequence[Row]],
    work_folder: str | Path,
    settings: Mapping[str, Any],
    *,
    batch_size: int = 32,
    load: Callable[[Path], Any] = open_image,
    threads: int = 4,
) -> list[Row]:
    """The row of every picture, in the order of `items`; in every process of the run (torchrun, accelerate) all of them.

    Each process scores its share of the batches. Each batch is written to `work_folder` at once, so that a run that was
    ended goes on there, with any number of processes. A row holds as long as its file's size and time do. Batches are cut
    from the whole list, and one that was interrupted is scored again as a whole: with one batch size, rows do not depend
    on how the work was divided.

    Args:
        items: their names differ.
        score_batch: `(items, what load gave for each) -> a row for each`.
        work_folder: for `manifest.jsonl` with the rows, and `settings.json`; seen by all processes.
        settings: JSON values; everything that decides a row beside the picture and its prompt: metric, preset, weights,
            dtype. Rows of other settings are refused. (The batch size is none of them: it moves the last bits only.)
        load: reads (and prepares) one picture, in a thread.
        threads: that read pictures while a batch is scored.

    Raises:
        ValueError: the folder holds rows of other settings, a picture cannot be read, or a number is not finite; rows
            that were done are kept.
    """
    names = [item.name for item in items]
    assert len(set(names)) == len(names), "two pictures have one name"
    manifest = Manifest(work_folder)
    _claim(manifest, json.loads(json.dumps(dict(settings))))
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    # The share is cut before what is done is left out: processes may read the folder at different moments.
    share = batches[distributed.rank() :: distributed.world_size()]
    known = manifest.rows()
    missing = {item.name for batch in share for item in batch if not _is_done(item, known)}
    del known
    share = [batch for batch in share if any(item.name in missing for item in batch)]
    hidden = None if distributed.is_main() else True  # None: shown on a terminal only
    with (
        manifest.part(distributed.rank()) as part,
        tqdm(total=len(missing), unit="image", disable=hidden) as bar,
    ):
        for batch, pictures in _loaded(share, load, threads):
            rows = score_batch(batch, pictures)
            assert len(rows) == len(batch), f"{len(rows)} rows for {len(batch)} pictures"
            for item, row in zip(batch, rows, strict=True):
                _require_finite(item, row)
                if item.name in missing:
                    part.add({"file": item.name, **_state(item), "scores": _encode(row)})
                    bar.update()
    distributed.barrier()
    if distributed.is_main():
        manifest.merge()
    distributed.barrier()
    known = manifest.rows()
    return [_decode(known[name]["scores"]) for name in names]


def mean_by_category(items: Sequence[ScoredImage], values: Sequence[float]) -> dict[str, float]:
    """Category -> mean of the values of its pictures, sorted; empty where no picture has a category."""
    groups: dict[str, list[float]] = {}
    for item, value in zip(items, values, strict=True):
        if item.category is not None:
            groups.setdefault(item.category, []).append(value)
    return {name: math.fsum(group) / len(group) for name, group in sorted(groups.items())}


def _claim(manifest: Manifest, settings: dict[str, Any]) -> None:
    """Make the folder the one of these settings, or refuse it."""
    path = manifest.folder / _SETTINGS
    if not path.exists():
        if manifest.rows():
            raise ValueError(f"{manifest.folder} holds a manifest that is not of scores: name another folder")
        write_atomic(path, json.dumps(settings, indent=2).encode())  # each process may: the same bytes
        return
    try:
        then = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: remove {manifest.folder}") from error
    if then != settings:
        changed = [key for key in (*settings, *then) if then.get(key) != settings.get(key)]
        listed = ", ".join(
            f"{key} {then.get(key)!r} (now {settings.get(key)!r})" for key in dict.fromkeys(changed)
        )
        raise ValueError(
            f"{manifest.folder} holds scores of other settings: {listed}; name another folder, or remove it"
        )


def _loaded(
    batches: Sequence[Sequence[ScoredImage]], load: Callable[[Path], Any], threads: int
) -> Iterator[tuple[Sequence[ScoredImage], list[Any]]]:
    """Batches with their pictures, the next one being read while one is used."""
    with ThreadPoolExecutor(threads) as pool:
        coming: list[Any] = []
        for place, batch in enumerate(batches):
            current = coming or [pool.submit(load, item.path) for item in batch]
            following = batches[place + 1] if place + 1 < len(batches) else ()
            coming = [pool.submit(load, item.path) for item in following]
            try:
                yield batch, [future.result() for future in current]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _state(item: ScoredImage) -> dict[str, Any]:
    """What says that a file is the one that was scored, and who it belongs to."""
    try:
        stat = item.path.stat()
    except OSError as error:
        raise ValueError(f"{item.path}: {error.strerror}") from error
    return {
        "index": item.prompt_index,
        "sample": item.sample_index,
        "prompt": item.prompt,
        "size": stat.st_size,
        "time": stat.st_mtime_ns,
    }


def _is_done(item: ScoredImage, known: Mapping[str, Mapping[str, Any]]) -> bool:
    row = known.get(item.name)
    return row is not None and all(row.get(key) == value for key, value in _state(item).items())


def _require_finite(item: ScoredImage, row: Row) -> None:
    for key, value in row.items():
        if not _is_finite(value):
            raise ValueError(
                f"{item.name}: its {key} is not finite (NaN or infinite): a damaged picture or wrong weights"
            )


def _is_finite(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    numeric = isinstance(value, float | np.ndarray | np.floating)
    return not numeric or bool(np.isfinite(value).all())


def _encode(row: Row) -> dict[str, Any]:
    """JSON values; an array is the base64 text of its little-endian float32 bytes."""

    def value_of(value: object) -> object:
        if isinstance(value, np.ndarray):
            assert value.ndim == 1, f"arrays of one dimension are kept, got {value.shape}"
            return {"float32": base64.b64encode(value.astype("<f4").tobytes()).decode()}
        return value.item() if isinstance(value, np.generic) else value

    return {key: value_of(value) for key, value in row.items()}


def _decode(scores: Mapping[str, Any]) -> Row:
    def value_of(value: object) -> object:
        if isinstance(value, dict) and value.keys() == {"float32"}:
            return np.frombuffer(base64.b64decode(value["float32"]), "<f4")
        return value

    return {key: value_of(value) for key, value in scores.items()}
