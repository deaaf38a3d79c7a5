"""Measure the fused operations: Triton (on CUDA), eager and compiled PyTorch, as shares of what the device can do.

An implementation is compared with float64 first; the figures of a wrong one are not printed, and the exit status is 1.

    python scripts/bench_ops.py
    python scripts/bench_ops.py --model 1.6B --batch 2 --side 128 --output report.json

Bytes are what the kernels read and write, for every implementation: what more a slow one moves is its own loss.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from sana.utils.cli import Parser, at_least, words

MODELS = ("0.6B", "1.6B")
DTYPES = ("bf16", "fp16", "fp32")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--ops", type=words, help="which operations, comma between (default: all)")
    add("--model", choices=MODELS, default="0.6B", help="the widths (default: 0.6B)")
    add("--batch", type=at_least(1), help="images (default: 32, on a CPU 1)")
    add("--side", type=at_least(1), help="tokens a side, 32 at 1024 pixels (default: 32, on a CPU 16)")
    add("--dtype", choices=DTYPES, default="bf16", help="of all tensors (default: bf16)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--repeats", type=at_least(1), default=20, help="rounds of which the median is taken (default: 20)")
    add("--no_compile", action="store_true", help="leave the compiled reference out")
    add("--output", type=Path, help="file for a JSON report")
    return parser


def run(args: Namespace) -> None:
    """Check, measure, print a line for each figure, and write the report. Torch is imported only here."""
    from sana.benchmarks.timing import settings_of_this_run
    from sana.loading import find_device, find_dtype
    from sana.metrics.report import make_report
    from sana.ops import bench

    device, dtype = find_device(args.device), find_dtype(args.dtype)
    large = device.type == "cuda"
    batch, side = args.batch or (32 if large else 1), args.side or (32 if large else 16)
    operations, small = bench.operations(args.model, batch, side), bench.operations(args.model, 1, 5)
    unknown = sorted(set(args.ops or []) - set(operations))
    if unknown:
        raise ValueError(f"--ops: unknown {', '.join(unknown)}; choose from {', '.join(operations)}")

    ceilings = bench.ceilings(device, dtype, args.repeats)
    copy, matmul = ceilings["copy_bytes_per_second"], ceilings["matmul_flop_per_second"]
    print(f"ceilings: copy {copy / 1e9:.0f} GB/s, matrix product {matmul / 1e12:.2f} TFLOP/s", flush=True)
    values: dict[str, Any] = {"ceilings": ceilings}
    failed = []
    for name in args.ops or operations:
        compiled = not args.no_compile
        correct = {}
        for kind, function in bench.implementations(small[name], device, compiled=compiled).items():
            error = bench.largest_error(small[name], function, device, dtype)
            correct[kind] = error <= bench.LARGEST_ERROR[dtype]
            if not correct[kind]:
                failed.append(f"{name}, {kind}: relative error {error:.1e}")
        if not correct["eager"]:
            continue
        functions = bench.implementations(operations[name], device, compiled=compiled)
        functions = {kind: function for kind, function in functions.items() if correct[kind]}
        for direction, kind, seconds, rate in bench.measure(
            operations[name], functions, device, dtype, args.repeats
        ):
            row = {"seconds": seconds, "bytes_per_second": rate, "share_of_copy": rate / copy}
            values.setdefault(name, {}).setdefault(direction, {})[kind] = row
            figures = f"{seconds * 1e3:9.3f} ms {rate / 1e9:8.1f} GB/s {rate / copy:6.1%} of copy"
            print(f"{name:20} {direction:8} {kind:8} {figures}", flush=True)
    if args.output:
        settings = {"model": args.model, "batch": batch, "side": side, "failed": failed}
        make_report(
            metric="fused operations",
            values=values,
            n=args.repeats,
            protocol="median of interleaved repeats; bytes of the kernels' design",
            settings=settings | settings_of_this_run(device),
            dtype=str(dtype).removeprefix("torch."),
        ).save(args.output)
    for line in failed:
        print(f"bench_ops.py: error: wrong, not measured: {line}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
