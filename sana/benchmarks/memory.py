"""Memory, time and quality of drawing, measured, and as a table: what `scripts/bench_memory.py` does."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sana.benchmarks.page import replaced
from sana.evaluation import shapes_benchmark
from sana.generation import Settings
from sana.inference import make_outline
from sana.loading import find_config, find_device, find_dtype
from sana.metrics.geneval import load_prompts
from sana.pipeline import SanaPipeline
from sana.runtime import plan
from sana.shapes.benchmark import PROMPTS_FILE
from sana.utils import hub

BEGIN, END = "<!-- table: scripts/bench_memory.py -->", "<!-- end of table -->"
"""What is between these lines of the page is written here."""

COLUMNS = ("size", "dtype", "quantised", "planned MiB", "peak MiB", "s", "latent error", "PSNR dB", "score")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
MIB = 2**20


def measure(
    config: str | None,
    device: str,
    size: int,
    dtype: str,
    kind: str,
    folder: Path,
    prompt: str,
    steps: int,
    scored: int,
) -> dict[str, Any]:
    """One row, in a process that did nothing before; its latents and picture are left in `folder`, for `compare`.

    Args:
        size: pixels a side.
        kind: of `sana.runtime.quantize.KINDS`, or "none"; for both networks.
        scored: prompts of each tag of the shapes benchmark; 0 is none.
    """
    kinds = {} if kind == "none" else {"transformer": kind, "text_encoder": kind}
    loaded, where = find_config(config), find_device(device)
    outline = make_outline(loaded, where, find_dtype(dtype))
    settings = {"num_inference_steps": steps, "seed": 1, "use_resolution_binning": False}
    before = plan.held()
    with torch.no_grad():
        planned = plan.make_plan(outline, plan.Setting(size=(size, size), device=where.type, quantize=kinds))
    pipeline = SanaPipeline(loaded, device=where, dtype=dtype, quantize=kinds)
    for _ in range(2):  # the first time libraries are loaded
        start = time.perf_counter()
        latents = pipeline(prompt, size, size, output_type="latent", **settings)
        pixels = pipeline.decode(latents, (size, size)).cpu()
        seconds = time.perf_counter() - start
    torch.save((latents.cpu(), pixels), folder / f"{size}-{dtype}-{kind}.pt")
    if where.type == "cuda":
        taken = torch.cuda.max_memory_allocated(where)
    else:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        taken = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 - before
    row = {"size": size, "dtype": dtype, "quantised": kind, "s": round(seconds, 2)}
    row |= {"planned MiB": round(planned.peak / MIB), "peak MiB": round(taken / MIB)}
    return row | ({"score": score(pipeline, scored)} if scored else {})


def score(pipeline: SanaPipeline, limit: int) -> float:
    """The shapes benchmark's score on `limit` prompts of each tag."""
    prompts = shapes_benchmark.subset(load_prompts(hub.resolve(PROMPTS_FILE)), limit)
    with tempfile.TemporaryDirectory() as folder:
        found = shapes_benchmark.draw_and_score(pipeline, prompts, folder, Settings(), batch_size=4)
    return round(found["overall"], 3)


def compare(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The row with its distance from float32 at its size, where that was drawn too."""
    exact = folder / f"{row['size']}-fp32-none.pt"
    if not exact.exists():
        return row
    own = torch.load(folder / f"{row['size']}-{row['dtype']}-{row['quantised']}.pt")
    (latents, pixels), (near, shown) = torch.load(exact), own
    error = float((near - latents).norm() / latents.norm())
    square = float((shown.clamp(-1, 1) - pixels.clamp(-1, 1)).square().mean())
    psnr = None if square == 0 else round(float(10 * torch.log10(torch.tensor(4 / square))), 1)
    return row | {"latent error": float(f"{error:.2g}"), "PSNR dB": psnr}


def line(row: Mapping[str, Any]) -> str:
    """One row of the table; what was not measured stays empty."""
    cells = ("" if row.get(column) is None else str(row[column]) for column in COLUMNS)
    return f"| {' | '.join(cells)} |"


def with_table(page: str, report: Mapping[str, Any]) -> str:
    """The page with a new table between its markers.

    Raises:
        ValueError: they are not there.
    """
    settings, versions = report["settings"], report["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchao") if name in versions)
    made = (
        f"{report['hardware']}; {settings['threads']} threads; {libraries}; {settings['steps']} steps; "
        f"{report['date'][:10]}; `{report['command']}`"
    )
    rows = "\n".join(map(line, report["values"].values()))
    return replaced(page, BEGIN, END, f"{made}\n\n{HEAD}\n{rows}\n")
