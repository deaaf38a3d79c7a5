"""The training command of the embedded model's card gives the curve that the card shows."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CURVE = ROOT / "asset/sana_tiny/first_steps.json"
STEPS = 6


@pytest.mark.slow
def test_the_first_steps_are_those_of_the_card(tmp_path):
    shipped = json.loads(CURVE.read_text(encoding="utf-8"))
    assert len(shipped["loss"]) >= 100
    command = [*shipped["command"].split(), f"--work_dir={tmp_path}", f"--train.max_steps={STEPS}"]
    # Encoding 192 pictures takes less than a cache of all 24,000; the warm-up does not depend on the number of steps.
    command += ["--np=1", "--train.feature_cache_dir=", "--train.heldout_samples=0", "--report_to=none"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows] == shipped["samples"][:STEPS]
    for row, loss in zip(rows, shipped["loss"], strict=False):
        assert row["loss"] == pytest.approx(loss, rel=1e-2), row["step"]  # bfloat16, on another processor
