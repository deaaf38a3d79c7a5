"""The trainer on a small random model: the step is the paper's, a stop changes nothing, learning happens."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sana.config import ConfigError, load_config
from sana.diffusion import flow
from sana.models.state_dict import load_transformer_state
from sana.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from sana.training.ema import EMA
from sana.training.optim import build_optimizer, lr_factor, scaled_lr
from sana.training.trainer import Trainer
from tests.factories import write_model
from tests.numerics import assert_close

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def settings(model: Path, work_dir: Path, *more: str) -> list[str]:
    return [
        f"--work_dir={work_dir}",
        "--data.type=SanaShapes",
        "--data.num_scenes=12",
        "--model.multi_scale=false",
        "--model.mixed_precision=fp32",
        "--model.load_from=",
        "--model.image_size=64",
        "--model.aspect_ratio_type=",
        f"--train.feature_cache_dir={model.parent / 'features'}",
        "--train.train_batch_size=4",
        "--train.num_workers=0",
        "--train.auto_lr=",
        "--train.lr_schedule_args.num_warmup_steps=2",
        "--train.log_interval=2",
        "--train.ema_update=true",
        "--train.ema_rate=0.9",
        "--train.max_steps=6",
        *more,
    ]


def trainer(model: Path, work_dir: Path, *more: str, resume: str | None = None) -> Trainer:
    return Trainer(load_config(model, settings(model, work_dir, *more)), resume)


def weights(work_dir: Path, step: int = 6, key: str = "state_dict") -> dict[str, torch.Tensor]:
    return load_checkpoint(next((work_dir / "checkpoints").glob(f"epoch_*_step_{step}.pth")))[key]


def test_the_step_is_the_paper_s(model, tmp_path):
    """Loss of one step, from the trainer's own draws, by the equations of flow matching."""
    run = trainer(model, tmp_path, "--model.class_dropout_prob=0.5", "--scheduler.flow_shift=3.0")
    batch = next(run._batches())
    latents, text = run.encode(batch)
    t, noise, drop = run._draws(batch, latents)
    assert 0 < drop.sum() < len(drop) or len(drop) == 4  # drawn, not fixed
    embeds = text.embeds.clone()
    embeds[drop] = run.model.y_embedder.y_embedding[: embeds.shape[1]]
    x_t = (1 - t).view(-1, 1, 1, 1).float() * latents + t.view(-1, 1, 1, 1).float() * noise
    run.model.eval()
    with torch.no_grad():
        prediction = run.model(x_t, torch.trunc(1000 * t).float(), embeds, text.mask)
    expected = (prediction - (noise - latents)).square().mean()
    run.model.train()
    stats = run.train_step([batch])
    assert stats.loss == pytest.approx(expected.item(), rel=1e-5)
    assert stats.grad_norm > 0 and run.step == 1


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(model, tmp_path):
    run = trainer(model, tmp_path)
    batch = next(run._batches())
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    batch.pixels[0] = float("nan")
    with pytest.raises(FloatingPointError, match="gradient norm nan at step 0: the step was not taken"):
        run.train_step([batch])
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_times_follow_density_and_shift(model, tmp_path):
    run = trainer(model, tmp_path, "--scheduler.flow_shift=4.0", "--scheduler.logit_std=0.5")
    latents = torch.zeros(1, 32, 2, 2)
    batch = next(run._batches())
    times = []
    for sample in range(400):
        object.__setattr__(batch, "samples", [(0, sample)])
        times.append(run._draws(batch, latents)[0].item())
    logits = sorted(math.log(t / (4 - 3 * t) / (1 - t / (4 - 3 * t))) for t in times)  # unshifted
    assert abs(logits[200]) < 0.1
    assert (logits[336] - logits[64]) / 2 == pytest.approx(0.5, rel=0.15)  # 16 % and 84 % quantiles


