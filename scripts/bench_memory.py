"""Memory, time and quality of drawing for each size, dtype and kind of quantisation, as a table in Markdown.

    python scripts/bench_memory.py --sizes=[256] --kinds=[none,int8,nf4] --score=2

Each row has a process of its own, which draws twice: the second picture gives the seconds. Quality is that of latents and
picture against float32 without quantisation, with the same noise: relative error and PSNR; and, with --score, the score of
the shapes benchmark.
"""

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from sana.utils.cli import Parser, at_least, numbers, words


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
        "--output", type=Path, default="output/memory.json", help="the report (default: %(default)s)"
    )
    parser.add_argument(
        "--page",
        type=Path,
        help="Markdown with two markers, between which the table is written (asset/docs/inference.md)",
    )
    parser.add_argument(
        "--one", type=words, help="SIZE,DTYPE,KIND,FOLDER: measure one row (the command calls itself)"
    )
    return parser


def run(args: Namespace) -> None:
    """Measure all rows, print the table, write the report."""
    if args.one:
        from sana.benchmarks import memory

        size, dtype, kind, folder = args.one
        steps, prompts = args.steps, args.score
        row = memory.measure(
            args.config, args.device, int(size), dtype, kind, Path(folder), args.prompt, steps, prompts
        )
        print(json.dumps(row))
        return
    import torch

    from sana.benchmarks import memory
    from sana.loading import find_device, find_dtype
    from sana.metrics.report import make_report
    from sana.runtime import quantize

    cases = [(int(size), dtype, kind) for size in args.sizes for dtype in args.dtypes for kind in args.kinds]
    for _, dtype, kind in cases:  # before hours of measuring
        find_dtype(dtype)
        quantize.check({} if kind == "none" else {"transformer": kind}, find_device(args.device))
    rows = []
    own = [f"--{name}={getattr(args, name)}" for name in ("steps", "score", "prompt", "device")]
    own += [f"--config={args.config}"] if args.config else []
    print(memory.HEAD)
    with tempfile.TemporaryDirectory() as folder:
        for size, dtype, kind in cases:
            one = [sys.executable, __file__, *own, f"--one={size},{dtype},{kind},{folder}"]
            done = subprocess.run(one, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = done.stderr.strip() or f"ended with status {done.returncode}"
                raise ValueError(f"{size}, {dtype}, {kind}: {reason.splitlines()[-1]}")
            rows.append(memory.compare(Path(folder), json.loads(done.stdout.splitlines()[-1])))
            print(memory.line(rows[-1]), flush=True)
    report = make_report(
        metric="memory of drawing",
        values={f"{row['size']} {row['dtype']} {row['quantised']}": row for row in rows},
        n=len(rows),
        protocol="a process for each row; peak over what it held before loading; seconds of its second picture",
        settings={
            "steps": args.steps,
            "prompt": args.prompt,
            "config": args.config or "the embedded one",
            "threads": torch.get_num_threads(),
        },
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    report.save(args.output)
    if args.page:
        page = args.page.read_text(encoding="utf-8")
        saved = json.loads(args.output.read_text(encoding="utf-8"))
        args.page.write_text(memory.with_table(page, saved), encoding="utf-8")


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
