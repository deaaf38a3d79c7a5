"""The cache of a training: made once, alike on any number of processes, and read in place of both encoders."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sana.config import ConfigError, load_config
from sana.data import cache
from sana.data.cache import FeatureCache
from sana.data.quarantine import TooManyBadSamples
from sana.models.autoencoder import Autoencoder
from sana.models.text_encoder import TextEncoder
from sana.training import extraction, feature_cache
from sana.training.feature_cache import extract
from sana.training.features import CachedTextEncoder
from sana.training.tracker import read_history
from tests.factories import write_model
from tests.numerics import assert_close
from tests.ports import free_port
from tests.training import micro
from tests.training.cached import COUNT, config, encoded, files, forbid_encoders, more, write_pictures

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), COUNT)


# What is in it


def test_every_picture_and_every_caption_is_encoded_once(model, pictures, tmp_path, monkeypatch):
    seen = encoded(monkeypatch)
    monkeypatch.setattr(feature_cache, "UNIT", 4)
    summary = extract(config(model, pictures, tmp_path / "features"))
    # Of each picture a caption of its own; three that they share; the prompt of the validation; the null caption.
    assert (seen.count("picture"), seen.count("caption")) == (COUNT, COUNT + 3 + 1)
    assert summary.startswith(f"{tmp_path / 'features'}: {2 * COUNT + 5} features in ")
    found = FeatureCache(tmp_path / "features")
    encoder = TextEncoder.from_pretrained(
        model.parent / "text_encoder",
        max_length=24,
        chi_prompt=load_config(model).text_encoder.chi_prompt,
        dtype=torch.float32,
    )
    text = encoder.encode(["a red circle, 7"])
    assert torch.equal(found.text("a red circle, 7"), text.embeds[0][text.mask[0].bool()].bfloat16())
    null = encoder.encode_unconditional(["", ""])
    assert torch.equal(found.null(), null.embeds[0].bfloat16())
    # In the place of the encoder: the same answers, but for the precision of the store.
    cached = CachedTextEncoder(found, 24, torch.device("cpu"))
    prompts = ["a red circle, 7", "three blue stars and 0 green squares"]
    own, expected = cached.encode(prompts), encoder.encode(prompts)
    assert torch.equal(own.mask, expected.mask) and own.embeds.shape == expected.embeds.shape
    valid = expected.mask.bool()  # what an encoder says of padding beside a longer text is not kept
    assert_close("embeds", own.embeds[valid], expected.embeds[valid], rel_rms=4e-3)
    own = cached.encode_unconditional(["", ""])
    assert torch.equal(own.mask, null.mask)
    assert_close("null", own.embeds, null.embeds, rel_rms=4e-3)
    assert cached.hidden_size == encoder.hidden_size
    with pytest.raises(ValueError, match="the cache holds no negative prompts, got 'blurry'"):
        cached.encode_unconditional(["", "blurry"])
    assert found.latent("data", 0).dtype == torch.float16


def losses(model, work_dir, settings):
    micro.trainer(model, work_dir, *settings).train()
    rows = read_history(work_dir / "history.jsonl")
    return [row["loss"] for row in rows], [row["samples"] for row in rows]


@pytest.mark.parametrize("stored, tolerance", [("float32", 1e-5), (None, 2e-3)])
def test_training_is_as_without_the_cache(model, pictures, tmp_path, stored, tolerance):
    """Measured: 4e-7 in float32; 2e-4 with float16 latents and bfloat16 texts."""
    features = tmp_path / "features"
    if stored:
        extract(config(model, pictures, features), dtype=stored)
    plain = losses(model, tmp_path / "plain", more(pictures, None))
    with_cache = losses(
        model, tmp_path / "cached", more(pictures, features)
    )  # without `stored`, makes it first
    assert with_cache[1] == plain[1], "another order of samples"
    assert with_cache[0] == pytest.approx(plain[0], rel=tolerance)
    again = losses(model, tmp_path / "again", more(pictures, features, "--train.num_workers=1"))
    assert again == with_cache


def test_a_complete_cache_needs_no_encoder(model, tmp_path, monkeypatch):
    """Null caption, captions, latents and held-out loss, all from the cache; not even where the encoders are is asked."""
    pictures, features = write_pictures(tmp_path, 100), tmp_path / "features"
    settings = more(pictures, features, "--train.heldout_samples=1", "--train.eval_sampling_steps=3")
    plain = micro.trainer(model, tmp_path / "plain", *more(pictures, None, *settings[-2:]))
    extract(config(model, pictures, features), dtype="float32")
    forbid_encoders(monkeypatch)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text("{}")  # of a download that was not finished
    gone = (f"--vae.vae_pretrained={tmp_path / 'part'}", "--text_encoder.text_encoder_name=no/where")
    run = micro.trainer(model, tmp_path / "run", *settings, *gone)
    assert run.autoencoder is None
    null = run.transformer.y_embedder.y_embedding
    assert torch.equal(null, plain.transformer.y_embedder.y_embedding)
    values, expected = run.held_out_loss(run.transformer), plain.held_out_loss(plain.transformer)
    assert values == pytest.approx(expected, rel=1e-5)
    assert run.train() and len(read_history(tmp_path / "run" / "history.jsonl")) == 6


def test_validation_pictures_need_the_autoencoder_alone(model, pictures, tmp_path, monkeypatch, caplog):
    extract(config(model, pictures, tmp_path / "features"))
    forbid_encoders(monkeypatch, TextEncoder)
    draw = ("--train.visualize=true", "--train.eval_sampling_steps=6", "--train.local_save_vis=true")
    assert micro.trainer(model, tmp_path / "run", *more(pictures, tmp_path / "features", *draw)).train()
    assert (
        tmp_path / "run" / "log_vis" / "vis_6.png"
    ).is_file() and "no validation images" not in caplog.text


def test_captions_that_are_new_in_each_epoch_are_not_kept(model, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        run = micro.trainer(model, tmp_path / "run", f"--train.feature_cache_dir={tmp_path / 'features'}")
    assert "captions are new in each epoch" in caplog.text
    assert run.autoencoder is None and isinstance(run.text_encoder, TextEncoder)
    assert not FeatureCache(tmp_path / "features").has_texts
    # Other scenes, also those that are held out, join the cache.
    seen = encoded(monkeypatch)
    more_scenes = ("--data.num_scenes=12", "--train.heldout_samples=2")
    micro.trainer(model, tmp_path / "run", f"--train.feature_cache_dir={tmp_path / 'features'}", *more_scenes)
    assert seen.count("picture") == 4
    assert len(FeatureCache(tmp_path / "features").pictures()) == 3


# Several processes, and kills


def work(model, pictures, features, moment=None):
    """`extract` in a process of its own, in units of 3; at some moment, a file's end, it is killed."""
    torch.set_num_threads(1)
    feature_cache.UNIT = 3
    write, calls = cache.write_atomic, []

    def trapped(path, content):
        calls.append(path)
        if len(calls) == moment:
            os.kill(os.getpid(), 9)
        return write(path, content)

    cache.write_atomic = trapped
    extract(config(model, pictures, features))


