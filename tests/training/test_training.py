"""The trainer on a very small random model: the step is the paper's, learning happens, what goes wrong stays outside."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sana.config import ConfigError, load_config
from sana.diffusion import flow
from sana.models.state_dict import load_transformer_state
from sana.training import trainer as trainer_module
from sana.training.checkpoint import find_checkpoint, read_checkpoint
from sana.training.ema import EMA
from sana.training.tracker import read_history
from sana.training.trainer import Trainer
from tests.factories import write_model
from tests.numerics import assert_close
from tests.training.micro import trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def newest(work_dir: Path):
    return read_checkpoint(find_checkpoint("latest", work_dir / "checkpoints"))


def test_the_step_is_the_paper_s(model, tmp_path):
    """Loss of one step, from the trainer's own draws, by the equations of flow matching."""
    run = trainer(model, tmp_path, "--model.class_dropout_prob=0.5", "--scheduler.flow_shift=3.0")
    batch = next(run._batches())
    latents, text = run.encode(batch)
    t, noise, drop = run._draws(batch, latents)
    assert 0 < drop.sum() < len(drop)  # drawn, not fixed
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


def test_network_sees_the_published_time(model, tmp_path):
    """Whole numbers up to 1000, as float32: what published weights saw."""
    run = trainer(model, tmp_path)
    seen = []
    run.model.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    run.train_step([next(run._batches())])
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], seen[0].round()) and seen[0].max() <= 999
    assert flow.network_time(torch.tensor([0.25])).item() == 250


def test_null_caption_is_the_text_encoder_s(model, tmp_path):
    run = trainer(model, tmp_path)
    expected = run.text_encoder.encode_unconditional([""]).embeds[0]
    assert torch.equal(run.model.y_embedder.y_embedding, expected)


# Adam divides by the gradient's size, so that rounding decides the sign of a step where the gradient is about zero.
SGD = "--train.optimizer={type: SGD, lr: 0.005}"


