"""Memory, time and quality of drawing for each size, dtype and kind of quantisation, as a table in Markdown.

    python scripts/bench_memory.py --sizes=[256] --kinds=[none,int8,nf4] --score=2

Each row is drawn in a process of its own. Quality is that of the latents and the picture against float32 without
quantisation, with the same noise: relative error and PSNR; and the score of the shapes benchmark, with --score.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from sana.utils.cli import Parser, at_least, numbers, words

COLUMNS = ("size", "dtype", "quantised", "planned MiB", "peak MiB", "s", "latent error", "PSNR dB", "score")
MIB = 2**20


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config", help="YAML file (default: the embedded model)")
    parser.add_argument(
        "--sizes", type=numbers, default=(256.0,), help="[A,B,...]: pixels a side (default: 256)"
    )
    parser.add_argument("--dtypes", type=words, default=["fp32", "bf16"], help="(default: [fp32,bf16])")
    kinds = ["none", "int8", "int8-dynamic", "fp8", "nf4"]
    parser.add_argument(
        "--kinds", type=words, default=kinds, help="of both networks (default: all that a CPU can)"
    )
    parser.add_argument("--steps", type=at_least(2), default=20, help="network evaluations (default: 20)")
    parser.add_argument(
        "--score", type=at_least(0), default=0, help="prompts of each tag to score (default: 0, none)"
    )
    parser.add_argument("--prompt", default="a red circle to the left of a blue square")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default: cpu)")
    parser.add_argument(
        "--output", type=Path, default="asset/bench/memory.json", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--one", type=words, help="SIZE,DTYPE,KIND,FOLDER: measure one row (the command calls itself)"
    )
    return parser


def measure(args: Namespace) -> dict[str, Any]:
    """One row; its latents and picture are left in FOLDER. Torch is imported only here."""
    import torch

    from sana import SanaPipeline
    from sana.inference import make_outline
    from sana.loading import find_config, find_device, find_dtype
    from sana.runtime import plan

    size, dtype, kind, folder = int(args.one[0]), *args.one[1:]
    kinds = {} if kind == "none" else {"transformer": kind, "text_encoder": kind}
    config, device = find_config(args.config), find_device(args.device)
    outline = make_outline(config, device, find_dtype(dtype))
    settings = {"num_inference_steps": args.steps, "seed": 1, "use_resolution_binning": False}
    before = plan.held()
    with torch.no_grad():
        planned = plan.make_plan(outline, plan.Setting(size=(size, size), device=device.type, quantize=kinds))
    pipeline = SanaPipeline(config, device=device, dtype=dtype, quantize=kinds)
    start = time.perf_counter()
    latents = pipeline(args.prompt, size, size, output_type="latent", **settings)
    pixels = pipeline.decode(latents, (size, size))
    seconds = time.perf_counter() - start
    torch.save((latents.cpu(), pixels.cpu()), Path(folder, f"{size}-{dtype}-{kind}.pt"))
    if device.type == "cuda":
        taken = torch.cuda.max_memory_allocated(device)
    else:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        taken = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 - before
    row = {"size": size, "dtype": dtype, "quantised": kind, "s": round(seconds, 2)}
    row |= {"planned MiB": round(planned.peak / MIB), "peak MiB": round(taken / MIB)}
    return row | ({"score": score(pipeline, args.score)} if args.score else {})


def score(pipeline: Any, limit: int) -> float:
    """The shapes benchmark's score on `limit` prompts of each tag."""
    from sana.evaluation import shapes_benchmark as benchmark
    from sana.generation import Settings
    from sana.metrics.geneval import load_prompts, summarise
    from sana.shapes.benchmark import PROMPTS_FILE
    from sana.utils import hub

    prompts = benchmark.subset(load_prompts(hub.resolve(PROMPTS_FILE)), limit)
    with tempfile.TemporaryDirectory() as folder:
        benchmark.draw(pipeline, prompts, Path(folder), Settings(), batch_size=4)
        records = benchmark.score(benchmark.find_images(folder, prompts))
    return round(summarise(records)["overall"], 3)


def compare(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The row with its distance from float32 at its size, where that was drawn too."""
    import torch

    exact = folder / f"{row['size']}-fp32-none.pt"
    if not exact.exists():
        return row
    own = torch.load(folder / f"{row['size']}-{row['dtype']}-{row['quantised']}.pt")
    (latents, pixels), (near, shown) = torch.load(exact), own
    error = float((near - latents).norm() / latents.norm())
    square = float((shown.clamp(-1, 1) - pixels.clamp(-1, 1)).square().mean())
    psnr = None if square == 0 else round(float(10 * torch.log10(torch.tensor(4 / square))), 1)
    return row | {"latent error": float(f"{error:.2g}"), "PSNR dB": psnr}


def run(args: Namespace) -> None:
    """Measure all rows, print the table, write the report."""
    if args.one:
        print(json.dumps(measure(args)))
        return
    from sana.metrics.report import make_report

    rows = []
    own = [f"--{name}={getattr(args, name)}" for name in ("steps", "score", "prompt", "device")]
    own += [f"--config={args.config}"] if args.config else []
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory() as folder:
        for size in map(int, args.sizes):
            for dtype in args.dtypes:
                for kind in args.kinds:
                    one = f"--one={size},{dtype},{kind},{folder}"
                    done = subprocess.run(
                        [sys.executable, __file__, *own, one], capture_output=True, text=True, check=False
                    )
                    if done.returncode:
                        raise ValueError(f"{size}, {dtype}, {kind}: {done.stderr.strip().splitlines()[-1]}")
                    rows.append(compare(Path(folder), json.loads(done.stdout.splitlines()[-1])))
                    print(
                        f"| {' | '.join(str(rows[-1].get(column, '')) for column in COLUMNS)} |", flush=True
                    )
    settings = {"steps": args.steps, "prompt": args.prompt, "config": args.config or "embedded", "rows": rows}
    protocol = "a process for each row; peak over what it held before loading; seconds of one picture"
    values = {f"peak MiB {row['size']} {row['dtype']} {row['quantised']}": row["peak MiB"] for row in rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    make_report(
        metric="memory of drawing", values=values, n=len(rows), protocol=protocol, settings=settings
    ).save(args.output)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
