"""The format of the feature cache: what is written comes back by its key, and what is broken is named."""

import numpy as np
import pytest
import torch

from sana.data import cache
from sana.data.cache import FeatureCache, StaleCache, as_keys, caption_key


class Pictures:
    """Three samples, of which the last has no latent."""

    name, quarantine = "three", None

    def __len__(self):
        return 3

    def label(self, index):
        return f"picture {index}"

    def size(self, index):
        return 64, 32 + 32 * index

    def captions(self, index):
        return []

    def caption(self, index, epoch):
        return f"{index} {epoch}"


LATENTS = [torch.randn(2, 1, 4).half(), torch.randn(2, 2, 4).half()]
PICTURE_KEYS = [b"\x00" * 15 + b"\x01", b"\xff" * 15 + b"\x00"]  # zeros at either end are part of a key
TEXTS = {"a cat": torch.randn(1, 3, 6), "": torch.randn(1, 1, 6), "été 😀": torch.randn(1, 7, 6)}


@pytest.fixture
def folder(tmp_path):
    cache.write_chunk(tmp_path / cache.LATENTS, {PICTURE_KEYS[0]: LATENTS[0]})
    cache.write_chunk(tmp_path / cache.LATENTS, {PICTURE_KEYS[1]: LATENTS[1]})
    cache.write_chunk(tmp_path / cache.TEXTS, {caption_key(text): found for text, found in TEXTS.items()})
    cache.write_chunk(tmp_path / cache.TEXTS, {cache.NULL_KEY: torch.ones(1, 9, 6)})
    cache.write_index(tmp_path, {"data": as_keys([*PICTURE_KEYS, cache.NO_KEY])})
    return tmp_path


def test_features_come_back_by_sample_and_by_caption(folder):
    found = FeatureCache(folder)
    samples = found.of("data", Pictures())
    for index, latent in enumerate(LATENTS):
        assert torch.equal(samples.image(index), latent.permute(2, 0, 1))
        assert samples.image(index).is_contiguous() and samples.image(index).dtype == torch.float16
    for text, embeds in TEXTS.items():
        assert torch.equal(found.text(text), embeds[0]) and caption_key(text) in found
    assert found.null().shape == (9, 6) and found.has_texts and len(found) == 6 and found.broken() == []
    assert found.pictures()["data"].tolist() == as_keys([*PICTURE_KEYS, cache.NO_KEY]).tolist()
    assert (samples.size(1), samples.caption(1, 7), samples.label(1), len(samples)) == (
        (64, 64),
        "1 7",
        "picture 1",
        3,
    )


def test_what_is_not_there_is_said(folder):
    found = FeatureCache(folder)
    with pytest.raises(ValueError, match="picture 2: has no latent: it could not be read when the cache was"):
        found.of("data", Pictures()).image(2)
    with pytest.raises(StaleCache, match="no features of the caption 'a dog'.*extract_features.py --renew"):
        found.text("a dog")
    with pytest.raises(ValueError, match="index.safetensors cannot be read: .*No such file"):
        FeatureCache(folder / "nowhere")


def test_a_broken_file_is_named_and_harms_no_other(folder):
    (path,) = [
        path
        for path in cache.chunk_files(folder, cache.LATENTS)
        if cache.read_keys(path) == as_keys(PICTURE_KEYS[1:])
    ]
    path.write_bytes(path.read_bytes()[:-3])
    found = FeatureCache(folder)
    assert found.broken() == [path]
    samples = found.of("data", Pictures())
    assert torch.equal(samples.image(0), LATENTS[0].permute(2, 0, 1))
    with pytest.raises(ValueError, match=f"picture 1: the cache file {path} cannot be read"):
        samples.image(1)
    path.unlink()
    assert FeatureCache(folder).broken() == [path]


def test_random_keys_are_found_and_others_are_not():
    source = np.random.default_rng(0)
    keys = as_keys(source.bytes(cache.KEY) for _ in range(500))
    known = np.unique(keys[:300])
    assert cache.contained(keys[:300], known).all() and not cache.contained(keys[300:], known).any()
    assert not cache.contained(keys, as_keys([])).any()


def test_keys_of_samples_and_captions_come_back(tmp_path):
    captions = [[caption_key("a"), caption_key("b")], [], [caption_key("c")]]
    cache.write_samples(tmp_path / "x.safetensors", [*PICTURE_KEYS, cache.NO_KEY], captions)
    pictures, found, places = cache.read_samples(tmp_path / "x.safetensors")
    assert (pictures == as_keys([*PICTURE_KEYS, cache.NO_KEY])).all()
    assert (found == as_keys(map(caption_key, "abc"))).all() and places.tolist() == [[0, 0], [0, 1], [2, 0]]