def work_shared(environment, *arguments):
    os.environ.update(environment)
    work(*arguments)


@pytest.fixture(scope="module")
def whole(model, pictures, tmp_path_factory) -> dict[str, bytes]:
    """The files of a cache that one process made undisturbed."""
    features = tmp_path_factory.mktemp("whole") / "features"
    process = micro.SPAWN.Process(target=work, args=(model, pictures, features))
    process.start()
    assert micro.finish([process]) == [0]
    return files(features)


def test_two_processes_make_the_same_files(model, pictures, whole, tmp_path):
    port = str(free_port())
    # accelerate gives each process its share of the threads, and more than one add up in another order.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(2):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (environment, model, pictures, tmp_path / "features")
        processes.append(micro.SPAWN.Process(target=work_shared, args=arguments))
        processes[-1].start()
    assert micro.finish(processes) == [0, 0]
    assert files(tmp_path / "features") == whole


def test_a_kill_costs_the_unit_in_work_alone(model, pictures, whole, tmp_path):
    """Killed at the 4th, 5th, ... write of a file; what is whole is never written again."""
    features, before = tmp_path / "features", {}
    for moment in (4, 4, 5):
        process = micro.SPAWN.Process(target=work, args=(model, pictures, features, moment))
        process.start()
        assert micro.finish([process]) == [-9]
        now = {path: path.stat().st_mtime_ns for path in features.rglob("*.safetensors")}
        assert before.items() <= now.items() and len(now) > len(before)
        before = now
    process = micro.SPAWN.Process(target=work, args=(model, pictures, features))
    process.start()
    assert micro.finish([process]) == [0]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items()
    assert files(features) == whole and not list(features.rglob("*.tmp"))


# What cannot be read


