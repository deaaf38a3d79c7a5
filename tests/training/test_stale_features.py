"""A cache that is not of this data or of these encoders is refused, and renewed at the least cost."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from sana.data.cache import FeatureCache, StaleCache
from sana.training.feature_cache import extract
from sana.utils import hub
from tests.factories import make_autoencoder, write_model
from tests.training import micro
from tests.training.cached import COUNT, config, encoded, files, forbid_encoders, write_pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), COUNT)


def another_autoencoder(model, pictures):
    make_autoencoder(seed=1).save_pretrained(model.parent / "autoencoder")


def another_tokenizer(model, pictures):
    path = model.parent / "text_encoder" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra": 1}))


def edited_picture(model, pictures):
    Image.new("RGB", (40, 40), "red").save(pictures / "0003.png")


def added_picture(model, pictures):
    shutil.copy(pictures / "0003.txt", pictures / "0003b.txt")
    Image.new("RGB", (40, 40), "red").save(pictures / "0003b.png")


def removed_picture(model, pictures):
    (pictures / "0009.png").unlink()


def nothing(model, pictures):
    pass


@pytest.mark.parametrize(
    "change, keys, said, pictures_anew, captions_anew",
    [
        (another_autoencoder, (), r"vae.vae_pretrained \w{16} -> \w{16};", COUNT, 0),
        (another_tokenizer, (), r"text_encoder.text_encoder_name \w{16} -> \w{16};", 0, COUNT + 4),
        (
            nothing,
            ("--text_encoder.chi_prompt=[Hear. ]",),
            r"text_encoder.chi_prompt \w{16} -> ",
            0,
            COUNT + 4,
        ),
        (nothing, ("--text_encoder.model_max_length=20",), "model_max_length 24 -> 20;", 0, COUNT + 4),
        (nothing, ("--model.image_size=96",), "model.image_size 64 -> 96;", COUNT, 0),
        (
            edited_picture,
            (),
            "data.data_dir 10 samples -> 10, 1 pictures are new, 1 are gone.*0003.png",
            1,
            0,
        ),
        (
            added_picture,
            (),
            "data.data_dir 10 samples -> 11, 1 pictures are new, 0 are gone.*0003b.png",
            1,
            0,
        ),
        (removed_picture, (), "data.data_dir 10 samples -> 9, 0 pictures are new, 1 are gone", 0, 0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_stale_cache_is_refused_until_it_is_renewed(
    pictures, tmp_path, monkeypatch, change, keys, said, pictures_anew, captions_anew
):
    model = write_model(tmp_path / "model")
    own, features = shutil.copytree(pictures, tmp_path / "pictures"), tmp_path / "features"
    extract(config(model, own, features))
    change(model, own)
    before = files(features)
    changed = config(model, own, features, *keys)
    for refused in (lambda: extract(changed), lambda: micro.Trainer(changed)):
        with pytest.raises(StaleCache, match=rf"features is stale: (?s:.*){said}") as error:
            refused()
        assert "python scripts/extract_features.py --renew --config_path=" in str(error.value)
        assert len(str(error.value).splitlines()) == 1
    assert files(features) == before, "nothing is touched"
    seen = encoded(monkeypatch)
    extract(changed, renew=True)
    assert (seen.count("picture"), seen.count("caption")) == (pictures_anew, captions_anew)
    forbid_encoders(monkeypatch)
    micro.Trainer(changed)


def test_data_that_was_moved_is_recognised_by_its_contents(model, pictures, tmp_path, monkeypatch, caplog):
    own, features = shutil.copytree(pictures, tmp_path / "pictures"), tmp_path / "features"
    extract(config(model, own, features))
    moved = own.rename(tmp_path / "elsewhere")
    for path in moved.iterdir():
        os.utime(path)
    forbid_encoders(monkeypatch)
    with caplog.at_level(logging.INFO):
        micro.Trainer(config(model, moved, features))
        assert caplog.text.count("reading all files of pictures-64-") == 1
        micro.Trainer(config(model, moved, features))
    assert caplog.text.count("reading all files of pictures-64-") == 1, "the new place is remembered"


def test_an_edited_caption_is_refused_when_it_is_met_and_renewed(model, pictures, tmp_path, monkeypatch):
    own, features = shutil.copytree(pictures, tmp_path / "pictures"), tmp_path / "features"
    wanted = config(model, own, features)
    extract(wanted)
    for path in own.glob("*.txt"):
        path.write_text("another caption")
    run = micro.Trainer(wanted)
    with pytest.raises(StaleCache, match="no features of the caption 'another caption'.*--renew"):
        for _, _batch in zip(range(5), run._batches(), strict=False):
            pass
    with pytest.raises(StaleCache, match="captions 1 are new, one is 'another caption'"):
        extract(wanted, check=True)
    seen = encoded(monkeypatch)
    extract(wanted, renew=True)
    assert seen == ["caption"]
    assert micro.Trainer(wanted).train()


def test_an_edit_behind_the_back_of_the_clock_is_found_by_check(model, pictures, tmp_path):
    own, features = shutil.copytree(pictures, tmp_path / "pictures"), tmp_path / "features"
    wanted = config(model, own, features)
    extract(wanted)
    path = own / "0002.png"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    extract(wanted)  # of the same size and time
    with pytest.raises(StaleCache, match="1 pictures are new, 1 are gone, .*0002.png"):
        extract(wanted, check=True)


def test_weights_are_hashed_once(model, pictures, tmp_path, monkeypatch):
    wanted = config(model, pictures, tmp_path / "features")
    extract(wanted)
    monkeypatch.setattr(hub, "sha256", lambda path: pytest.fail(f"{path} was read"))
    extract(wanted)
    monkeypatch.undo()
    for path in (model.parent / "autoencoder").iterdir():
        os.utime(path)  # equal files of another time are no others
    extract(wanted)


def test_half_is_not_float32(model, pictures, tmp_path):
    wanted = config(model, pictures, tmp_path / "features")
    extract(wanted)
    with pytest.raises(StaleCache, match="stored as half -> float32"):
        extract(wanted, dtype="float32")
    extract(wanted, dtype="float32", renew=True)
    assert FeatureCache(tmp_path / "features").latent("data", 0).dtype == torch.float32
