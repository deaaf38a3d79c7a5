"""Several gloo processes train as one does; shards as copies; a process that hangs is found."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from sana.config import ConfigError
from sana.training.checkpoint import find_checkpoint, read_checkpoint
from sana.training.tracker import read_history
from sana.training.trainer import Trainer
from tests.factories import write_model
from tests.numerics import assert_close
from tests.ports import free_port
from tests.training import micro

ROOT = Path(__file__).resolve().parents[2]
# Adam divides by the gradient's size, so that rounding decides the sign of a step where the gradient is about zero.
SGD = (
    "--train.optimizer={type: SGD, lr: 0.005, momentum: 0.9}",
    "--train.max_steps=4",
    "--train.heldout_samples=3",
)
ADAMW = ("--train.max_steps=4",)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory) -> Path:
    work_dir = tmp_path_factory.mktemp("alone")
    assert micro.finish([micro.start(model, work_dir, SGD)]) == [0]
    return work_dir


def share(count: int) -> str:
    return f"--train.train_batch_size={4 // count}"


def newest(work_dir: Path):
    return read_checkpoint(find_checkpoint("latest", work_dir / "checkpoints"))


def assert_alike(work_dir: Path, other: Path) -> None:
    """The same samples in each step, losses within 1e-5, and the same weights and average."""
    rows, others = (read_history(folder / "history.jsonl") for folder in (work_dir, other))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row, theirs in zip(rows, others, strict=True):
        assert row["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    one, two = newest(work_dir), newest(other)
    for mine, theirs in ((one.weights, two.weights), (one.ema, two.ema)):
        for name in theirs:
            assert_close(name, mine[name], theirs[name], rel_rms=1e-5)


def note_samples(run: Trainer) -> None:
    """Write down what this process trains on."""
    step, file = run.train_step, run.work_dir / f"samples_{run.accelerator.process_index}.txt"

    def noting(parts):
        with open(file, "a") as handle:
            handle.write(repr([key for part in parts for key in part.samples]) + "\n")
        return step(parts)

    run.train_step = noting


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_process_or_several_train_alike(model, alone, tmp_path, count):
    assert (
        micro.finish(micro.start_group(count, model, tmp_path, (*SGD, share(count)), note_samples))
        == [0] * count
    )
    assert_alike(tmp_path, alone)
    parts = [(tmp_path / f"samples_{rank}.txt").read_text().splitlines() for rank in range(count)]
    order = micro.trainer(model, tmp_path / "order", *SGD).order
    for step, lines in enumerate(zip(*parts, strict=True)):
        assert sum((eval(line) for line in lines), []) == order.keys(step)  # noqa: S307 our own lines
    assert len(newest(tmp_path).rng) == count


def are_sharded(run: Trainer) -> None:
    """Parameters, and once there is one the optimizer's state, lie in halves on two ranks."""
    step = run.train_step

    def checked(parts):
        stats = step(parts)
        tensors = dict(run.transformer.named_parameters()) | {
            f"average of {name}": value for name, value in run.ema.model.named_parameters()
        }
        for name, value in run.transformer.named_parameters():
            tensors |= {
                f"{key} of {name}": state for key, state in run.optimizer.state[value].items() if state.ndim
            }
        for name, value in tensors.items():
            assert isinstance(value, DTensor) and value.device_mesh.size() == 2, name
            assert value.placements[0].is_shard(), name
            assert value.shape[0] < 2 or value.to_local().shape[0] < value.shape[0], name
        return stats

    run.train_step = checked


def test_shards_train_as_copies_do(model, alone, tmp_path):
    more = (*SGD, share(2), "--train.use_fsdp=true")
    assert micro.finish(micro.start_group(2, model, tmp_path, more, are_sharded)) == [0, 0]
    assert_alike(tmp_path, alone)


@pytest.mark.parametrize(
    "first, second",
    [
        ("fsdp", "alone"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("alone", "fsdp"), ("ddp", "fsdp"))),
    ],
)
def test_saved_by_some_resumed_by_others(model, tmp_path, first, second):
    """With AdamW's state: two steps by some processes, then two by others, are four by one."""

    def go(how: str, work_dir: Path, steps: int) -> None:
        count = 1 if how == "alone" else 2
        more = (f"--train.max_steps={steps}", share(count), f"--train.use_fsdp={str(how == 'fsdp').lower()}")
        started = (
            micro.start_group(count, model, work_dir, more)
            if count > 1
            else [micro.start(model, work_dir, more)]
        )
        assert micro.finish(started) == [0] * count

    go(first, tmp_path / "run", 2)
    go(second, tmp_path / "run", 4)
    go("alone", tmp_path / "whole", 4)
    rows, others = (read_history(tmp_path / name / "history.jsonl") for name in ("run", "whole"))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in others], rel=1e-4)
    one, two = newest(tmp_path / "run").optimizer, newest(tmp_path / "whole").optimizer
    assert one.keys() == two.keys()
    for name, fields in two.items():
        assert all(one[name][field].shape == value.shape for field, value in fields.items()), name
        assert one[name]["step"] == 4


def test_what_cannot_be_sharded_is_one_clear_error(model, tmp_path):
    with pytest.raises(ConfigError, match="train.use_fsdp: a single process has nothing to share with"):
        micro.trainer(model, tmp_path, "--train.use_fsdp=true")


def hang(run: Trainer) -> None:
    """The second rank never joins the first step's collectives."""
    if run.accelerator.process_index == 1:
        run.train_step = lambda parts: time.sleep(1000)
    run.watchdog.GRACE_SECONDS = 2.0


def test_a_hung_collective_leaves_every_stack(model, tmp_path):
    began = time.monotonic()
    more = (share(2), "--train.hang_minutes=0.05")
    assert micro.finish(micro.start_group(2, model, tmp_path, more, hang)) == [1, 1]
    assert time.monotonic() - began < 60
    stacks = [(tmp_path / "logs" / "stacks" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert "Timeout (0:00:03)!" in stacks[0] and re.search(r"trainer.py\", line \d+ in train_step", stacks[0])
    assert re.search(r'test_processes.py", line \d+ in <lambda>', stacks[1])


def test_a_step_in_time_leaves_no_stack(model, tmp_path):
    assert micro.finish([micro.start(model, tmp_path, ("--train.hang_minutes=1",))]) == [0]
    assert not (tmp_path / "logs" / "stacks").exists()


@pytest.mark.slow
def test_the_real_command_in_two_processes(model, tmp_path):
    """torchrun and train_scripts/train.py, on the smallest model of the zoo; SIGTERM to torchrun saves."""
    more = [text for text in micro.settings(model, tmp_path) if not text.startswith("--model.model")]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
        f"--master_port={free_port()}",
        *("train_scripts/train.py", f"--config_path={model}", "--resume_from=latest", *more, share(2)),
        "--train.log_interval=1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*command, "--train.max_steps=1000"], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
    )
    for line in process.stderr:
        if "step 2 /" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=240)[1]
    assert "stopped at step" in rest, rest[-2000:]
    step = newest(tmp_path).step
    assert step >= 2
    result = subprocess.run(
        [*command, f"--train.max_steps={step + 1}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert result.returncode == 0 and f"resumed at step {step}" in result.stderr, result.stderr[-2000:]
    assert torch.isfinite(
        torch.tensor([row["loss"] for row in read_history(tmp_path / "history.jsonl")])
    ).all()
