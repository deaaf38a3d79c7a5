"""The plan of a run: counts that are published, states of real optimizers, and nothing that has to be there."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sana.config import load_config
from sana.models.zoo import TRANSFORMERS
from sana.resolution import TABLES
from sana.runtime.memory import GIB, Component
from sana.training import plan as plan_module
from sana.training.features import encode_pictures
from sana.training.optim import build_optimizer
from sana.training.plan import Plan, plan
from tests.factories import write_model
from tests.training import micro

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs/sana_config"
# The two commands of the reference's README.
COMMANDS = {
    "600M": ("512ms/Sana_600M_img512.yaml", 32),
    "1600M": ("1024ms/Sana_1600M_img1024.yaml", 8),
}
SHALLOW = "SanaMS_Shallow_P1_D1"  # of Sana-tiny's width, 224


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    monkeypatch.setitem(TRANSFORMERS, SHALLOW, replace(TRANSFORMERS["SanaMS_Tiny_P1_D8"], depth=1))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def of_command(name: str, work_dir: Path, *words: str, processes: int = 1) -> Plan:
    config, batch = COMMANDS[name]
    given = [
        *(
            '--data.data_dir=["asset/example_data"]',
            "--data.type=SanaImgDataset",
            "--model.multi_scale=false",
        ),
        *(f"--train.train_batch_size={batch}", f"--work_dir={work_dir}"),
    ]
    return plan(load_config(CONFIGS / config, [*given, *words]), processes)


def line(found: Plan, name: str) -> Component:
    return next(part for part in [*found.kept, *found.passing] if part.name.strip().startswith(name))


def test_the_first_published_command(tmp_path):
    found = of_command("600M", tmp_path)
    assert line(found, "transformer").parameters == 591_747_872
    assert line(found, "transformer").bytes == 4 * 591_747_872
    assert line(found, "autoencoder").parameters == 312_250_275
    assert line(found, "text encoder").parameters == 2_614_341_888
    assert line(found, "text encoder").bytes == 2 * 2_614_341_888
    gradients = line(found, "gradients").bytes
    assert gradients == 4 * 591_747_872
    computing, saved = line(found, "forward and backward"), line(found, "kept for the backward")
    assert gradients < computing.bytes < gradients + saved.bytes  # what is saved dies as gradients come
    # Recomputed blocks keep their inputs: 28 of (32, 256, 1152) in float32.
    assert 28 * 32 * 256 * 1152 * 4 < saved.bytes < 1.4 * 28 * 32 * 256 * 1152 * 4
    assert float(computing.note.split()[-1]) * GIB > 6 * computing.bytes
    kept = sum(part.bytes for part in found.kept)
    assert found.peak == kept + max(part.bytes for part in found.passing)
    assert "10 pictures in steps of 32: 1 an epoch, 100 in all" in str(found)
    assert re.search(r"^  transformer, float32 +591,747,872 +2\.20$", str(found), re.MULTILINE)


@pytest.mark.slow
def test_the_second_published_command(tmp_path):
    """As its user plans it, in a process of its own: after torch.compile has run in a process, the device "meta" leaks there."""
    config, batch = COMMANDS["1600M"]
    words = [
        "--data.data_dir=[asset/example_data]",
        "--data.type=SanaImgDataset",
        "--model.multi_scale=false",
    ]
    words += [f"--train.train_batch_size={batch}", f"--work_dir={tmp_path}"]
    command = [
        sys.executable,
        "train_scripts/train.py",
        f"--config_path={CONFIGS / config}",
        "--plan=1",
        *words,
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "1,604,462,752" in result.stdout
    assert "10 pictures in steps of 8: 2 an epoch, 200 in all" in result.stdout


def small(model: Path, work_dir: Path, *words: str, processes: int = 1) -> Plan:
    return plan(micro.config(model, work_dir, f"--model.model={SHALLOW}", *words), processes)


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "CAMEWrapper", "CAME8BitWrapper", "Muon"])
def test_the_state_is_that_of_a_real_optimizer(model, tmp_path, kind):
    lists = "betas: [0.9, 0.999, 0.9999], eps: [1e-30, 1e-16], " if kind.startswith("CAME") else ""
    momentum = "momentum: 0.9, " if kind == "SGD" else ""
    word = f"--train.optimizer={{type: {kind}, {lists}{momentum}lr: 1e-3}}"
    found = small(model, tmp_path, word)
    config = micro.config(model, tmp_path, f"--model.model={SHALLOW}", word)
    network = plan_module.build_transformer(config.model.model, **plan_module.transformer_overrides(config))
    optimizer = build_optimizer(network, config.train, 1)
    for value in network.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    tensors = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    real = sum(value.nbytes for value in tensors if value.ndim)
    assert line(found, f"state of {kind}").bytes == pytest.approx(real, rel=1e-3)


def test_eight_bits_take_a_quarter(model, tmp_path):
    full = line(small(model, tmp_path), "state of AdamW").bytes
    eight = line(
        small(model, tmp_path, "--train.optimizer={type: AdamW8bit, lr: 1e-3}"), "state of AdamW8bit"
    )
    assert 0.25 < eight.bytes / full < 0.28


def test_shards_and_copies(model, tmp_path):
    one, four = small(model, tmp_path), small(model, tmp_path, processes=4)
    assert line(four, "gradients in DDP").bytes == line(one, "gradients").bytes
    shards = small(model, tmp_path, "--train.use_fsdp=true", processes=4)
    for name in ("transformer", "its average", "state of AdamW", "gradients"):
        assert line(shards, name).bytes == pytest.approx(line(one, name).bytes / 4, rel=0.02), name
        assert line(shards, name).parameters == line(one, name).parameters
    gathered = line(shards, "gathered blocks").bytes
    assert gathered > 4 * line(one, "transformer").bytes / 8
    assert line(shards, "forward and backward").bytes > gathered + line(shards, "gradients").bytes


def test_accumulation_keeps_gradients(model, tmp_path):
    one, two = (
        small(model, tmp_path, f"--train.gradient_accumulation_steps={n}", "--train.train_batch_size=8")
        for n in (1, 2)
    )
    assert line(two, "kept for the backward").bytes == line(one, "kept for the backward").bytes
    assert line(two, "forward and backward").bytes > line(one, "forward and backward").bytes
    assert line(small(model, tmp_path, "--train.ema_update=false"), "its average").bytes == 0


def test_a_lora_trains_little(model, tmp_path):
    whole = small(model, tmp_path)
    lora = small(model, tmp_path, "--train.lora.rank=8", "--model.load_from=nowhere.safetensors")
    width, rank = 224, 8
    expected = rank * ((width + 3 * width) + 3 * (width + width) + (width + 2 * width))
    assert line(lora, "gradients").parameters == expected
    assert line(lora, "transformer").note == f"{expected:,} of them a LoRA"
    assert line(lora, "gradients").bytes == line(lora, "its average").bytes == 4 * expected
    assert line(lora, "state of AdamW").bytes == pytest.approx(8 * expected, rel=1e-3)
    assert line(lora, "transformer").parameters == line(whole, "transformer").parameters + expected


def test_caches_spare_both_encoders(model, tmp_path):
    folder = ("--data.type=SanaImgDataset", "--data.data_dir=[nowhere]")  # micro's runs have a cache
    shown = small(model, tmp_path, *folder, "--train.visualize=true")
    drawn = small(model, tmp_path)  # captions that are new in each epoch
    online = small(model, tmp_path, "--train.feature_cache_dir=")

    def loaded(found: Plan) -> list[str]:
        return [part.name.split(",")[0] for part in found.kept if "encoder" in part.name]

    assert loaded(small(model, tmp_path, *folder)) == []
    assert loaded(shown) == ["autoencoder"] and loaded(drawn) == ["text encoder"]
    assert loaded(online) == ["text encoder", "autoencoder"]
    assert "pictures to latents" not in str(shown)
    assert line(online, "autoencoder").bytes and line(online, "text encoder").bytes
    assert line(online, "pictures to latents").bytes and line(online, "captions to features").bytes


def test_no_bucket_has_more_pixels_than_the_square():
    """So the square is planned."""
    for name, sizes in TABLES.items():
        assert max(height * width for height, width in sizes.values()) <= int(name.split("_")[2]) ** 2, name


def test_what_is_not_here_is_said(model, tmp_path):
    words = (
        "--train.feature_cache_dir=",
        "--vae.vae_pretrained=some/where",
        "--text_encoder.text_encoder_name=gemma-2b",
    )
    found = str(small(model, tmp_path, *words, "--data.type=SanaImgDataset", "--data.data_dir=[nowhere]"))
    assert "Not known here and left out: text encoder gemma-2b, autoencoder some/where." in found
    assert "Steps of 4 pictures; how many an epoch has is not known: " in found


def test_the_command_needs_neither_weights_nor_data(tmp_path):
    config = "configs/sana_config/tiny/Sana_tiny_img256.yaml"
    more = ["--model.load_from=nowhere.pth", "--data.type=SanaWebDatasetMS", f"--work_dir={tmp_path}"]
    command = ["bash", "train_scripts/train.sh", config, "--plan", "--np=2", *more]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "on each of 2 GPUs" in result.stdout and "GiB on each GPU" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_encoded_a_few_at_a_time():
    """Whole batches would take most of a GPU."""
    seen = []

    class Encoder:
        def encode(self, pixels):
            seen.append(len(pixels))
            return pixels.mean(dim=1)

    pixels = torch.rand(5, 3, 512, 2048)
    latents = encode_pictures(Encoder(), pixels)
    assert torch.equal(latents, pixels.mean(dim=1)) and seen == [2, 2, 1]
    seen.clear()
    encode_pictures(Encoder(), torch.empty(2, 3, 2048, 2048))
    assert seen == [1, 1]
