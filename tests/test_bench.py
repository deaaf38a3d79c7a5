"""scripts/bench_pipeline.py, bench_train.py, plot_benchmarks.py and gpu_check.sh as a user runs them, at the smallest size."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sana.benchmarks import comparison, timing
from sana.benchmarks import page as bench_page

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {"seconds", "fastest", "slowest", "first_call", "call_bytes", "load", "other_cores"}
FIGURES |= {"images_per_second", "error", "speedup"}


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, f"scripts/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pipeline_report(tmp_path_factory):
    """(file, what was printed)."""
    file = tmp_path_factory.mktemp("bench") / "pipeline.json"
    result = run(
        "bench_pipeline.py",
        *(
            "--model=tiny",
            "--size=64",
            "--stage=text,denoise,decode,all",
            "--batch=1,2",
            "--steps=2",
            "--threads=1",
        ),
        *("--device=cpu", "--repeats=1", "--implementations=ours,diffusers", f"--output={file}"),
    )
    assert result.returncode == 0, result.stderr
    return file, result.stdout


def test_pipeline_report_is_complete(pipeline_report):
    file, printed = pipeline_report
    report = json.loads(file.read_text())
    assert set(report["values"]) == {"text", "denoise", "decode", "all"}
    for stage, batches in report["values"].items():
        assert set(batches) == {"1", "2", "best"}, stage
        for batch in ("1", "2"):
            assert set(batches[batch]) == {"ours", "diffusers"}
            for row in batches[batch].values():
                assert row.keys() >= FIGURES and row["seconds"] > 0 and row["error"] < 1e-4
                assert row["images_per_second"] == pytest.approx(int(batch) / row["seconds"])
        for name, best in batches["best"].items():
            assert best["images_per_second"] == max(batches[b][name]["images_per_second"] for b in ("1", "2"))
    assert report["settings"]["matmul_flop_per_second"] > 1e9
    assert all("share_of_matmul" in row for row in report["values"]["denoise"]["2"].values())
    assert report["settings"].keys() >= {
        "model",
        "size",
        "steps",
        "guidance",
        "device",
        "threads",
        "commit",
        "failed",
    }
    assert report["hardware"] and report["versions"]["diffusers"] and report["dtype"] == "float32"
    assert len(printed.splitlines()) == 4 * 2 * 2


def test_training_report_is_complete(tmp_path):
    file = tmp_path / "train.json"
    result = run(
        "bench_train.py",
        *("--model=tiny", "--batch=2", "--repeats=1", "--threads=1", "--implementations=ours,diffusers"),
        f"--output={file}",
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(file.read_text())
    assert set(report["values"]["2"]) == {"ours", "diffusers"}
    for row in report["values"]["2"].values():
        assert row.keys() >= FIGURES | {"share_of_matmul"} and 0 < row["share_of_matmul"] < 2
        assert row["error"] < 0.1  # two roundings of bfloat16 under autocast


@pytest.mark.parametrize(
    ("script", "flag", "message"),
    [
        (
            "bench_pipeline.py",
            "--stage=denoise,paint",
            "unknown paint; choose from text, denoise, decode, all",
        ),
        ("bench_pipeline.py", "--implementations=theirs", "unknown theirs; choose from ours, ours_compiled"),
        ("bench_pipeline.py", "--batch=1,0", "expected numbers from 1 to 64, got 0"),
        ("bench_train.py", "--implementations=theirs", "unknown theirs; choose from ours, ours_compiled"),
    ],
)
def test_wrong_arguments_are_one_line(script, flag, message):
    result = run(script, flag)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout


def load(script: str):
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers under numpy 2
def test_times_of_a_wrong_implementation_are_not_printed(monkeypatch, capsys, tmp_path):
    script, right = load("bench_pipeline"), comparison._ours

    def wrong(pipeline, work, stage):
        return lambda: 1.01 * right(pipeline, work, stage)()

    monkeypatch.setattr(comparison, "_ours", wrong)
    report = tmp_path / "report.json"
    arguments = [
        "--size=64",
        "--stage=decode",
        "--steps=2",
        "--repeats=1",
        "--implementations=ours,diffusers",
    ]
    with pytest.raises(SystemExit) as exit_:
        script.run(script.make_parser().parse_args([*arguments, "--device=cpu", f"--output={report}"]))
    out, error = capsys.readouterr()
    assert exit_.value.code == 1 and "ours:" in error
    assert "diffusers" in out and "ours" not in out
    saved = json.loads(report.read_text())
    assert set(saved["values"]["decode"]["1"]) == {"diffusers"} and len(saved["settings"]["failed"]) == 1


def test_turns_are_taken_and_medians_are_of_them():
    calls, device = [], torch.device("cpu")
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = timing.take_turns(functions, {"a": 1.5, "b": 2.5}, device, repeats=3)
    assert calls == ["a", "b"] + ["a", "b"] * 3  # once for the memory
    assert found["b"].first_call == 2.5 and found["a"].fastest <= found["a"].seconds <= found["a"].slowest


def test_memory_is_that_of_the_call():
    device, kept = torch.device("cpu"), torch.ones(2**22)
    taken = timing.memory_of(lambda: torch.ones(2**24), device)
    assert taken is None or 0.9 * 2**26 < taken < 1.3 * 2**26
    assert kept.sum() == 2**22


def test_operations_are_those_of_the_published_models():
    """TFLOP of a forward with 300 text tokens, 0.6B and 1.6B: asset/docs/benchmarks.md says how they are counted."""
    assert timing.transformer_flops(1152, 28, 1024, 300) == pytest.approx(1.12e12, rel=5e-3)
    assert timing.transformer_flops(2240, 20, 1024, 300) == pytest.approx(2.97e12, rel=5e-3)


def test_page_is_what_the_reports_say():
    """The tables in the documentation are those that scripts/plot_benchmarks.py writes from asset/bench."""
    page = (ROOT / "asset/docs/benchmarks.md").read_text(encoding="utf-8")
    assert bench_page.with_tables(page, bench_page.read_reports(ROOT / "asset/bench")) == page


def test_operations_have_a_table_of_their_own():
    """Beside an implementation that was wrong in one pass, and so has no figure there."""
    figures = {"seconds": 0.002, "share_of_copy": 0.25}
    report = {
        "values": {
            "ceilings": {"copy_bytes_per_second": 2e10},
            "norm": {"forward": {"eager": figures, "compiled": figures}, "backward": {"eager": figures}},
        },
        "settings": {"model": "0.6B", "batch": 2, "side": 16},
        "dtype": "bfloat16",
    }
    lines = bench_page._operations(report)
    assert "0.6B, bfloat16, batch 2, 16 x 16 tokens" in lines[0] and "20 GB/s" in lines[0]
    assert lines[2] == "| operation, pass | eager | compiled |"
    assert lines[4:6] == ["| norm, forward | 2 ms (25%) | 2 ms (25%) |", "| norm, backward | 2 ms (25%) |  |"]


def test_page_and_plot_are_made(pipeline_report, tmp_path):
    page, plot = tmp_path / "page.md", tmp_path / "plot.png"
    page.write_text(f"# Title\n\n{bench_page.BEGIN}\nold\n{bench_page.END}\nend\n")
    arguments = [f"--reports={pipeline_report[0].parent}", f"--page={page}", f"--plot={plot}"]
    result = run("plot_benchmarks.py", *arguments)
    assert result.returncode == 0, result.stderr
    text = page.read_text()
    assert "old" not in text and text.startswith("# Title") and text.endswith(f"{bench_page.END}\nend\n")
    row = json.loads(pipeline_report[0].read_text())["values"]["all"]["2"]["ours"]
    assert (
        f"| tiny, 64 x 64, float32, batch 2: prompt to pixels, 2 steps | ours | {bench_page.seconds(row['seconds'])} |"
        in text
    )
    assert f"**{row['speedup']:.2f}**" in text
    assert plot.stat().st_size > 10_000
    page.write_text("no markers")
    result = run("plot_benchmarks.py", *arguments)
    assert result.returncode == 2 and "needs a line" in result.stderr


def test_gpu_check_says_in_one_line_that_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    script = (ROOT / "scripts/gpu_check.sh").read_text()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/gpu_check.sh").write_text(script)
    # In place of the real one, which would set up an environment.
    (tmp_path / "environment_setup.sh").write_text(f"echo {sys.executable}\n")
    for what in ("tests", "large"):
        command = ["bash", tmp_path / "scripts/gpu_check.sh", what]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1 and not result.stdout
        assert result.stderr == "gpu_check.sh: no CUDA GPU is visible\n"
