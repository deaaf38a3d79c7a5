"""Real processes are killed, terminated and starved of disk; what they leave goes on as if nothing had happened."""

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sana.training import checkpoint
from sana.training.checkpoint import find_checkpoint, read_checkpoint
from sana.training.tracker import read_history
from sana.training.trainer import Trainer
from tests.factories import write_model
from tests.training import micro

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory) -> Callable[[int], Path]:
    """Number of steps -> the folder of a run of so many that nothing disturbed."""

    @functools.cache
    def run(steps: int) -> Path:
        work_dir = tmp_path_factory.mktemp("whole")
        process = micro.start(model, work_dir, settings(steps))
        process.join()
        assert process.exitcode == 0
        return work_dir

    return run


def settings(steps: int = STEPS) -> tuple[str, ...]:
    return (f"--train.max_steps={steps}", "--train.save_model_steps=3", "--train.save_model_epochs=1000")


def assert_same_run(work_dir: Path, whole: Path, steps: int = STEPS) -> None:
    """Weights, average, optimizer, generators, loss curve and sample order, bit for bit."""
    one, two = (
        read_checkpoint(find_checkpoint("latest", folder / "checkpoints")) for folder in (work_dir, whole)
    )
    assert one.step == two.step == steps and one.ema_updates == two.ema_updates == steps
    for mine, theirs in ((one.weights, two.weights), (one.ema, two.ema), (one.rng[0], two.rng[0])):
        assert mine.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    for name, fields in two.optimizer.items():
        assert all(torch.equal(one.optimizer[name][field], value) for field, value in fields.items())
    rows = read_history(work_dir / "history.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert rows == read_history(
        whole / "history.jsonl"
    )  # losses, norms, rates and the digests of the samples
    mine, theirs = (load_file(folder / "transformer.safetensors") for folder in (work_dir, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def slowly(trainer: Trainer) -> None:
    """A step takes long enough to be hit; the arithmetic stays."""
    step = trainer.train_step
    trainer.train_step = lambda parts: (time.sleep(0.03), step(parts))[1]


@pytest.mark.parametrize("kills, steps", [(3, STEPS), pytest.param(20, 90, marks=pytest.mark.slow)])
def test_killed_at_random_moments(model, undisturbed, tmp_path, kills, steps):
    """Each time the run goes on from where it was, until it has been killed so often."""
    source, work_dir, done = random.Random(kills), tmp_path / "run", 0
    while done < kills:
        began = micro.SPAWN.Event()
        process = micro.start(model, work_dir, settings(steps), slowly, began)
        assert began.wait(60)
        process.join(source.uniform(0, 0.4))
        process.kill()
        process.join()
        done += 1
        if process.exitcode == 0:  # it had finished: begin again
            shutil.rmtree(work_dir)
            done = 0
    process = micro.start(model, work_dir, settings(steps))
    process.join()
    assert process.exitcode == 0
    assert_same_run(work_dir, undisturbed(steps), steps)
    assert not list((work_dir / "checkpoints").glob(f"{checkpoint.HIDDEN}*"))


def die_in_save(trainer: Trainer) -> None:
    """At step 6, be killed inside the save, at a moment that moves on with every attempt."""
    calls = trainer.work_dir / "calls"
    moment = int(calls.read_text()) if calls.exists() else 1
    calls.parent.mkdir(parents=True, exist_ok=True)
    calls.write_text(str(moment + 4))
    seen = 0

    def trap(function):
        def trapped(*args, **kwargs):
            nonlocal seen
            if trainer.step == 6:
                seen += 1
                if seen > moment:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return trapped

    for name in ("save_file", "dump_config", "_digest", "_flush"):
        setattr(checkpoint, name, trap(getattr(checkpoint, name)))


def test_killed_inside_a_save(model, undisturbed, tmp_path):
    """Of the 18 calls in a save, the 2nd, 6th, 10th, 14th and 18th, which is the only one after the rename."""
    for step in (3, 3, 3, 3, 6):
        process = micro.start(model, tmp_path, settings(), die_in_save)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert list((tmp_path / "checkpoints").glob(f"{checkpoint.HIDDEN}*")) or step == 6
        assert read_checkpoint(find_checkpoint("latest", tmp_path / "checkpoints")).step == step
    process = micro.start(model, tmp_path, settings(), die_in_save)
    process.join()
    assert process.exitcode == 0
    assert_same_run(tmp_path, undisturbed(STEPS))


@pytest.mark.parametrize(
    "number, workers",
    [
        (signal.SIGTERM, 0),
        (signal.SIGINT, 0),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_stop_saves_and_ends(model, undisturbed, tmp_path, number, workers):
    """It goes to the whole process group, the loader's workers included, as a scheduler or a terminal sends it."""
    began = micro.SPAWN.Event()
    more = (*settings(), "--train.save_model_steps=1000", f"--train.num_workers={workers}")
    process = micro.start(model, tmp_path, more, slowly_in_a_group, began)
    assert began.wait(60)
    while process.is_alive() and len(read_history(tmp_path / "history.jsonl")) < 5:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    os.killpg(process.pid, number)  # torchrun passes on what a terminal has sent already
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    step = read_checkpoint(find_checkpoint("latest", tmp_path / "checkpoints")).step
    assert 5 <= step < STEPS and len(read_history(tmp_path / "history.jsonl")) == step
    process = micro.start(model, tmp_path, settings())
    process.join()
    assert_same_run(tmp_path, undisturbed(STEPS))


def slowly_in_a_group(trainer: Trainer) -> None:
    os.setpgrp()
    slowly(trainer)


@pytest.mark.slow
def test_a_full_disk_pauses_and_loses_nothing(model, tmp_path):
    """A real disk of 2 MB, on which one checkpoint has room but not two, until something is deleted."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs a file system of its own")
    more = [*settings(6), "--train.keep_checkpoints=2"]
    code = f"""
import os, shutil, threading, time, sys
from pathlib import Path
from sana.training.trainer import Trainer
from sana.utils import logging
from tests.training import micro
logging.configure()
Trainer.RETRY_SECONDS = 0.2
work = Path({str(tmp_path)!r})
run = micro.trainer(Path({str(model)!r}), work, *{more!r})
ballast = work / "ballast"
def fill_then_free():
    while not list(work.glob("checkpoints/epoch_*")):
        time.sleep(0.01)
    with open(ballast, "wb") as handle:
        handle.write(bytes(os.statvfs(work).f_bavail * os.statvfs(work).f_frsize - 300_000))
    time.sleep(1.5)
    print("whole ones:", sorted(path.name for path in work.glob("checkpoints/epoch_*")), file=sys.stderr)
    ballast.unlink()
threading.Thread(target=fill_then_free, daemon=True).start()
step = run.train_step
def waiting(parts):
    while run.step == 3 and not ballast.exists():
        time.sleep(0.05)
    return step(parts)
run.train_step = waiting
assert run.train()
shutil.copy(work / "history.jsonl", {str(tmp_path.parent / "history")!r})
print("in the end:", sorted(path.name for path in work.glob("checkpoints/*")), file=sys.stderr)
"""
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=8m none {tmp_path} && exec \"$@\"", "sh"]
        + [sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "cannot save: " in result.stderr and "No space left on device" in result.stderr
    assert "the checkpoints before are whole. Training waits and tries again" in result.stderr
    assert "whole ones: ['epoch_1_step_3']" in result.stderr
    assert "in the end: ['epoch_1_step_3', 'epoch_2_step_6']" in result.stderr
