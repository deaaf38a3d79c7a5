"""The cache of a run: whether what lies in `train.feature_cache_dir` is what the run needs, and the making of what is not there.

At each start the sizes and times of files are compared, and the hashes of the encoders' weights, which are kept beside the
sizes and times that they were found at. Where those of the data are others than they were, and with `check`, the contents
of all files are compared. What differs is refused; only `renew` replaces it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from sana.config import ConfigError, SanaConfig
from sana.data import cache
from sana.data.cache import FeatureCache, StaleCache
from sana.data.pictures import Encodable, Pictures
from sana.models.text_encoder import HUB_NAMES
from sana.training.extraction import Extraction, Processes, stream
from sana.training.heldout import data_sets
from sana.training.parallel import together
from sana.utils import hub
from sana.utils.files import write_atomic
from sana.utils.logging import get_logger

log = get_logger(__name__)

UNIT = 1000
"""Samples, or captions, that a process does at once."""
_AUTOENCODER, _TEXT_ENCODER = "vae.vae_pretrained", "text_encoder.text_encoder_name"
_INSTRUCTION, _LENGTH = "text_encoder.chi_prompt", "text_encoder.model_max_length"
_OF_LATENTS = {"format", "stored as", _AUTOENCODER}
_OF_TEXTS = {"format", "stored as", _TEXT_ENCODER, _INSTRUCTION, _LENGTH}
_MODEL_FILES = (".safetensors", ".bin", ".pth", ".pt", ".json", ".model", ".txt")


def open_cache(
    config: SanaConfig,
    sets: dict[str, Encodable],
    processes: Processes,
    *,
    dtype: str | None = None,
    renew: bool = False,
    check: bool = False,
    mend: bool = False,
) -> FeatureCache:
    """The cache in `train.feature_cache_dir`, complete for these data sets. Every process must call it.

    Args:
        sets: name -> data set. Their pictures are encoded, and all their captions unless these are new in each epoch.
        dtype: one of `DTYPES` that it must be stored in; None takes what is there, "half" where nothing is.
        renew: read everything again and replace what is stale, keeping every feature that is still right.
        check: compare the contents of all files with those that were encoded, not their sizes and times alone.
        mend: make features in broken files anew; else they are named, and missing.

    Raises:
        StaleCache: it is of other data or other encoders.
        ValueError: an encoder is needed and cannot be loaded, or more samples cannot be read than is allowed.
    """
    return _Opening(config, sets, processes, dtype).open(renew=renew, check=check, mend=mend)


def extract(config: SanaConfig, **settings: Any) -> str:
    """`open_cache` for what a config is trained on, without a training; a line that says what is there."""
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    found = open_cache(config, data_sets(config), processes, mend=True, **settings)
    size = sum(size for _, size in found.files)
    return f"{found.folder}: {len(found)} features in {len(found.files)} files, {size / 1e9:.3g} GB"


class _Opening:
    def __init__(
        self,
        config: SanaConfig,
        sets: dict[str, Encodable],
        processes: Processes,
        dtype: str | None,
    ) -> None:
        if config.train.feature_cache_dir is None:
            raise ConfigError(
                "train.feature_cache_dir: name the folder of the cache: --train.feature_cache_dir=DIR"
            )
        self.config, self.sets, self.processes, self.dtype = config, sets, processes, dtype
        self.folder = Path(config.train.feature_cache_dir)
        self.with_texts = not any(samples.captions_vary for samples in sets.values())
        self.before: dict[str, Any] = {}
        self.about: dict[str, Any] = {}

    def open(self, *, renew: bool, check: bool, mend: bool) -> FeatureCache:
        """As `open_cache`."""
        if mend:
            together(self.processes, self._drop_broken_index)
        if not self.with_texts:
            log.info("captions are new in each epoch: they are encoded in training, and pictures kept alone")
        self.before, self.about, differences, suspects = together(
            self.processes, lambda: self._compare(check)
        )
        for name in suspects:
            differences |= self._contents(name)
        if differences and not renew:
            listed = "; ".join(f"{name} {what}" for name, what in differences.items())
            raise StaleCache(
                f"train.feature_cache_dir: {self.folder} is stale: {listed}; {cache.how_to_renew()}"
            )
        if together(self.processes, lambda: self._begin(differences, renew=renew, mend=mend)):
            stored, unit = self.about["facts"]["stored as"], self.about["unit"]
            settings = {"folder": self.folder, "unit": unit, "dtype": stored, "texts": self.with_texts}
            Extraction(self.config, self.sets, self.processes, **settings).run()
        found = FeatureCache(self.folder)
        for path in found.broken() if self.processes.is_main_process else ():
            log.warning("%s is broken: its features are missing; scripts/extract_features.py mends it", path)
        return found

    def _compare(self, check: bool) -> tuple[dict[str, Any], dict[str, Any], dict[str, str], list[str]]:
        """(what the cache says it is, what it should be, fact -> how they differ, the sets whose files must be read)."""
        before: dict[str, Any] = {"facts": {}, "data": {}, "weights": {}}
        with suppress(FileNotFoundError):
            before |= _json(self.folder / cache.ABOUT)
        weights = self._weights(before["weights"])
        recorded, facts = before["facts"], self._facts(weights)
        facts["stored as"] = self.dtype or recorded.get("stored as", "half")
        about = {
            "facts": recorded | facts,
            "data": before["data"] | {name: samples.name for name, samples in self.sets.items()},
            "weights": before["weights"] | weights,
            "unit": before.get("unit", UNIT),
        }
        changed = [name for name in facts if name in recorded and facts[name] != recorded[name]]
        suspects = []
        if (self.folder / cache.INDEX).is_file():  # what was begun and not completed is read again anyway
            known = FeatureCache(self.folder).pictures().keys() & self.sets.keys()
            suspects = [name for name in known if check or before["data"].get(name) != self.sets[name].name]
        return before, about, {name: f"{recorded[name]} -> {facts[name]}" for name in changed}, suspects

    def _facts(self, weights: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What features depend on, besides the data; of an encoder only where it is on this machine."""
        text = self.config.text_encoder
        facts: dict[str, Any] = {"format": cache.FORMAT}
        facts |= {name: found["sha256"][:16] for name, found in weights.items()}
        if self.with_texts:
            instruction = hashlib.sha256("\n".join(text.chi_prompt).encode()).hexdigest()[:16]
            facts |= {_INSTRUCTION: instruction, _LENGTH: text.model_max_length}
        for samples in self.sets.values():
            if isinstance(samples, Pictures):
                facts["model.image_size"] = samples.frame.name
        return facts

    def _weights(self, before: dict[str, Any]) -> dict[str, Any]:
        """The hashes of the encoders' files, from the record where these have the size and time that it says."""
        names = {_AUTOENCODER: self.config.vae.vae_pretrained}
        if self.with_texts:
            name = self.config.text_encoder.text_encoder_name
            names[_TEXT_ENCODER] = HUB_NAMES.get(name, name)
        found = {}
        for key, name in names.items():
            folder = _on_this_machine(name) if key in before else hub.resolve_model(name)
            files = _model_files(folder, with_tokenizer=key == _TEXT_ENCODER) if folder else []
            if key in before and not any(file.suffix in hub.WEIGHT_SUFFIXES for file in files):
                log.info("%s: %s is not on this machine; the cache says what it was", key, name)
                continue
            states = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
            if key in before and before[key]["files"] == states:
                found[key] = before[key]
            else:
                lines = "".join(f"{file.name} {hub.sha256(file)}\n" for file in files)
                found[key] = {"sha256": hashlib.sha256(lines.encode()).hexdigest(), "files": states}
        return found

    def _contents(self, name: str) -> dict[str, str]:
        """How the pictures and captions of a set differ from those that were encoded; every process reads a share."""
        samples, known = self.sets[name], FeatureCache(self.folder)
        log.info("reading all files of %s: are they those in %s?", samples.name, self.folder)
        mine = range(self.processes.process_index, len(samples), self.processes.num_processes)
        workers = self.config.train.num_workers
        reads = stream(samples, mine, None, captions=self.with_texts, num_workers=workers)
        keys, missing = {}, []
        for index, read in zip(mine, reads, strict=True):
            keys[index] = read.key
            missing += [text for text in read.captions if cache.caption_key(text) not in known]
        keys = dict(gather_object(list(keys.items())))
        missing = gather_object(missing)
        old, new = known.pictures()[name], cache.as_keys(keys[index] for index in range(len(samples)))
        found = {}
        # What could not be read before may have been mended; what cannot be read now, the quarantine will name.
        differ = np.flatnonzero((old[: len(new)] != new[: len(old)]) & (new[: len(old)] != cache.NO_KEY))
        if len(old) != len(new) or len(differ):
            added, gone = len(np.setdiff1d(new, old)), len(np.setdiff1d(old, new))
            first = int(differ[0]) if len(differ) else min(len(old), len(new) - 1)
            found["data.data_dir"] = (
                f"{len(old)} samples -> {len(new)}, {added} pictures are new, {gone} are gone, "
                f"the first difference is at {samples.label(first)}"
            )
        if missing:
            found["captions"] = f"{len(set(missing))} are new, one is {missing[0][:60]!r}"
        return found

    def _begin(self, differences: dict[str, str], *, renew: bool, mend: bool) -> bool:
        """Take away what is stale or broken, and write down what will be here; whether anything is to be made."""
        folder, index = self.folder, self.folder / cache.INDEX
        if renew:
            index.unlink(missing_ok=True)
            for kind, facts in ((cache.LATENTS, _OF_LATENTS), (cache.TEXTS, _OF_TEXTS)):
                if differences.keys() & facts:
                    shutil.rmtree(folder / kind, ignore_errors=True)
            shutil.rmtree(folder / cache.SAMPLES, ignore_errors=True)
        for name, samples in self.sets.items():
            if not index.is_file() and self.before["data"].get(name, samples.name) != samples.name:
                shutil.rmtree(folder / cache.SAMPLES / name, ignore_errors=True)
        complete = index.is_file() and self._is_complete(mend)
        if not complete:
            for path in (*cache.chunk_files(folder, cache.LATENTS), *cache.chunk_files(folder, cache.TEXTS)):
                try:
                    cache.read_keys(path)
                except ValueError as error:
                    log.warning("%s; its features are made anew", error)
                    path.unlink()
        if self.about != self.before:
            try:
                write_atomic(folder / cache.ABOUT, json.dumps(self.about, indent=1).encode())
            except OSError:  # a folder that can only be read is no harm when all is in it
                if not complete:
                    raise
        return not complete

    def _drop_broken_index(self) -> None:
        try:
            FeatureCache(self.folder)
        except ValueError as error:
            if (self.folder / cache.INDEX).is_file():
                log.warning("%s", error)
                (self.folder / cache.INDEX).unlink()

    def _is_complete(self, mend: bool) -> bool:
        found = FeatureCache(self.folder)
        wanted = []
        if self.with_texts:
            prompts = self.config.train.validation_prompts if self.config.train.visualize else ()
            wanted = [cache.NULL_KEY, *map(cache.caption_key, prompts)]
        complete = self.sets.keys() <= found.pictures().keys() and all(key in found for key in wanted)
        return complete and not (mend and found.broken())


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; delete the folder to begin anew") from error


def _on_this_machine(name: str) -> Path | None:
    """The folder of a model, if it is here: nothing is downloaded."""
    try:
        return hub.resolve("" if name.startswith("hf://") else name)
    except ValueError:
        owner, _, rest = name.removeprefix("hf://").partition("/")
        repo, _, inner = rest.partition("/")
        from huggingface_hub import snapshot_download  # lazy: local paths do not need it

        try:
            return Path(snapshot_download(f"{owner}/{repo}", local_files_only=True)) / inner
        except (ValueError, OSError):  # of a name that is none, too
            return None


def _model_files(folder: Path, with_tokenizer: bool) -> list[Path]:
    """The files that decide what an encoder answers."""
    folders = [folder]
    if with_tokenizer:  # of a pipeline's folder, or of its part
        model = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
        folders = [model, model.parent / "tokenizer"]
    found = (path for place in folders if place.is_dir() for path in place.iterdir())
    return sorted(path for path in found if path.suffix in _MODEL_FILES)
