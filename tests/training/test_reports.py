"""What a run tells: held-out loss, progress line, utilisation, history and trackers."""

import logging
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sana.diffusion import flow
from sana.models.zoo import TRANSFORMERS
from sana.training.heldout import BINS, Subset, hold_out
from sana.training.progress import Progress, duration, forward_flops, peak_flops
from sana.training.stats import StepStats
from sana.training.tracker import Tracker, read_history
from sana.utils.seeding import generator
from tests.factories import TEXT_WIDTH, make_transformer, write_model
from tests.training import micro
from tests.training.micro import trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


# Held-out loss


def test_held_out_loss_is_the_velocity_loss_at_fixed_times(model, tmp_path):
    run = trainer(model, tmp_path, "--train.heldout_samples=3", "--scheduler.flow_shift=3.0")
    measure, network = run.held_out_loss, run.ema.model
    assert len(measure.latents) == 3
    values = measure(network)
    assert values == measure(network) and list(values)[0] == "heldout_loss" and len(values) == 1 + BINS
    t = flow.training_levels(3.0)[int(4.5 / BINS * 1000)].view(1)
    losses = []
    for index in range(3):
        noise = torch.randn(measure.latents[index].shape, generator=generator("held out", 42, index, 4))[None]
        latents = measure.latents[index][None]
        x_t = (1 - t.float()) * latents + t.float() * noise
        text = measure.texts[index]
        with torch.no_grad():
            prediction = network(x_t, torch.trunc(1000 * t).float(), text.embeds[None], text.mask[None])
        losses.append((prediction - (noise - latents)).square().mean().item())
    assert values[f"heldout_loss/t={t.item():.3f}"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    bins = [value for name, value in values.items() if name != "heldout_loss"]
    assert values["heldout_loss"] == pytest.approx(sum(bins) / BINS, rel=1e-5)


def test_training_goes_on_as_without_it(model, tmp_path):
    losses = {}
    for count in (0, 3):
        more = (f"--train.heldout_samples={count}", "--train.eval_sampling_steps=2")
        trainer(model, tmp_path / str(count), *more).train()
        losses[count] = [row["loss"] for row in read_history(tmp_path / str(count) / "history.jsonl")]
    assert losses[0] == losses[3]


def test_a_failure_of_it_is_one_line(model, tmp_path, caplog):
    run = trainer(model, tmp_path, "--train.heldout_samples=2", "--train.eval_sampling_steps=1")
    for error in (torch.OutOfMemoryError("no room"), KeyError()):
        run.held_out_loss._losses = lambda *_, error=error: (_ for _ in ()).throw(error)
        assert math.isnan(run.held_out_loss(run.transformer)["heldout_loss"])
    assert run.train()
    assert "no held-out loss: OutOfMemoryError: no room" in caplog.text and run.model.training
    assert "no held-out loss: KeyError: KeyError" in caplog.text


def test_pictures_held_out_of_which_none_can_be_read_give_no_number(model, tmp_path):
    run = trainer(model, tmp_path, "--train.heldout_samples=2")
    run.held_out_loss.latents = []
    values = run.held_out_loss(run.transformer)
    assert len(values) == 1 + BINS and all(math.isnan(value) for value in values.values())


class Numbers:
    """150 samples that are their numbers."""

    name, quarantine = "numbers", None

    def __len__(self):
        return 150

    def size(self, index):
        return (index, 2 * index)

    def label(self, index):
        return f"number {index}"

    def image(self, index):
        return torch.tensor(index)

    def captions(self, index):
        return [f"{index}"]

    def caption(self, index, epoch):
        return f"{index} {epoch}"


def test_what_is_held_out_is_not_trained_on(model, tmp_path, caplog):
    config = micro.config(model, tmp_path, "--data.type=SanaImgDataset", "--train.heldout_samples=9")
    kept, held = hold_out(config, Numbers())
    assert (len(kept), len(held)) == (149, 1)  # at most one in a hundred
    numbers = [int(part.image(index)) for part in (kept, held) for index in range(len(part))]
    assert sorted(numbers) == list(range(150))
    assert kept.name != held.name != Numbers.name
    number = int(held.image(0))
    assert held.size(0) == (number, 2 * number) and held.caption(0, 7) == f"{number} 7"
    assert held.label(0) == f"number {number}" and held.captions(0) == [f"{number}"]
    assert hold_out(micro.config(model, tmp_path), Numbers())[1] is None
    with caplog.at_level(logging.INFO):
        few = Subset(Numbers(), [0, 1], "few")
        assert hold_out(config, few) == (few, None)
    assert "2 pictures are too few to hold some out" in caplog.text


# Progress


@pytest.mark.parametrize("tokens, text_tokens", [(64, 20), (16, 7)])
def test_operations_are_those_that_torch_counts(tokens, text_tokens):
    model = make_transformer()
    side = int(tokens**0.5)
    with FlopCounterMode(display=False) as counter:  # with gradients: it does not know oneDNN's operator
        model(torch.zeros(1, 32, side, side), torch.zeros(1), torch.zeros(1, text_tokens, TEXT_WIDTH))
    assert forward_flops(model.config, tokens, text_tokens) == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


def test_published_size():
    """About two operations for each parameter and token: 1.6 B parameters, 1024 tokens."""
    flops = forward_flops(TRANSFORMERS["SanaMS_1600M_P1_D20"], 1024, 300)
    assert flops == pytest.approx(2 * 1.6e9 * 1024, rel=0.15)


def stats(loss: float = 1.0) -> StepStats:
    return StepStats(loss=loss, grad_norm=2.0, lr=1e-4, stopping=False, seen=[])


def test_progress_line():
    progress = Progress(10, 64, "CPU")
    for _ in range(20):
        progress.add(stats(), 0.5, 0.1)
    assert progress.line(2, 100, 1100) == (
        "epoch 2  step 100 / 1100  loss 1.0000  grad_norm 2.000  lr 1.00e-04  128 images/s  data wait 20%  eta 00:08:20"
    )
    progress.add(stats(float("nan")), 0.5, 0.1)
    assert "loss 1.0000" in progress.line(2, 100, 1100)  # a step that was left out is no part of the mean
    progress = Progress(10, 64, "NVIDIA H100 80GB HBM3")
    progress.add(stats(), 0.5, 0.0)
    assert "mfu 0.0%" in progress.line(1, 1, 2)
    assert (peak_flops("NVIDIA H100 PCIe"), peak_flops("NVIDIA A100-SXM4-80GB")) == (756e12, 312e12)
    assert [peak_flops(name) for name in ("Some card", "NVIDIA A10G", "NVIDIA RTX A1000")] == [None] * 3


def test_durations_have_days():
    assert [duration(seconds) for seconds in (0, 59.2, 3661, 90061)] == [
        "00:00:00",
        "00:01:00",
        "01:01:01",
        "1d 01:01:01",
    ]


# Records


def test_history_is_cut_where_a_run_goes_on(model, tmp_path):
    config = micro.config(model, tmp_path)
    tracker = Tracker(config, 0, active=True)
    for step in range(1, 6):
        tracker.step({"loss": 1.0 / step, "samples": "ab"}, step)
    tracker.close()
    with open(tmp_path / "history.jsonl", "a") as handle:
        handle.write('{"step": 6, "lo')  # a kill in the middle of a line
    tracker = Tracker(config, 3, active=True)
    tracker.step({"loss": 9.0}, 4)
    assert [(row["step"], row["loss"]) for row in read_history(tmp_path / "history.jsonl")] == [
        (1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 9.0),
    ]  # fmt: skip


def test_a_full_disk_delays_records(model, tmp_path, monkeypatch, caplog):
    tracker = Tracker(micro.config(model, tmp_path), 0, active=True)
    real = open

    def full(path, *mode, **more):
        if str(path).endswith("history.jsonl") and mode[:1] == ("a",):
            raise OSError(28, "No space left on device")
        return real(path, *mode, **more)

    monkeypatch.setattr("builtins.open", full)
    tracker.step({"loss": 1.0}, 1)
    tracker.step({"loss": 2.0}, 2)
    assert caplog.text.count("cannot record: [Errno 28] No space left on device; training goes on") == 1
    monkeypatch.undo()
    tracker.step({"loss": 3.0}, 3)
    assert [row["loss"] for row in read_history(tmp_path / "history.jsonl")] == [1.0, 2.0, 3.0]


def test_wandb_that_is_not_installed_is_said_once(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = trainer(model, tmp_path, "--report_to=wandb", "--train.max_steps=1")
    run.train()
    expected = "report_to: wandb is not installed (pip install wandb): recording to TensorBoard instead"
    assert caplog.messages.count(expected) == 1 and list((tmp_path / "logs").glob("events*"))


def test_wandb_gets_numbers_and_pictures(model, tmp_path, monkeypatch):
    logged, started, ended = [], {}, []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **settings: started.update(settings)
    wandb.log = lambda values, step: logged.append((step, values))
    wandb.Image = lambda picture, caption: (picture.size, caption)
    wandb.finish = lambda: ended.append(True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    more = ("--report_to=wandb", "--name=mine", "--train.max_steps=1", "--train.visualize=true")
    trainer(model, tmp_path, *more, "--train.validation_prompts=[a]").train()
    assert (started["name"], started["id"], started["resume"], ended) == ("mine", "mine", "allow", [True])
    assert logged[0][0] == 1 and set(logged[0][1]) == {"loss", "grad_norm", "lr"}
    assert logged[1] == (1, {"validation": [((64, 64), "a")]})
    assert not list((tmp_path / "logs").glob("events*"))


def test_a_tracker_that_fails_is_one_line(model, tmp_path, monkeypatch, caplog):
    def down(*_, **__):
        raise RuntimeError("the service is down")  # theirs are no OSError

    wandb = types.ModuleType("wandb")
    wandb.init, wandb.log, wandb.finish = (lambda **_: None), down, down
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert trainer(model, tmp_path, "--report_to=wandb", "--train.max_steps=2").train()
    assert caplog.text.count("cannot record: the service is down; training goes on") == 1
    assert len(read_history(tmp_path / "history.jsonl")) == 2


def test_the_line_of_a_real_run(model, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer(model, tmp_path).train()
    lines = [text for text in caplog.messages if text.startswith("epoch ")]
    assert len(lines) == 4  # the first and every second of six steps
    assert re.match(
        r"epoch 2  step 6 / 6  loss \d\.\d{4} .* images/s  data wait \d+%  eta 00:00:00", lines[-1]
    )
