"""How long functions take that do the same: first calls apart, then in turns; beside it memory, and what else ran."""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sana.ops import bench

Timed = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was seen of one function."""

    seconds: float
    """Median of the repeats."""
    fastest: float
    slowest: float
    first_call: float
    """Seconds of the first call: compilation, caches, warm-up."""
    call_bytes: int | None
    """Most memory that a call takes beside what lay there before it (weights, inputs, caches); None where unknown."""
    load: float
    """Load average of the machine (one minute) during the repeats, this process included."""
    other_cores: float
    """Cores that other processes kept busy meanwhile, on average."""


def first_call(function: Timed, device: torch.device) -> tuple[Any, float]:
    """(what it returns, the seconds it took)."""
    start = time.perf_counter()
    output = function()
    wait(device)
    return output, time.perf_counter() - start


def take_turns(
    functions: Mapping[str, Timed], first_calls: Mapping[str, float], device: torch.device, repeats: int
) -> dict[str, Timing]:
    """Time functions that were called once already; they take turns, so that what else happens meets all alike.

    Args:
        functions: name -> function.
        first_calls: name -> seconds of its first call, for the result.
        device: where they compute.
        repeats: calls of each.
    """
    memory = {name: memory_of(function, device) for name, function in functions.items()}  # a second warm-up
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    loads: dict[str, list[float]] = {name: [] for name in functions}
    others: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            before = _foreign_seconds()
            start = time.perf_counter()
            function()
            wait(device)
            taken = time.perf_counter() - start
            seconds[name].append(taken)
            loads[name].append(os.getloadavg()[0])
            others[name].append(max(0.0, _foreign_seconds() - before) / taken)
    return {
        name: Timing(
            seconds=statistics.median(values),
            fastest=min(values),
            slowest=max(values),
            first_call=first_calls[name],
            call_bytes=memory[name],
            load=round(statistics.mean(loads[name]), 2),
            other_cores=round(statistics.mean(others[name]), 2),
        )
        for name, values in seconds.items()
    }


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_of(function: Timed, device: torch.device) -> int | None:
    """Most bytes that a call takes beside what lies there; of a process on Linux, or of a GPU's allocator."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and not returned would count as lying there
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what lies there now
        before = process_bytes("VmRSS")
    except (OSError, AttributeError, StopIteration):
        function()
        return None
    function()
    return max(0, process_bytes("VmHWM") - before)


def process_bytes(key: str) -> int:
    """A size of this process on Linux: "VmRSS" is what it holds, "VmHWM" the most that it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _foreign_seconds() -> float:
    """CPU seconds that other processes have used since the machine started; 0 where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system


def transformer_flops(hidden_size: int, depth: int, tokens: int, text_tokens: int) -> float:
    """Operations of the blocks on one image, as counted by torch's flop counter: a product and a sum are two.

    27 N D^2 of the image's projections, 4 L D^2 of the text's, 4 N L D of the cross attention, 132 N D of the linear
    attention, 90 N D of the depthwise convolution.
    """
    n, length, d = tokens, text_tokens, hidden_size
    return float(depth * (27 * n * d**2 + 4 * length * d**2 + 4 * n * length * d + 222 * n * d))


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product."""
    return bench.ceilings(device, dtype, repeats=20)["matmul_flop_per_second"]


def best_batches(batches: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of a measurement of several batches (batch -> implementation -> figures): the best of each implementation."""
    if len(batches) < 2:
        return {}
    names = dict.fromkeys(name for rows in batches.values() for name in rows)
    speeds = {
        name: {batch: rows[name]["images_per_second"] for batch, rows in batches.items() if name in rows}
        for name in names
    }
    best = {name: max(found, key=found.get) for name, found in speeds.items()}
    return {name: {"batch": int(best[name]), "images_per_second": speeds[name][best[name]]} for name in names}


def settings_of_this_run(device: torch.device) -> dict[str, Any]:
    """What a report of a benchmark says of its process: device, threads, commit."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return {
        "device": str(device),
        "device_bytes": memory,
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the working tree of this code, with "+" if it has changes; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
