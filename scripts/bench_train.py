"""Measure a training step beside a plain loop over diffusers' network, with the same weights, features and batch.

    python scripts/bench_train.py
    python scripts/bench_train.py --model 0.6B --size 512 --batch 64 --implementations ours_compiled,diffusers

Ours is the step of train_scripts/train.py on cached features; words like --train.grad_checkpointing=true change its config,
and diffusers' loop follows where it can. Predictions are compared first; the figures of a wrong implementation are not
printed, and the exit status is 1. All implementations are in memory at once.
"""

import sys
from argparse import Namespace
from pathlib import Path

from sana.utils.cli import Parser, at_least, words

MODELS = {"0.6B": "SanaMS_600M_P1_D28", "1.6B": "SanaMS_1600M_P1_D20", "tiny": "SanaMS_Tiny_P1_D8"}
CONFIGS = {
    256: "configs/sana_config/tiny/Sana_tiny_img256.yaml",
    512: "configs/sana_config/512ms/Sana_1600M_img512.yaml",
    1024: "configs/sana_config/1024ms/Sana_1600M_img1024.yaml",
}
IMPLEMENTATIONS = ("ours", "ours_compiled", "diffusers", "diffusers_compiled")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, help="default: 0.6B, on a CPU tiny")
    add("--size", type=int, choices=CONFIGS, help="pixels a side (default: 512, of tiny 256)")
    add("--batch", type=at_least(1), help="images (default: 64, on a CPU 4)")
    add("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="of autocast (default: bf16)")
    add(
        "--implementations", type=words, help=f"some of {','.join(IMPLEMENTATIONS)} (default: ours,diffusers)"
    )
    add("--repeats", type=at_least(1), default=10, help="steps of which the median is taken (default: 10)")
    add("--threads", type=at_least(1), help="of the processor (default: PyTorch's choice)")
    add("--output", type=Path, help="file for a JSON report")
    return parser


def run(args: Namespace, overrides: list[str]) -> None:
    """Compare, measure, print and report. Torch is imported only here."""
    names = args.implementations or ["ours", "diffusers"]
    if unknown := sorted(set(names) - set(IMPLEMENTATIONS)):
        raise ValueError(
            f"--implementations: unknown {', '.join(unknown)}; choose from {', '.join(IMPLEMENTATIONS)}"
        )
    import torch

    from sana.benchmarks import timing, training_step
    from sana.config import SanaConfig, load_config
    from sana.metrics.report import make_report

    if args.threads:
        torch.set_num_threads(args.threads)
    cuda = torch.cuda.is_available()
    model = args.model or ("0.6B" if cuda else "tiny")
    size = args.size or (256 if model == "tiny" else 512)
    batch = args.batch or (64 if cuda else 4)

    def load(compiled: bool) -> SanaConfig:
        settings = [
            f"--model.model={MODELS[model]}",
            f"--model.mixed_precision={args.precision}",
            "--model.load_from=",
            "--text_encoder.y_norm_scale_factor=1",
            f"--train.train_batch_size={batch}",
            "--train.optimizer={type: AdamW, lr: 1e-5, weight_decay: 0.01, fused: true}",
            "--train.ema_update=false",
            "--train.grad_checkpointing=false",
            "--train.auto_lr=",
            f"--train.compile={compiled}".lower(),
        ]
        return load_config(CONFIGS[size], [*settings, *overrides])

    found = training_step.measure(load, names, args.repeats)
    for name, row in found.figures.items():
        share = (
            f"{row['mfu']:.1%} MFU"
            if "mfu" in row
            else f"{row['share_of_matmul']:.0%} of a matrix product's rate"
        )
        speedup = f"x{row['speedup']:.2f} of diffusers  " if "speedup" in row else ""
        speed = f"{row['seconds'] * 1e3:9.1f} ms {row['images_per_second']:8.2f} images/s"
        print(
            f"{name:19}{speed}  {speedup}first {row['first_call']:.1f} s  {share}  load {row['load']:.1f}",
            flush=True,
        )
    if args.output:
        settings = {
            "model": model,
            "size": size,
            "batch": batch,
            "overrides": overrides,
            "failed": found.failed,
        }
        make_report(
            metric="training",
            values={str(batch): found.figures},
            n=args.repeats,
            protocol="median of interleaved optimizer steps on equal cached features, 40 valid text tokens; call_bytes "
            "beside weights, gradients and the optimizer's state",
            settings=settings | timing.settings_of_this_run(torch.device("cuda" if cuda else "cpu")),
            dtype=f"{args.precision} autocast",
        ).save(args.output)
    for text in found.failed:
        print(f"bench_train.py: error: wrong, not measured: {text}", file=sys.stderr)
    if found.failed:
        sys.exit(1)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, *parser.parse_known_args())