def test_null_caption_is_the_text_encoder_s(model, tmp_path):
    run = trainer(model, tmp_path)
    expected = run.text_encoder.encode_unconditional([""]).embeds[0]
    assert torch.equal(run.model.y_embedder.y_embedding, expected)


def test_a_stopped_run_goes_on_bit_for_bit(model, tmp_path):
    trainer(model, tmp_path / "whole").train()
    first = trainer(model, tmp_path / "parts", "--train.save_model_steps=3")
    stream = first._batches()
    for _ in range(3):
        first.train_step([next(stream)])
    first.save()
    trainer(model, tmp_path / "parts", resume="latest").train()
    for key in ("state_dict", "state_dict_ema"):
        whole, parts = weights(tmp_path / "whole", key=key), weights(tmp_path / "parts", key=key)
        assert whole.keys() == parts.keys()
        for name in whole:
            assert torch.equal(whole[name], parts[name]), name


# Adam divides by the gradient's size, so that rounding decides the sign of a step where the gradient is about zero.
SGD = "--train.optimizer={type: SGD, lr: 0.05}"


def test_accumulation_is_a_larger_batch(model, tmp_path):
    trainer(model, tmp_path / "one", "--train.max_steps=2", SGD).train()
    more = (SGD, "--train.max_steps=2", "--train.train_batch_size=2", "--train.gradient_accumulation_steps=2")
    trainer(model, tmp_path / "two", *more).train()
    one, two = weights(tmp_path / "one", 2), weights(tmp_path / "two", 2)
    for name in one:
        assert_close(name, two[name], one[name], rel_rms=1e-5)


def test_loss_falls_and_the_export_is_the_average(model, tmp_path):
    run = trainer(model, tmp_path, "--train.max_steps=40", "--train.optimizer.lr=2e-3")
    stream = run._batches()
    losses = [run.train_step([next(stream)]).loss for _ in range(40)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    run.export(tmp_path / "transformer.safetensors")
    exported = load_transformer_state(tmp_path / "transformer.safetensors")
    average, trained = run.ema.model.state_dict(), run.model.state_dict()
    assert exported.keys() == average.keys()
    assert all(torch.equal(exported[name], average[name].half()) for name in average)
    assert any(not torch.equal(exported[name], trained[name].half()) for name in average)
    with safe_open(tmp_path / "transformer.safetensors", "pt") as stored:
        assert stored.metadata()["architecture"] == "SanaMS_Tiny_P1_D8"


def test_starts_from_weights(model, tmp_path):
    run = trainer(model, tmp_path, f"--model.load_from={model.parent / 'transformer.safetensors'}")
    given = load_transformer_state(model.parent / "transformer.safetensors")
    own = run.model.state_dict()
    assert all(torch.equal(own[name], given[name]) for name in given if name != "y_embedder.y_embedding")


def test_validation_images_are_drawn_and_the_mode_is_kept(model, tmp_path):
    more = (
        "--train.visualize=true",
        "--train.eval_sampling_steps=1",
        "--train.max_steps=1",
        "--train.local_save_vis=true",
    )
    run = trainer(
        model, tmp_path, *more, "--train.validation_prompts=[a red circle, b]", "--model.image_size=64"
    )
    run.train()
    assert (tmp_path / "log_vis" / "vis_1.png").is_file()
    assert run.model.training
    assert list((tmp_path / "logs").glob("events*")) and (tmp_path / "config.yaml").is_file()


def test_one_process_or_two_train_alike(model, tmp_path):
    """Two gloo processes with half the batch each: the same losses, the same weights."""
    trainer(model, tmp_path / "one", "--train.max_steps=3", SGD).train()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29431",
        "train_scripts/train.py", f"--config_path={model}",
        *settings(model, tmp_path / "two", "--train.max_steps=3", "--train.train_batch_size=2", SGD),
    ]  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=_environment()
    )
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = weights(tmp_path / "one", 3), weights(tmp_path / "two", 3)
    for name in one:
        assert_close(name, two[name], one[name], rel_rms=1e-5)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_average_follows_the_weights():
    linear = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(linear.weight, 0.0)
    ema = EMA(linear, rate=0.5)
    torch.nn.init.constant_(linear.weight, 1.0)
    expected = 0.0
    for update in range(12):
        ema.update(linear)
        rate = min(0.5, (1 + update) / (10 + update))
        expected = rate * expected + 1 - rate
    assert ema.model.weight.item() == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        EMA(linear, rate=1)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", {0: 0.1, 9: 1.0, 50: 1.0, 100: 1.0}),
        ("cosine", {0: 0.1, 9: 1.0, 55: 0.5, 100: 0.0}),
        ("cosine_decay_to_constant", {9: 1.0, 100: 0.1}),
    ],
)
def test_schedules(model, schedule, expected):
    config = load_config(
        model, [f"--train.lr_schedule={schedule}", "--train.lr_schedule_args.num_warmup_steps=10"]
    )
    factor = lr_factor(config.train, 100)
    for step, value in expected.items():
        assert factor(step) == pytest.approx(value, abs=1e-6), step


