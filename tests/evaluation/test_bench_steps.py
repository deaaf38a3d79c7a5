"""scripts/bench_steps.py: one score for each solver and number of steps, and a plot of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, "scripts/bench_steps.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_setting_is_scored_once_and_plotted(tmp_path):
    report, plot, images = (tmp_path / name for name in ("steps.json", "steps.png", "images"))
    arguments = ["--steps=3,2", "--limit=1", f"--output={report}", f"--plot={plot}", f"--work_dir={images}"]
    result = run(*arguments, "--device=cpu")
    assert result.returncode == 0, result.stderr
    found = json.loads(report.read_text())
    assert {name: list(rows) for name, rows in found["values"].items()} == {
        "flow_dpm-solver": ["2", "3"],
        "flow_euler": ["2", "3"],
    }
    assert found["n"] == 24 and "single_object" in found["values"]["flow_euler"]["2"]["tags"]
    folders = [folder for folder in images.iterdir() if folder.is_dir()]
    assert len(folders) == 4 and all(len(list(folder.rglob("*.png"))) == 24 for folder in folders)
    assert plot.read_bytes().startswith(b"\x89PNG")
    written = {file: file.stat().st_mtime_ns for file in images.rglob("*.png")}
    assert run(*arguments, "--device=cpu").returncode == 0
    assert written == {file: file.stat().st_mtime_ns for file in images.rglob("*.png")}


@pytest.mark.parametrize("wrong", ["--steps=0", "--steps=2.5", "--samplers=heun"])
def test_wrong_settings_are_one_line(tmp_path, wrong):
    result = run(wrong, f"--output={tmp_path / 'report.json'}")
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert wrong.split("=")[1] in result.stderr
