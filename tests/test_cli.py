"""Every entry point answers `--help` without loading torch, and answers a wrong flag in one line with exit code 2."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("scripts", "train_scripts", "tools", "app")
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "gradio"}
HELP_SECONDS = 2.0  # CPU time above that of an empty program: the wall clock of a shared machine says little


@dataclass(frozen=True)
class Answer:
    """What a program said, how it ended, and the CPU seconds it took."""

    status: int
    stdout: str
    stderr: str
    seconds: float


def run(*arguments: str) -> Answer:
    """Run Python with `arguments` from the repository root."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=stdout, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        return Answer(process.returncode, stdout.read(), stderr.read(), usage.ru_utime + usage.ru_stime)


def entry_points() -> list[str]:
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return [str(path.relative_to(ROOT)) for path in paths if "__main__" in path.read_text(encoding="utf-8")]


def imported(importtime: str) -> set[str]:
    """Top-level modules in the output of `python -X importtime`."""
    lines = [line for line in importtime.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("script", entry_points())
def test_help_is_quick(script):
    empty = run("-X", "importtime", "-c", "")
    answer = run("-X", "importtime", script, "--help")
    assert answer.status == 0, answer.stderr[-2000:]
    assert "usage" in answer.stdout.lower()
    assert imported(answer.stderr) >= {"argparse"}, "the list of imports was not read"
    assert not HEAVY & imported(answer.stderr)
    assert answer.seconds - empty.seconds < HELP_SECONDS


@pytest.mark.parametrize("flag", ["--no_such_flag=1", "--model.no_such_key=1"])
@pytest.mark.parametrize("script", entry_points())
def test_wrong_flag_is_one_line(script, flag):
    answer = run(script, flag)
    assert answer.status == 2, answer.stderr[-2000:]
    assert answer.stdout == ""
    assert len(answer.stderr.splitlines()) == 1, answer.stderr
    assert "no_such" in answer.stderr or "arguments are required" in answer.stderr


def test_the_measure_sees_torch():
    assert "torch" in imported(run("-X", "importtime", "-c", "import torch").stderr)