def test_accumulation_is_a_larger_batch(model, tmp_path):
    trainer(model, tmp_path / "one", "--train.max_steps=2", SGD).train()
    more = (SGD, "--train.max_steps=2", "--train.train_batch_size=2", "--train.gradient_accumulation_steps=2")
    trainer(model, tmp_path / "two", *more).train()
    one, two = newest(tmp_path / "one").weights, newest(tmp_path / "two").weights
    for name in one:
        assert_close(name, two[name], one[name], rel_rms=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("how", ["checkpointing", pytest.param("compiling", marks=pytest.mark.slow)])
def test_recomputing_or_compiling_changes_no_loss(model, tmp_path, how):
    key = {"checkpointing": "grad_checkpointing", "compiling": "compile"}[how]
    losses = []
    for value in ("false", "true"):
        run = trainer(model, tmp_path / value, f"--train.{key}={value}")
        stream = run._batches()
        losses.append([run.train_step([next(stream)]).loss for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_loss_falls_and_the_export_is_the_average(model, tmp_path):
    run = trainer(model, tmp_path, "--train.max_steps=60", "--train.optimizer.lr=5e-3")
    stream = run._batches()
    losses = [run.train_step([next(stream)]).loss for _ in range(60)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    run.export(tmp_path / "transformer.safetensors")
    exported = load_transformer_state(tmp_path / "transformer.safetensors")
    average, trained = run.ema.model.state_dict(), run.model.state_dict()
    assert exported.keys() == average.keys()
    assert all(torch.equal(exported[name], average[name].half()) for name in average)
    assert any(not torch.equal(exported[name], trained[name].half()) for name in average)
    with safe_open(tmp_path / "transformer.safetensors", "pt") as stored:
        assert stored.metadata()["architecture"] == run.config.model.model


def test_starts_from_weights(model, tmp_path):
    more = (
        "--model.model=SanaMS_Tiny_P1_D8",
        f"--model.load_from={model.parent / 'transformer.safetensors'}",
    )
    run = trainer(model, tmp_path, *more)
    given, own = load_transformer_state(model.parent / "transformer.safetensors"), run.model.state_dict()
    assert all(torch.equal(own[name], given[name]) for name in given)


def test_the_next_stage_takes_the_optimizer_and_the_schedule(model, tmp_path):
    """512 -> 1024: another run, from a training checkpoint of the one before."""
    trainer(model, tmp_path / "first").train()
    source = find_checkpoint("latest", tmp_path / "first" / "checkpoints")
    more = (
        f"--model.load_from={source}",
        "--model.image_size=128",
        "--train.lr_schedule_args.num_warmup_steps=12",
    )
    second = trainer(
        model,
        tmp_path / "second",
        *more,
        "--train.load_from_optimizer=true",
        "--train.load_from_lr_scheduler=true",
    )
    before = read_checkpoint(source)
    assert second.step == 0
    assert all(torch.equal(value, before.weights[name]) for name, value in second.model.state_dict().items())
    parameters = dict(second.transformer.named_parameters())
    for name, fields in before.optimizer.items():
        mine = second.optimizer.state[parameters[name]]
        assert mine.keys() == fields.keys() and all(
            torch.equal(mine[field], fields[field]) for field in fields
        )
    assert second.schedule.set(0) == pytest.approx(1e-3 * 7 / 12)  # the 7th step of the warm-up
    plain = trainer(model, tmp_path / "third", *more)
    assert not plain.optimizer.state and plain.schedule.set(0) == pytest.approx(1e-3 / 12)


def test_a_new_rate_on_the_command_line_counts_when_a_run_goes_on(model, tmp_path):
    trainer(model, tmp_path).train()
    run = trainer(model, tmp_path, "--train.optimizer.lr=1e-5", "--train.max_steps=8", resume="latest")
    stats = run.train_step([next(run._batches())])
    assert run.step == 7 and stats.lr == pytest.approx(1e-5)


def test_another_order_of_samples_is_said(model, tmp_path, caplog):
    trainer(model, tmp_path).train()
    trainer(model, tmp_path, "--data.num_scenes=12", "--train.train_batch_size=2", resume="latest")
    expected = "another order of samples from step 6 on: samples shapes-train-10-64 -> shapes-train-12-64, "
    assert expected + "num_samples 10 -> 12, batch_size 4 -> 2" in caplog.messages[-1]


# A step that is not finite


def spoil(run: Trainer, steps: set[int]) -> None:
    """Put a NaN into the picture of the batch's second place, at these steps."""
    encode = run.encode

    def spoiled(batch):
        latents, text = encode(batch)
        if run.step in steps:
            latents[1, 0, 0, 0] = float("nan")
        return latents, text

    run.encode = spoiled


def test_a_step_that_is_not_finite_is_left_out_and_can_be_replayed(model, tmp_path):
    run = trainer(model, tmp_path)
    spoil(run, {2})
    stream = run._batches()
    for _ in range(2):
        run.train_step([next(stream)])
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    average = {name: value.clone() for name, value in run.ema.model.state_dict().items()}
    batch = next(stream)
    stats = run.train_step([batch])
    assert not stats.finite and run.step == 3
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in run.ema.model.state_dict().items())
    told = json.loads((tmp_path / "logs" / "not_finite" / "step_2.json").read_text())
    assert told["step"] == 2 and told["grad_norm"] == "nan" and len(told["samples"]) == 4
    guilty = told["samples"][1]
    assert guilty["loss"] == "nan" and isinstance(told["samples"][0]["loss"], float)
    assert (guilty["epoch"], guilty["sample"]) == batch.samples[1] and guilty["caption"] == batch.captions[1]
    assert guilty["picture"] == f"scene {guilty['sample']}"
    t = run._draws(batch, torch.zeros(4, 32, 2, 2))[0][1].item()  # the step can be repeated from the row
    assert guilty["t"] == t and guilty["network_time"] == math.trunc(1000 * t)
    assert run.train_step([next(stream)]).finite and run.skipped.in_a_row == 0
    assert any(not torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_too_many_in_a_row_stop_the_run_with_whole_weights(model, tmp_path):
    run = trainer(
        model, tmp_path, "--train.nonfinite_limit=2", "--train.max_steps=9", "--train.save_model_steps=2"
    )
    spoil(run, {2, 4, 5, 6, 7})
    with pytest.raises(
        FloatingPointError, match="3 steps in a row had a loss or gradient that is not finite"
    ):
        run.train()
    assert run.step == 6  # the seventh step was the third in a row
    saved = newest(tmp_path)
    assert saved.step == 6 and all(value.isfinite().all() for value in saved.weights.values())
    assert [row["step"] for row in read_history(tmp_path / "history.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_fp16_overflow_is_the_scaler_s_to_solve(model, tmp_path):
    """With a gradient scaler, an infinite gradient lowers the scale; the weights stay finite and the step is not taken."""
    run = trainer(model, tmp_path)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    run.optimizer.scaler = run.accelerator.scaler
    run.optimizer.__setstate__({})  # has accelerate watch whether the step was skipped
    spoil(run, {0})
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    stream = run._batches()
    run.train_step([next(stream)])
    assert run.accelerator.scaler.get_scale() == 2.0**15 and run.skipped.in_a_row == 1
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    run.train_step([next(stream)])
    assert run.skipped.in_a_row == 0
    assert any(not torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_the_scale_of_fp16_goes_on_where_it_was(model, tmp_path, monkeypatch):
    build = trainer_module.build_accelerator

    def scaling(config):
        accelerator = build(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return accelerator

    monkeypatch.setattr(trainer_module, "build_accelerator", scaling)
    trainer(model, tmp_path, "--train.max_steps=3").train()
    scaler = trainer(model, tmp_path, "--train.max_steps=3", resume="latest").accelerator.scaler
    assert scaler.get_scale() == 16.0 and scaler.state_dict()["_growth_tracker"] == 1


# A full disk


def test_a_full_disk_pauses_the_run(model, tmp_path, monkeypatch, caplog):
    failures = iter([OSError(28, "No space left on device")] * 12)
    write = trainer_module.write_checkpoint

    def full(*arguments):
        for failure in failures:
            raise failure
        return write(*arguments)

    monkeypatch.setattr(trainer_module, "write_checkpoint", full)
    monkeypatch.setattr(Trainer, "RETRY_SECONDS", 0.01)
    assert trainer(model, tmp_path, "--train.max_steps=2").train()
    assert (
        caplog.text.count(
            "cannot save: [Errno 28] No space left on device; the checkpoints before are whole."
        )
        == 2
    )
    assert newest(tmp_path).step == 2


def test_a_paused_run_can_be_stopped(model, tmp_path, monkeypatch):
    run = trainer(model, tmp_path, "--train.max_steps=4", "--train.save_model_steps=2")
    write = trainer_module.write_checkpoint

    def full(folder, state, config):
        if state.step < 4:
            return write(folder, state, config)
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer_module, "write_checkpoint", full)
    assert not run.train()
    assert newest(tmp_path).step < 4 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# Validation


VALIDATE = ("--train.visualize=true", "--train.eval_sampling_steps=1", "--train.max_steps=2")


def test_validation_images_are_drawn_and_the_mode_is_kept(model, tmp_path):
    more = (*VALIDATE, "--train.local_save_vis=true", "--report_to=tensorboard")
    run = trainer(model, tmp_path, *more, "--train.validation_prompts=[a red circle, b]")
    run.train()
    assert (tmp_path / "log_vis" / "vis_1.png").is_file()
    assert run.model.training
    assert list((tmp_path / "logs").glob("events*")) and (tmp_path / "config.yaml").is_file()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), OSError("no disk"), KeyError("what")])
def test_a_failing_validation_changes_nothing(model, tmp_path, caplog, error):
    trainer(model, tmp_path / "plain", "--train.max_steps=2").train()
    run = trainer(model, tmp_path / "run", *VALIDATE, "--train.validation_prompts=[a]")

    def fail(*_):
        raise error

    run.validation._pictures = fail
    assert run.train()
    assert f"no validation images at step 1: {type(error).__name__}: " in caplog.text and run.model.training
    one, two = newest(tmp_path / "plain").weights, newest(tmp_path / "run").weights
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_sprint_training_is_refused_before_anything_is_loaded():
    folder = Path(__file__).parents[2] / "configs/sana_sprint_config/1024ms"
    config = load_config(folder / "SanaSprint_600M_1024px_allqknorm_bf16_scm_ladd.yaml")
    with pytest.raises(ConfigError, match="the training of Sprint .* is not available here"):
        Trainer(config)


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
