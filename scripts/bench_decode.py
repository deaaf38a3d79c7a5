"""Measure the decoder of the published DC-AE (random weights, 159 M parameters): its speed beside diffusers', or its memory.

    python scripts/bench_decode.py --size 512 --dtype bf16
    python scripts/bench_decode.py --size 4096 --dtype bf16 --max_rss 12GiB

With --max_rss the picture is decoded once, made a PIL image as by the pipeline, and the exit status is 1 if the process
ever held more. Else decoders take turns, and the median of the rounds' ratios counts.
"""

import re
import statistics
import sys
import time
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from sana.utils.cli import Parser, at_least

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
GIB = 2**30


def gibibytes(text: str) -> int:
    """Argument type: "12GiB" or "0.5"; bytes."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)(?:GiB)?", text)
    if not number or not float(number[1]):
        raise ArgumentTypeError(f"expected a size such as 12GiB, got {text!r}")
    return int(float(number[1]) * GIB)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--size", type=at_least(32), default=512, help="pixels a side, a multiple of 32 (default: 512)")
    add("--width", type=at_least(32), help="pixels across (default: as --size)")
    add("--dtype", choices=DTYPES, default="bf16", help="of weights and latents (default: bf16)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    add("--baseline", choices=["diffusers", "none"], default="diffusers", help="what to time beside ours")
    add("--repeats", type=at_least(1), default=5, help="rounds (default: 5)")
    add("--max_bytes", type=gibibytes, help="what one strip of rows may take (default: 2GiB)")
    add("--max_rss", type=gibibytes, help="measure memory: the most that the process may hold")
    add("--output", type=Path, help="file for a JSON report")
    return parser


def build(dtype: "torch.dtype", device: "torch.device") -> "nn.Module":
    """The published autoencoder without its encoder; no tensor is made in another precision."""
    import torch

    from sana.models.autoencoder import PUBLISHED, Autoencoder

    with torch.device("meta"):
        autoencoder = Autoencoder.from_config(PUBLISHED)
        autoencoder.model.encoder = torch.nn.Identity()
    autoencoder.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for parameter in autoencoder.parameters():
        matrix = parameter.dim() > 1
        parameter.normal_(mean=0 if matrix else 0.5, std=parameter[0].numel() ** -0.5 if matrix else 0.1)
    return autoencoder


def measure_memory(autoencoder: "nn.Module", latents: "Tensor", args: Namespace) -> dict[str, float]:
    """Decode once; the peak of this process (a GPU's: of its tensors) in bytes, and the seconds."""
    import torch

    from sana.benchmarks.timing import process_bytes
    from sana.utils import images

    start = time.perf_counter()
    pixels = autoencoder.decode(latents, max_bytes=args.max_bytes)
    images.to_pil(pixels.float())
    seconds = time.perf_counter() - start
    if latents.device.type == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated(latents.device), "seconds": seconds}
    return {"peak_bytes": process_bytes("VmHWM"), "seconds": seconds}


def measure_speed(autoencoder: "nn.Module", latents: "Tensor", args: Namespace) -> dict[str, float]:
    """Median seconds of each decoder, and the median ratio of the rounds."""
    import torch

    raw = (latents / autoencoder.scaling_factor).to(autoencoder.dtype)
    decoders = {"sana": lambda: autoencoder.decode(latents, max_bytes=args.max_bytes)}
    if args.baseline == "diffusers":
        decoders["diffusers"] = lambda: autoencoder.model.decode(raw).sample
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for round_ in range(args.repeats + 1):
        for name, decode in decoders.items():
            start = time.perf_counter()
            decode()
            if latents.device.type == "cuda":
                torch.cuda.synchronize()
            if round_:  # the first is warm-up
                times[name].append(time.perf_counter() - start)
    values = {f"{name}_seconds": statistics.median(taken) for name, taken in times.items()}
    if "diffusers" in times:
        pairs = zip(times["diffusers"], times["sana"], strict=True)
        values["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return values


def save_report(args: Namespace, values: dict[str, float], threads: int) -> None:
    """Write the JSON report."""
    from sana.metrics.report import make_report

    peak, rounds = (1, "peak resident memory of one decode"), (args.repeats, "medians of interleaved rounds")
    count, protocol = peak if args.max_rss else rounds
    names = ("size", "width", "device", "max_bytes", "max_rss")
    settings = {"threads": threads} | {name: getattr(args, name) for name in names}
    facts = {"protocol": protocol, "settings": settings, "dtype": DTYPES[args.dtype]}
    make_report(metric="DC-AE decode", values=values, n=count, **facts).save(args.output)


def run(args: Namespace) -> None:
    """Measure, print a line, and write the report. Torch is imported only here."""
    import torch

    args.width = args.width or args.size
    if args.size % 32 or args.width % 32:
        raise ValueError(f"sides must be multiples of 32, got {args.size} x {args.width}")
    with torch.inference_mode():
        autoencoder = build(getattr(torch, DTYPES[args.dtype]), torch.device(args.device))
        shape = (1, autoencoder.latent_channels, args.size // 32, args.width // 32)
        latents = torch.randn(shape, device=args.device) * autoencoder.scaling_factor
        values = (measure_memory if args.max_rss else measure_speed)(autoencoder, latents, args)
    threads = torch.get_num_threads()
    print(f"{args.size} x {args.width} {args.dtype}, {threads} threads")
    for key, value in values.items():
        print(f"{key:20} {value / GIB:.2f} GiB" if key == "peak_bytes" else f"{key:20} {value:.2f}")
    if args.output:
        save_report(args, values, threads)
    if args.max_rss and values["peak_bytes"] > args.max_rss:
        sys.exit(f"bench_decode.py: error: more than {args.max_rss / GIB:.2f} GiB")


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
