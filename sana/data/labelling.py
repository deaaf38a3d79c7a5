"""Labelling a data set with captions and their CLIP scores (Sana, arXiv 2410.10629, section 4.2).

What answers (a vision-language model, CLIP) is a function here: this module finds what is missing, shares it out among the
processes of a run, reads pictures, and keeps the answers where training reads them.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import torch.distributed as dist
import yaml
from PIL import Image, ImageOps
from tqdm import tqdm

from sana.data.buckets import Frame
from sana.data.build import detected_type
from sana.data.captions import CaptionChoice
from sana.data.image_folder import ImageFolder
from sana.data.pictures import Reading
from sana.data.quarantine import UNREADABLE
from sana.data.sidecars import (
    SCORE_END,
    PictureFiles,
    caption_suffix,
    merge_journals,
    place,
    score_suffix,
    suffixes_beside,
    write_entry,
)
from sana.data.tar_shards import TarShards
from sana.utils import distributed
from sana.utils.logging import get_logger

log = get_logger(__name__)

REFUSALS = 8
"""So many pictures refused before any is answered: the model is wrong, not the pictures."""

Answer = Callable[[list[Image.Image], list[dict[str, str]]], list[dict[str, str]]]
"""(pictures, captions of each by kind) -> labels of each by kind; an empty text is no label."""


def open_samples(folder: str | Path, ends: Sequence[str], fields: Sequence[str] = ()) -> PictureFiles:
    """The pictures of a folder or of its shards, with all labels that lie beside them. Every process must call it.

    Args:
        ends: what a killed run has left in journals of suffixes with these ends is put into the sidecars first.
        fields: of KEY.json in shards, which are captions too.

    Raises:
        ValueError: no pictures are there, a sidecar of a shard is broken, or it is a Hugging Face data set.
    """
    types = {"SanaImgDataset": ImageFolder, "SanaWebDatasetMS": TarShards}
    detected = detected_type(folder)
    if detected not in types:
        raise ValueError(
            f"{folder} is a Hugging Face data set: its labels are columns, this writes files beside pictures"
        )
    choice = CaptionChoice(proportion=dict.fromkeys(fields, 1))
    reading = Reading(frame=Frame(size=1), choice=choice, bad_limit=1.0)
    samples = types[detected]([folder], reading)
    if distributed.is_main():
        merge_journals(samples, ends)
    distributed.barrier()
    captions, scores = suffixes_beside(samples)
    reading = replace(reading, caption_suffixes=tuple(captions), score_suffixes=tuple(scores))
    return types[detected]([folder], reading) if captions or scores else samples


def config_lines(samples: PictureFiles, folder: str | Path) -> str:
    """The section of a training config that reads all labels beside the samples."""
    captions, scores = suffixes_beside(samples)
    data = {
        "type": "SanaWebDatasetMS" if isinstance(samples, TarShards) else "SanaImgDataset",
        "data_dir": [str(folder)],
        "external_caption_suffixes": captions,
        "external_clipscore_suffixes": scores,
    }
    return yaml.safe_dump(
        {"data": data}, sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000
    )


def kind_of(model: str) -> str:
    """The kind of captions that a model writes, from the last part of its name."""
    return re.sub(r"[^\w.-]+", "-", Path(model).name)


def check_kind(kind: str) -> str:
    """A kind that captions can be written under: it becomes part of file names.

    Raises:
        ValueError: it cannot.
    """
    if not re.fullmatch(r"[\w.-]+", kind) or kind == "prompt" or kind.endswith(SCORE_END):
        raise ValueError(
            f"{kind!r} is no name for a kind of captions: letters, digits and .-_ are; prompt is the caption that came "
            f"with the picture, and names in {SCORE_END} are those of scores"
        )
    return kind


@dataclass
class Outcome:
    """What became of the pictures of this process, or of all."""

    written: int = 0
    """Labels."""
    kept: int = 0
    """Labels that were there already."""
    bad: dict[str, str] = field(default_factory=dict)
    """Picture -> why it has no label."""

    def leave_out(self, label: str, reason: object) -> None:
        """Name a picture without a label."""
        self.bad[label] = " ".join(str(reason).split())
        log.warning("left out %s: %s", label, self.bad[label])

    def __str__(self) -> str:
        return f"{self.written} written, {self.kept} kept, {len(self.bad)} pictures left out"

    def total(self) -> Outcome:
        """The sum over all processes of the run; every one must ask."""
        outcomes = [self]
        if distributed.world_size() > 1:
            distributed.barrier()  # starts the group where there is none
            outcomes = [self] * distributed.world_size()
            dist.all_gather_object(outcomes, self)
        bad = {label: reason for outcome in outcomes for label, reason in outcome.bad.items()}
        return Outcome(sum(each.written for each in outcomes), sum(each.kept for each in outcomes), bad)


@dataclass
class _Task:
    """One picture on its way to its labels."""

    index: int
    kinds: list[str]
    """Of the labels that it lacks."""
    picture: Image.Image | None = None
    captions: dict[str, str] = field(default_factory=dict)
    """The captions of these kinds that are there."""
    fault: Exception | None = None


Described = tuple[Mapping[str, str], Mapping[str, float]]
"""Captions and scores of a picture, by kind."""


class Labelling:
    """The labels that the samples of this process lack: every n-th sample, where there are n processes.

    Args:
        wanted: the kinds of which a sample should have a label, and those of which it has one.
        suffix: kind -> suffix of the sidecars of its labels.
        end: what all these suffixes end in.
        overwrite: ask again for labels that are there.
    """

    def __init__(
        self,
        samples: PictureFiles,
        wanted: Callable[[Described], tuple[list[str], Collection[str]]],
        *,
        suffix: Callable[[str], str],
        end: str,
        overwrite: bool,
    ) -> None:
        self.samples, self._suffix, self._end = samples, suffix, end
        self.outcome = Outcome()
        """Of this process, so far."""
        self._refused = 0
        if distributed.is_main():
            self.outcome.bad |= samples.quarantine.reasons  # the log has named them
        owners: dict[Path, int] = {}
        if isinstance(samples, ImageFolder):  # a.jpg and a.png would have one sidecar
            for index in range(len(samples)):
                owners.setdefault(place(samples, index)[0], index)
        self.missing: list[_Task] = []
        for index in range(distributed.rank(), len(samples), distributed.world_size()):
            owner = owners[place(samples, index)[0]] if owners else index
            try:
                if owner != index:
                    raise ValueError(f"has the sidecars of {samples.label(owner)}: rename one of them")
                kinds, there = wanted(self._described(index))
            except UNREADABLE as error:
                self.outcome.leave_out(samples.label(index), error)
                continue
            missing = [kind for kind in kinds if overwrite or kind not in there]
            self.outcome.kept += len(kinds) - len(missing)
            if missing:
                self.missing.append(_Task(index, missing))

    @classmethod
    def captions(cls, samples: PictureFiles, kind: str, *, overwrite: bool = False) -> Labelling:
        """Captions of one kind, for every picture."""

        def wanted(described: Described) -> tuple[list[str], Collection[str]]:
            return [kind], described[0]

        end = caption_suffix(kind)
        return cls(samples, wanted, suffix=caption_suffix, end=end, overwrite=overwrite)

    @classmethod
    def scores(
        cls, samples: PictureFiles, kinds: Sequence[str] = (), *, overwrite: bool = False
    ) -> Labelling:
        """CLIP scores of the captions of some kinds; of all where none is named. Every process must call it.

        Raises:
            ValueError: no picture has such a caption.
        """
        which = f" of kind {' or '.join(kinds)}" if kinds else ""

        def wanted(described: Described) -> tuple[list[str], Collection[str]]:
            found = [kind for kind in described[0] if not kinds or kind in kinds]
            if not found:
                raise ValueError(f"has no caption{which}")
            return found, described[1]

        self = cls(samples, wanted, suffix=score_suffix, end=SCORE_END, overwrite=overwrite)
        found = Outcome(len(self.missing), self.outcome.kept).total()
        if not found.written + found.kept:
            raise ValueError(f"no picture has a caption{which} to score; {samples.caption_hint}")
        return self

    def run(self, answer: Answer, *, batch_size: int, threads: int = 4) -> None:
        """Ask for what is missing, and keep each answer at once.

        Args:
            answer: may raise ValueError for pictures that it refuses; they are named and left out.
            batch_size: pictures asked about together.
            threads: that read pictures ahead.

        Raises:
            ValueError: `REFUSALS` pictures were refused and none was answered.
        """
        with tqdm(total=len(self.missing), unit="picture", disable=not distributed.is_main()) as bar:
            for batch in self._read_ahead(batch_size, threads):
                for task in batch:
                    if task.fault is not None:
                        self._leave_out(task, f"cannot read the picture: {task.fault}")
                self._ask(answer, [task for task in batch if task.fault is None])
                bar.update(len(batch))

    def finish(self) -> Outcome:
        """Put the labels of all processes into the sidecars; every process must call it.

        Returns what became of the pictures of all processes.
        """
        distributed.barrier()
        if distributed.is_main():
            merge_journals(self.samples, [self._end])
        return self.outcome.total()

    def _described(self, index: int) -> Described:
        """As `Pictures.captions`, but a picture without any is no error: captions are what it is here for."""
        texts, scores = self.samples.described(index)
        return {kind: text.strip() for kind, text in texts.items() if text.strip()}, scores

    def _read_ahead(self, batch_size: int, threads: int) -> Iterator[list[_Task]]:
        """Batches of tasks with their pictures, two of them read while the one before is asked about."""
        starts = range(0, len(self.missing), batch_size)
        with ThreadPoolExecutor(threads) as pool:
            ahead: deque[list[Future[_Task]]] = deque()
            for start in starts:
                batch = self.missing[start : start + batch_size]
                ahead.append([pool.submit(self._read, task) for task in batch])
                if len(ahead) > 2:
                    yield [future.result() for future in ahead.popleft()]
            for batch in ahead:
                yield [future.result() for future in batch]

    def _read(self, task: _Task) -> _Task:
        """A copy of the task with its picture: upright, RGB, at its full size."""
        try:
            captions = self._described(task.index)[0]
            content = self.samples.content(task.index)
            with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as image:
                picture = ImageOps.exif_transpose(image).convert("RGB")
        except UNREADABLE as error:
            return replace(task, fault=error)
        there = {kind: captions[kind] for kind in task.kinds if kind in captions}
        return replace(task, picture=picture, captions=there)

    def _ask(self, answer: Answer, tasks: list[_Task]) -> None:
        if not tasks:
            return
        try:
            labels = answer([task.picture for task in tasks], [task.captions for task in tasks])
        except ValueError as error:
            if len(tasks) > 1:  # whose fault it is shows one by one
                for task in tasks:
                    self._ask(answer, [task])
                return
            self._refused += 1
            if self._refused >= REFUSALS and not self.outcome.written:
                raise
            self._leave_out(tasks[0], error)
            return
        for task, found in zip(tasks, labels, strict=True):
            self._keep(task, found)

    def _keep(self, task: _Task, labels: Mapping[str, str]) -> None:
        for kind in task.kinds:
            text = labels[kind].strip()
            if not text:
                self._leave_out(task, f"the answer for {kind} is empty")
                continue
            try:
                write_entry(self.samples, task.index, self._suffix(kind), {kind: text})
            except ValueError as error:
                self._leave_out(task, error)
                continue
            self.outcome.written += 1

    def _leave_out(self, task: _Task, reason: object) -> None:
        self.outcome.leave_out(self.samples.label(task.index), reason)
