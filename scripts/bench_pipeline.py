"""Measure drawing beside diffusers' SanaPipeline on the same weights: text, denoising, decoding, or all from prompt to pixels.

    python scripts/bench_pipeline.py --model tiny
    python scripts/bench_pipeline.py --model 0.6B --size 1024 --stage denoise,decode --batch 1,2,4,8,16,32 --output report.json

The implementations take turns in one process. Each is compared with diffusers in float32 first; the figures of a wrong one
are not printed, and the exit status is 1. 0.6B and 1.6B have random weights, tiny is the model of the repository. Its
default implementations are all that the device has; diffusers_graphs is torch.compile with CUDA graphs.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from sana.utils.cli import Parser, at_least, words

MODELS = ("0.6B", "1.6B", "tiny")
STAGES = ("text", "denoise", "decode", "all")
IMPLEMENTATIONS = ("ours", "ours_compiled", "diffusers", "diffusers_compiled", "diffusers_graphs")
DTYPES = ("bf16", "fp16", "fp32")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="tiny", help="default: %(default)s")
    add(
        "--size", type=at_least(32), help="pixels a side: 512, 1024, 2048 or 4096 (tiny: any, 256 by default)"
    )
    add("--stage", type=words, default=["all"], help=f"some of {','.join(STAGES)} (default: all)")
    add("--batch", type=words, default=["1"], help="numbers of images, comma between (default: 1)")
    add("--dtype", choices=DTYPES, help="of all networks (default: bf16, on a CPU fp32)")
    add("--steps", type=at_least(2), default=20, help="of Flow-DPM-Solver, with guidance (default: 20)")
    add("--implementations", type=words, help=f"some of {','.join(IMPLEMENTATIONS)}")
    add("--repeats", type=at_least(1), default=5, help="of which the median is taken (default: 5)")
    add("--threads", type=at_least(1), help="of the processor (default: PyTorch's choice)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--output", type=Path, help="file for a JSON report")
    return parser


def checked(args: Namespace) -> tuple[list[str], list[int]]:
    """(implementations or an empty list, batches). Raises ValueError for what is unknown."""
    for flag, given, known in (
        ("stage", args.stage, STAGES),
        ("implementations", args.implementations or (), IMPLEMENTATIONS),
    ):
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"--{flag}: unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    if bad := [text for text in args.batch if not text.isdecimal() or not 1 <= int(text) <= 64]:
        raise ValueError(f"--batch: expected numbers from 1 to 64, got {', '.join(bad)}")
    return args.implementations or [], [int(text) for text in args.batch]


def run(args: Namespace) -> None:
    """Build, compare, measure, print and report. Torch is imported only here."""
    names, batches = checked(args)
    import torch

    from sana.benchmarks import baseline, timing
    from sana.benchmarks.comparison import Bench
    from sana.loading import find_device, find_dtype

    if args.threads:
        torch.set_num_threads(args.threads)
    device = find_device(args.device)
    cuda = device.type == "cuda"
    dtype = find_dtype(args.dtype or ("bf16" if cuda else "fp32"))
    names = names or [name for name in IMPLEMENTATIONS if cuda or name != "diffusers_graphs"]
    size = args.size or (256 if args.model == "tiny" else 1024 if cuda else 512)

    bench = Bench(
        baseline.build_pipeline(args.model, size, dtype=dtype, device=device, stages=args.stage), names
    )
    ceiling = timing.matmul_ceiling(device, dtype) if "denoise" in args.stage else None
    values: dict[str, Any] = {}
    failed: list[str] = []
    for stage in args.stage:
        for batch in batches:
            rows = bench.measure(stage, size, batch, args.steps, args.repeats, ceiling)
            values.setdefault(stage, {})[str(batch)] = rows.figures
            failed += rows.failed
            for name, row in rows.figures.items():
                print(line(f"{stage:8}b{batch:<4}{name:19}", row), flush=True)
        if best := timing.best_batches(values[stage]):
            values[stage]["best"] = best
    if args.output:
        save(args, device, dtype, size, ceiling, values, failed)
    for text in failed:
        print(f"bench_pipeline.py: error: wrong, not measured: {text}", file=sys.stderr)
    if failed:
        sys.exit(1)


def line(head: str, row: dict[str, Any]) -> str:
    """One row for people."""
    speedup = f"x{row['speedup']:.2f} of diffusers" if "speedup" in row else ""
    share = f"{row['share_of_matmul']:.0%} of a matrix product's rate" if "share_of_matmul" in row else ""
    memory = f"{row['call_bytes'] / 2**30:.2f} GiB" if row["call_bytes"] is not None else ""
    figures = f"{row['seconds'] * 1e3:9.1f} ms {row['images_per_second']:8.3f} images/s  {speedup:20}"
    return f"{head}{figures} first {row['first_call']:6.1f} s  {memory:9}  load {row['load']:.1f}  {share}"


def save(
    args: Namespace,
    device: Any,
    dtype: Any,
    size: int,
    ceiling: float | None,
    values: dict[str, Any],
    failed: list[str],
) -> None:
    """Write the report."""
    from sana.benchmarks import comparison, timing
    from sana.metrics.report import make_report

    settings = {
        "model": args.model,
        "size": size,
        "steps": args.steps,
        "guidance": comparison.GUIDANCE,
        "sampler": "flow_dpm-solver",
        "failed": failed,
        "matmul_flop_per_second": ceiling,
        **timing.settings_of_this_run(device),
    }
    make_report(
        metric="pipeline",
        values=values,
        n=args.repeats,
        protocol="median of interleaved repeats in one process, equal weights, noise and masks; "
        "40 valid text tokens in denoise; call_bytes beside the weights",
        settings=settings,
        dtype=str(dtype).removeprefix("torch."),
    ).save(args.output)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
