"""Folders of the Hugging Face `datasets` library: what `save_to_disk` writes, and folders of parquet files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sana.data.pictures import Pictures, Reading

CAPTION_COLUMNS = ("prompt", "caption", "text")
_SCORE_END = "_clip_score"


class HFDataset(Pictures):
    """The rows of some folders. Captions: the caption column (kind `prompt`), and each text column KIND that has a
    `KIND_clip_score` column or a weight in `data.caption_proportion`.

    Args:
        image_column: None: the only column of pictures.
        caption_column: None: the first of `prompt`, `caption`, `text` that is there.

    Raises:
        ValueError: no such folder, it holds no data set, or its columns are not clear.
    """

    caption_hint = "give the column that holds it as --data.caption_column=NAME"

    def __init__(
        self,
        folders: Sequence[str | Path],
        reading: Reading | int,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        super().__init__(Reading.of(reading))
        from datasets import Image, concatenate_datasets

        rows = concatenate_datasets([_opened(Path(folder), self.reading) for folder in folders])
        pictures = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
        self.folders = ", ".join(map(str, folders))
        self.image_column = _column("image", image_column, pictures, rows.column_names, self.folders)
        texts = [name for name in CAPTION_COLUMNS if name in rows.column_names][:1]
        self.caption_column = _column("caption", caption_column, texts, rows.column_names, self.folders)
        # In the columns' order: a set's differs between processes, and with it the caption that a seed draws.
        self.kinds = [
            name
            for name in rows.column_names
            if f"{name}{_SCORE_END}" in rows.column_names or name in self.reading.choice.proportion
        ]
        # Bytes as they lie in the files: decoding is ours, so that a broken picture is ours to name.
        self._rows = rows.cast_column(self.image_column, Image(decode=False))
        self._words = self._rows.remove_columns(self.image_column)
        self._kept = np.arange(len(rows))
        bad: list[tuple[str, str]] = []
        if self.reading.minimal_score > 0:
            score = f"prompt{_SCORE_END}"
            values = rows[score] if score in rows.column_names else [None] * len(rows)
            least = self.reading.minimal_score
            self._kept = np.array(
                [i for i, s in enumerate(values) if s is None or s >= least], dtype=np.int64
            )
        state = (
            rows._fingerprint,
            len(rows),
            self.image_column,
            self.caption_column,
            self.reading.minimal_score,
        )
        sizes = None
        if self.frame.table is not None:
            found = self._headers(state)
            bad = [(self.label(i), size) for i, size in enumerate(found) if isinstance(size, str)]
            sizes = [tuple(size) for size in found if not isinstance(size, str)]
            good = [i for i, size in enumerate(found) if not isinstance(size, str)]
            self._kept = self._kept[good]
        self._complete("rows", state, bad, sizes)

    def __len__(self) -> int:
        return len(self._kept)

    def label(self, index: int) -> str:
        """The folders and the row's number."""
        return f"{self.folders}, row {self._kept[index]}"

    def content(self, index: int) -> Path | bytes:
        picture = self._rows[int(self._kept[index])][self.image_column] or {}
        if picture.get("bytes"):
            return picture["bytes"]
        if not picture.get("path"):
            raise ValueError(f"{self.label(index)} has no picture in {self.image_column!r}")
        return Path(picture["path"])

    def described(self, index: int) -> tuple[Mapping[str, str], Mapping[str, float]]:
        row = self._words[int(self._kept[index])]
        texts = {kind: row[kind] for kind in self.kinds if isinstance(row[kind], str)}
        if isinstance(row[self.caption_column], str):
            texts = {"prompt": row[self.caption_column]} | texts
        scores = {kind: row.get(f"{kind}{_SCORE_END}") for kind in texts}
        return texts, {kind: float(score) for kind, score in scores.items() if score is not None}


def is_dataset(folder: Path) -> bool:
    """Whether a folder is one of these."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")) or bool(
        _parquet(folder)
    )


def _parquet(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*.parquet"))


def _opened(folder: Path, reading: Reading) -> Any:
    """The `datasets.Dataset` of a folder, the split `train` where there are several."""
    import datasets

    if not folder.is_dir():
        raise ValueError(f"no such folder of a Hugging Face data set: {folder}")
    if not is_dataset(folder):
        raise ValueError(f"{folder} holds no Hugging Face data set: neither state.json nor a parquet file")
    files = _parquet(folder)
    if files:  # parquet has no quick way to one row: the library keeps a copy that has
        cache = None if reading.index_dir is None else str(reading.index_dir / "parquet")
        return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found and len(found) != 1:
            raise ValueError(
                f"{folder} has the splits {', '.join(found)} and no train: name the folder of one"
            )
        return found["train"] if "train" in found else next(iter(found.values()))
    return found


def _column(purpose: str, asked: str | None, candidates: list[str], names: list[str], source: str) -> str:
    """The column for a purpose: the one that was asked for, else the only candidate."""
    chosen = [asked] if asked is not None else candidates
    if len(chosen) != 1 or chosen[0] not in names:
        raise ValueError(
            f"data.{purpose}_column: which column of {source} holds the {purpose}? It has {', '.join(names)}; "
            f"got {asked or 'nothing'}"
        )
    return chosen[0]
