"""scripts/bench_memory.py: its table, on its page and of what it measures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sana.benchmarks import memory

ROOT = Path(__file__).resolve().parents[2]
PAGE, REPORT = ROOT / "asset/docs/inference.md", ROOT / "asset/bench/memory.json"


def test_the_page_has_the_report_s_table():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(memory.BEGIN) == page.count(memory.END) == 1
    if REPORT.exists():
        assert memory.with_table(page, json.loads(REPORT.read_text(encoding="utf-8"))) == page


def test_what_was_not_measured_stays_empty():
    row = {"size": 256, "dtype": "fp32", "quantised": "none", "s": 1.5, "PSNR dB": None, "peak MiB": 10}
    assert memory.line(row) == "| 256 | fp32 | none |  | 10 | 1.5 |  |  |  |"
    with pytest.raises(ValueError, match="the page needs a line <!-- table: scripts/bench_memory.py -->"):
        report = {"settings": {"threads": 1, "steps": 2}, "versions": {}, "values": {"a": row}}
        memory.with_table("", report | {"hardware": "", "date": "", "command": ""})


@pytest.mark.slow
def test_rows_are_measured_and_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{memory.BEGIN}\n{memory.END}\nafter\n")
    words = ["--kinds=[none,int8]", "--dtypes=[fp32]", "--sizes=[64]", "--steps=2"]
    files = [f"--output={tmp_path / 'report.json'}", f"--page={page}"]
    command = [sys.executable, "scripts/bench_memory.py", *words, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exact, near = json.loads((tmp_path / "report.json").read_text())["values"].values()
    assert exact["latent error"] == 0 < near["latent error"] < 0.1
    assert 20 < near["PSNR dB"] < 80 and min(exact["s"], near["s"]) > 0
    table = done.stdout.strip()
    assert (
        table in page.read_text() and table.startswith(memory.HEAD) and page.read_text().endswith("after\n")
    )


def test_what_a_cpu_cannot_is_refused_before_anything_is_measured(tmp_path):
    command = [sys.executable, "scripts/bench_memory.py", "--device=cpu", "--kinds=[none,fp8-dynamic]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "fp8-dynamic needs a GPU" in done.stderr
