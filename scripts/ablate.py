"""Train the embedded model without one part after another, all else equal, and score each: a table of what they are worth.

    torchrun --nproc_per_node=2 scripts/ablate.py --steps 3000 --output ablations.json
    python scripts/ablate.py --variants sana,no_depthwise --steps 3000 --output ablations.json

Every variant starts from the same random numbers and sees the same samples, times and noise. A second run goes on where the
first stopped. Words like --train.feature_cache_dir=FOLDER override the config.
"""

import sys
from argparse import Namespace
from pathlib import Path

from sana.utils.cli import Parser, at_least, words


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--config", help="YAML file (default: the embedded model's)")
    add("--variants", type=words, help="comma between (default: all of sana.benchmarks.ablations)")
    add("--steps", type=at_least(1), required=True, help="optimizer steps of each")
    add("--limit", type=at_least(1), default=6, help="prompts of each of the six tags (default: 6)")
    add("--bs", type=at_least(1), default=16, help="images drawn at once (default: 16)")
    add(
        "--work_dir",
        type=Path,
        default=Path("output/ablations"),
        help="each variant trains in a folder of it",
    )
    add("--output", type=Path, required=True, help="file for the JSON report")
    return parser


def run(args: Namespace, overrides: list[str]) -> None:
    """Train and score each; the main process prints the table and writes the report. Torch is imported only here."""
    from sana.benchmarks.ablations import VARIANTS, measure
    from sana.evaluation import shapes_benchmark as benchmark
    from sana.metrics.geneval import load_prompts
    from sana.metrics.report import make_report
    from sana.pipeline import DEFAULT_CONFIG
    from sana.shapes.benchmark import IMAGES_PER_PROMPT, PROMPTS_FILE
    from sana.utils import distributed, hub, logging

    names = args.variants or list(VARIANTS)
    if wrong := [name for name in names if name not in VARIANTS]:
        raise ValueError(f"--variants: unknown {wrong[0]!r}; choose from {', '.join(VARIANTS)}")
    logging.configure()
    prompts = benchmark.subset(load_prompts(hub.resolve(PROMPTS_FILE)), args.limit)
    config = args.config or DEFAULT_CONFIG
    settings = [*overrides, f"--train.max_steps={args.steps}"]
    values = {}
    for name in names:
        found = measure(name, config, settings, prompts, args.work_dir / name, batch_size=args.bs)
        if found is None:
            sys.exit("stopped and saved: the same command goes on")
        values[name] = found
        if distributed.is_main():
            print(
                f"{name:36} held-out loss {found['heldout_loss']:.4f}  score {found['overall']:.3f}",
                flush=True,
            )
    if not distributed.is_main():
        return
    report = make_report(
        metric="GenEval (shapes) without a part",
        values=values,
        n=len(prompts) * IMAGES_PER_PROMPT,
        protocol=f"{benchmark.PROTOCOL}; every variant trained from the same random numbers on the same samples",
        settings={"steps": args.steps, "limit": args.limit, "processes": distributed.world_size()},
        dtype="float32",
    )
    report.save(args.output)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, *parser.parse_known_args())