def test_rate_follows_the_batch(model):
    train = load_config(model).train
    assert scaled_lr(1e-4, train, 512) == pytest.approx(1e-4 * 2**0.5)  # sqrt is the published default
    assert scaled_lr(1e-4, load_config(model, ["--train.auto_lr.rule=linear"]).train, 512) == pytest.approx(
        2e-4
    )
    assert scaled_lr(1e-4, load_config(model, ["--train.auto_lr="]).train, 512) == 1e-4


def test_unavailable_optimizers_are_named(model):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    train = load_config(model, ["--train.optimizer={type: CAMEWrapper, lr: 1e-4}"]).train
    with pytest.raises(ConfigError, match="CAMEWrapper is not available; one of AdamW"):
        build_optimizer(parameters, train, 1)


def test_sprint_training_is_refused_before_anything_is_loaded():
    folder = Path(__file__).parents[2] / "configs/sana_sprint_config/1024ms"
    config = load_config(folder / "SanaSprint_600M_1024px_allqknorm_bf16_scm_ladd.yaml")
    with pytest.raises(ConfigError, match="the training of Sprint .* is not available here"):
        Trainer(config)


def test_latest_is_the_newest_whole_checkpoint(tmp_path):
    state = {"state_dict": {}, "optimizer": {}, "scheduler": {}, "step": 9}
    assert find_checkpoint("latest", tmp_path) is None
    save_checkpoint(tmp_path, state, 2, 9)
    save_checkpoint(tmp_path, state | {"step": 10}, 10, 10)
    assert load_checkpoint(find_checkpoint("latest", tmp_path))["step"] == 10
    (tmp_path / "latest.pth").unlink()
    assert find_checkpoint("latest", tmp_path).name == "epoch_10_step_10.pth"
    with pytest.raises(ValueError, match="no such checkpoint to resume from: nowhere.pth"):
        find_checkpoint("nowhere.pth", tmp_path)


def test_broken_checkpoints_are_one_clear_error(tmp_path):
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 not much")
    with pytest.raises(ValueError, match="cannot read the checkpoint .*half.pth"):
        load_checkpoint(tmp_path / "half.pth")
    torch.save({"state_dict": {}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="it lacks optimizer, scheduler, step; use model.load_from"):
        load_checkpoint(tmp_path / "weights.pth")


def test_network_sees_the_published_time(model, tmp_path, monkeypatch):
    """Whole numbers up to 1000, as float32: what published weights saw."""
    run = trainer(model, tmp_path)
    seen = []
    run.model.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    run.train_step([next(run._batches())])
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], seen[0].round()) and seen[0].max() <= 999
    assert flow.network_time(torch.tensor([0.25])).item() == 250
