"""A folder of pictures, each `NAME.{png,jpg,jpeg,webp}` with its caption in `NAME.txt` or in `NAME<suffix>.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sana.data.captions import parsed, scores_of, texts_of
from sana.data.pictures import Pictures, Reading, state_of
from sana.data.quarantine import UNREADABLE

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
META = "meta_data.json"


class ImageFolder(Pictures):
    """The pictures of some folders, in the order of their names, or of `meta_data.json` where a folder has one.

    Args:
        reading: how; a number makes squares of that side.

    Raises:
        ValueError: no such folder, no picture in it, or a `meta_data.json` of another form.
    """

    caption_hint = "write it on the first line of NAME.txt, or name the suffixes of NAME<suffix>.json"

    def __init__(self, folders: Sequence[str | Path], reading: Reading | int) -> None:
        super().__init__(Reading.of(reading))
        self.paths: list[Path] = []
        bad: list[tuple[str, str]] = []
        for folder in map(Path, folders):
            if not folder.is_dir():
                raise ValueError(f"no such folder of pictures: {folder}")
            found, missing = _listed(folder)
            self.paths += found
            bad += [(str(path), f"named in {META}, but there is no such picture") for path in missing]
        if not self.paths:
            raise ValueError(f"no picture ({', '.join(EXTENSIONS)}) in {', '.join(map(str, folders))}")
        if self.reading.minimal_score > 0:
            self.paths = [path for path in self.paths if self._own_score(path) >= self.reading.minimal_score]
        states = [state_of(path) for path in self.paths]
        sizes = None
        if self.frame.table is not None:
            found = self._headers(states)
            bad += [
                (str(path), size)
                for path, size in zip(self.paths, found, strict=True)
                if isinstance(size, str)
            ]
            kept = [i for i, size in enumerate(found) if not isinstance(size, str)]
            self.paths, states = [self.paths[i] for i in kept], [states[i] for i in kept]
            sizes = [tuple(found[i]) for i in kept]
        # What is on disk decides what the pictures are, also when a file is replaced by another of its name.
        self._complete("pictures", states, bad, sizes)

    def __len__(self) -> int:
        return len(self.paths)

    def label(self, index: int) -> str:
        """Path of picture `index`."""
        return str(self.paths[index])

    def content(self, index: int) -> Path:
        return self.paths[index]

    def described(self, index: int) -> tuple[Mapping[str, str], Mapping[str, float]]:
        path = self.paths[index]
        texts: dict[str, str] = {}
        plain = path.with_suffix(".txt")
        if plain.is_file():
            texts["prompt"] = (plain.read_text(encoding="utf-8-sig").strip().splitlines() or [""])[0]
        for suffix in self.reading.caption_suffixes:
            texts |= texts_of(_sidecar(path, suffix))
        scores: dict[str, float] = {}
        for suffix in self.reading.score_suffixes:
            scores |= scores_of(_sidecar(path, suffix), f"{path.stem}{suffix}.json")
        return texts, scores

    def _own_score(self, path: Path) -> float:
        """CLIP score of the picture's own caption; 100 where it is not known, as in the reference."""
        try:
            found = _sidecar(path, "_prompt_clip_score")
            return scores_of(found, f"{path.stem}_prompt_clip_score.json").get("prompt", 100.0)
        except UNREADABLE:
            return 100.0  # the reader of captions names this file, if its suffix is configured


def _sidecar(path: Path, suffix: str) -> Mapping[str, Any]:
    """What `NAME<suffix>.json` says of NAME; nothing where there is no such file."""
    sidecar = path.with_name(f"{path.stem}{suffix}.json")
    return parsed(sidecar.read_bytes(), path.stem, sidecar.name) if sidecar.is_file() else {}


def _listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """(pictures of a folder, pictures that its `meta_data.json` names and that are not there)."""
    if not (folder / META).is_file():
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS), []
    names = parsed((folder / META).read_bytes(), None, str(folder / META)).get("img_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{folder / META} has no list of texts "img_names"')
    found, missing = [], []
    for name in names:
        named = folder / name
        # Older files name pictures without their extension; those are .png, but any is taken.
        tried = (
            [named] if named.suffix.lower() in EXTENSIONS else [folder / f"{name}{end}" for end in EXTENSIONS]
        )
        there = [path for path in tried if path.is_file()]
        (found if there else missing).append(there[0] if there else tried[0])
    return found, missing