def test_a_picture_that_cannot_be_read_is_named_and_replaced(model, pictures, tmp_path, caplog):
    own, features = shutil.copytree(pictures, tmp_path / "pictures"), tmp_path / "features"
    (own / "0004.png").write_bytes(b"no picture")
    wanted = config(model, own, features)
    extract(wanted)
    assert f"left out {own / '0004.png'}: cannot read the picture" in caplog.text
    named = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert len(named) == 1 and "0004.png" in named[0]
    stream = micro.Trainer(wanted)._batches()
    replaced = {}
    for _ in range(3):
        replaced |= next(stream).replaced
    assert replaced == {4: 5}
    (own / "0005.png").write_bytes(b"no picture")
    with pytest.raises(TooManyBadSamples, match="2 samples cannot be read, more than the 1"):
        extract(wanted, renew=True)


def test_a_latent_that_is_not_finite_is_a_bad_sample(model, pictures, tmp_path, monkeypatch, caplog):
    encode = Autoencoder.encode

    def spoiled(self, images):
        latents = encode(self, images)
        latents[2, 0, 0, 0] = 1e6  # no float16
        return latents

    monkeypatch.setattr(Autoencoder, "encode", spoiled)
    extract(config(model, pictures, tmp_path / "features"))
    assert f"left out {pictures / '0002.png'}: its latent is not finite" in caplog.text
    with pytest.raises(ValueError, match="has no latent"):
        FeatureCache(tmp_path / "features").latent("data", 2)


def test_a_broken_file_of_the_cache_is_named_and_mended(model, pictures, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(feature_cache, "UNIT", 1)
    features = tmp_path / "features"
    wanted = config(model, pictures, features)
    extract(wanted)
    broken = cache.chunk_files(features, cache.LATENTS)[0]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-1])
    run = micro.Trainer(wanted)  # one of ten may be bad
    assert (
        f"{broken} is broken: its features are missing; scripts/extract_features.py mends it" in caplog.text
    )
    stream = run._batches()
    batches = [next(stream) for _ in range(3)]
    assert sum(len(batch.replaced) for batch in batches) == 1
    assert f"the cache file {broken} cannot be read" in caplog.text
    assert broken.read_bytes() == whole[:-1], "never replaced in silence"
    seen = encoded(monkeypatch)
    extract(wanted)
    assert seen == ["picture"] and broken.read_bytes() == whole
    assert f"{broken} cannot be read" in caplog.text and "its features are made anew" in caplog.text
    (features / cache.INDEX).write_bytes(b"broken")
    with pytest.raises(
        ValueError, match="index.safetensors cannot be read.*extract_features.py makes it anew"
    ):
        micro.Trainer(wanted)
    extract(wanted)
    assert seen == ["picture"] and FeatureCache(features).broken() == []


def test_a_folder_must_be_named(model, pictures, tmp_path):
    with pytest.raises(ConfigError, match="train.feature_cache_dir: name the folder"):
        extract(micro.config(model, tmp_path, *more(pictures, None)))


def test_a_large_unit_is_written_in_parts(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "_CHUNK_BYTES", 1000)  # a latent has 256
    extract(config(model, pictures, tmp_path / "features"))
    assert len(cache.chunk_files(tmp_path / "features", cache.LATENTS)) == 3
    found = FeatureCache(tmp_path / "features")
    assert all(found.latent("data", index).shape == (32, 2, 2) for index in range(COUNT))


@pytest.mark.slow
def test_the_real_commands(model, pictures, tmp_path):
    """Two processes extract; train.py with caching finds all there; a broken cache is one line and status 2."""
    keys = [key for key in micro.settings(model, tmp_path / "run") if not key.startswith("--model.model")]
    keys = [f"--config_path={model}", *keys, *more(pictures, tmp_path / "features")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def ran(*command: str) -> subprocess.CompletedProcess:
        full = [sys.executable, *command, *keys]
        return subprocess.run(full, cwd=ROOT, capture_output=True, text=True, env=environment)

    shared = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    result = ran(*shared, "scripts/extract_features.py")
    assert result.returncode == 0, result.stderr[-2000:]
    line = f"{tmp_path / 'features'}: {2 * COUNT + 5} features in "
    assert result.stdout.startswith(line) and len(result.stdout.splitlines()) == 1
    again = ran("train_scripts/train.py", "--caching=true")
    assert again.returncode == 0 and again.stdout == result.stdout and not (tmp_path / "run").exists()
    stale = ran("train_scripts/train.py", "--text_encoder.model_max_length=20")
    assert stale.returncode == 2 and "model_max_length 24 -> 20" in stale.stderr.splitlines()[-1]
