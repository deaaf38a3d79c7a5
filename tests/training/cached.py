"""Pictures with captions, and a training of them from a cache of features."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from sana.models.autoencoder import Autoencoder
from sana.models.text_encoder import TextEncoder
from tests.training import micro

COUNT = 10


def write_pictures(folder: Path, count: int) -> Path:
    """Pictures of noise, each with a caption of its own and one that others have too."""
    source = np.random.default_rng(0)
    for number in range(count):
        name = folder / f"{number:04}"
        Image.fromarray(source.integers(0, 256, (40, 40, 3), np.uint8)).save(name.with_suffix(".png"))
        name.with_suffix(".txt").write_text(f"a red circle, {number}")
        described = {name.stem: {"long": f"three blue stars and {number % 3} green squares"}}
        name.with_name(f"{name.stem}_long.json").write_text(json.dumps(described))
    return folder


def more(pictures: Path, features: Path | None, *others: str) -> tuple[str, ...]:
    return (
        "--data.type=SanaImgDataset",
        f"--data.data_dir=[{pictures}]",
        "--data.external_caption_suffixes=[_long]",
        "--data.external_clipscore_suffixes=[]",
        "--data.caption_selection_type=proportion",
        "--data.caption_proportion={prompt: 1, long: 1}",
        f"--train.feature_cache_dir={features or ''}",
        "--train.validation_prompts=[a heart]",
        *others,
    )


def config(model, pictures, features, *others):
    return micro.config(model, features.parent / "run", *more(pictures, features, *others))


def forbid_encoders(monkeypatch, *classes):
    def refuse(*_, **__):
        raise AssertionError("an encoder was loaded")

    for encoder in classes or (Autoencoder, TextEncoder):
        monkeypatch.setattr(encoder, "from_pretrained", refuse)


def encoded(monkeypatch) -> list[str]:
    """Grows by "picture" and "caption" with each that is encoded."""
    seen = []
    images, texts = Autoencoder.encode, TextEncoder.encode
    monkeypatch.setattr(
        Autoencoder,
        "encode",
        lambda self, batch: (seen.extend(["picture"] * len(batch)), images(self, batch))[1],
    )
    monkeypatch.setattr(
        TextEncoder,
        "encode",
        lambda self, batch: (seen.extend(["caption"] * len(batch)), texts(self, batch))[1],
    )
    return seen


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
