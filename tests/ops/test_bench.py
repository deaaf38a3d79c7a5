"""scripts/bench_ops.py on a CPU: figures of right implementations, none of a wrong one, and a whole report."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from sana.ops import bench

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_report_of_all_operations(tmp_path):
    report = tmp_path / "report.json"
    command = [
        sys.executable,
        "scripts/bench_ops.py",
        "--device=cpu",
        "--side=2",
        "--repeats=1",
        "--no_compile",
    ]
    result = subprocess.run(
        [*command, f"--output={report}", "--dtype=fp32"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    content = json.loads(report.read_text())
    names = bench.operations("0.6B", 1, 2)
    assert set(content["values"]) == {"ceilings", *names}
    assert len(result.stdout.splitlines()) == 1 + 2 * len(names)
    for name in names:
        for direction in ("forward", "backward"):
            assert content["values"][name][direction]["eager"]["seconds"] > 0
    assert content["settings"]["commit"] and content["hardware"] and content["versions"]["torch"]


def test_unknown_operation_is_one_line():
    command = [sys.executable, "scripts/bench_ops.py", "--ops=softmax"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "unknown softmax; choose from linear_attention" in result.stderr


def test_wrong_implementation_is_found():
    operation = bench.operations("0.6B", 1, 2)["gate_residual"]
    right = bench.implementations(operation, CPU, compiled=False)["eager"]
    assert bench.largest_error(operation, right, CPU, torch.float32) < 1e-6
    error = bench.largest_error(operation, lambda x, g, b: x + 1.001 * g * b, CPU, torch.float32)
    assert error > bench.LARGEST_ERROR[torch.float32]


def test_traffic_is_that_of_the_arguments():
    """What is read and written once: the arguments and the output; small tables aside."""
    for name, operation in bench.operations("0.6B", 2, 16).items():
        tensors = [torch.empty(shape, device="meta") for shape in operation.shapes]
        numbers = sum(x.numel() for x in tensors) + operation.call(*tensors, backend="torch").numel()
        assert abs(operation.forward / numbers - 1) < 0.05, name
