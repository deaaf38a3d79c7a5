"""Score against steps of each solver, on the shapes benchmark: JSON, and a plot.

    python scripts/bench_steps.py --output steps.json --plot steps.png
    torchrun --nproc_per_node=2 scripts/bench_steps.py --limit 10 --output steps.json

All settings draw the same prompts from the same noise. A second run goes on where the first stopped. Words like
--model.load_from=my.pth override the config.
"""

import math
from argparse import Namespace
from pathlib import Path

from sana.utils.cli import Parser, at_least, words


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--config", help="YAML file (default: the embedded model's)")
    add("--steps", type=words, default=words("6,8,10,14,20,28,50"), help="default: 6,8,10,14,20,28,50")
    add("--samplers", type=words, default=words("flow_dpm-solver,flow_euler"), help="comma between")
    add("--cfg_scale", type=float, default=4.5, help="classifier-free guidance; 1 is off (default: 4.5)")
    add("--limit", type=at_least(1), default=10, help="prompts of each of the six tags (default: 10)")
    add("--bs", type=at_least(1), default=16, help="images drawn at once (default: 16)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--dtype", help="fp32, bf16 or fp16, of the transformer")
    add("--work_dir", type=Path, default=Path("output/bench_steps"), help="the images go below it")
    add("--output", type=Path, required=True, help="file for the JSON report")
    add("--plot", type=Path, help="PNG or SVG file")
    return parser


def run(args: Namespace, overrides: list[str]) -> None:
    """Draw and score every setting; the main process writes the report. Torch is imported only here."""
    from sana.config import load_config
    from sana.evaluation import shapes_benchmark as benchmark
    from sana.evaluation.goldens import weight_hashes
    from sana.generation import Settings, folder_name
    from sana.metrics.geneval import load_prompts
    from sana.metrics.report import make_report
    from sana.pipeline import DEFAULT_CONFIG, SAMPLERS, SanaPipeline
    from sana.shapes.benchmark import IMAGES_PER_PROMPT, PROMPTS_FILE
    from sana.utils import distributed, hub, logging

    if wrong := [text for text in args.steps if not text.isdecimal() or int(text) < 1]:
        raise ValueError(f"--steps: {wrong[0]!r} is no number of steps")
    if wrong := [name for name in args.samplers if name not in SAMPLERS]:
        raise ValueError(f"--samplers: unknown {wrong[0]!r}; choose from {', '.join(SAMPLERS)}")
    logging.configure("WARNING")
    prompts = benchmark.subset(load_prompts(hub.resolve(PROMPTS_FILE)), args.limit)
    config = load_config(args.config or DEFAULT_CONFIG, overrides)
    pipeline = SanaPipeline(config, device=args.device, dtype=args.dtype)
    values: dict[str, dict[str, dict]] = {sampler: {} for sampler in args.samplers}
    for sampler in args.samplers:
        for steps in sorted(map(int, args.steps)):
            settings = Settings(
                seed=0, num_inference_steps=steps, guidance_scale=args.cfg_scale, sampler=sampler
            )
            folder = args.work_dir / folder_name(pipeline, settings, "shapes")
            found = benchmark.draw_and_score(pipeline, prompts, folder, settings, batch_size=args.bs)
            if found is not None:
                values[sampler][str(steps)] = found
                print(f"{sampler:16} {steps:3} steps  {found['overall']:.3f}", flush=True)
    if not distributed.is_main():
        return
    images = len(prompts) * IMAGES_PER_PROMPT
    report = make_report(
        metric="GenEval (shapes) against steps",
        values=values,
        n=images,
        protocol=f"{benchmark.PROTOCOL}; the same prompts and noise at each number of steps",
        settings={"limit": args.limit, "guidance_scale": args.cfg_scale},
        weights=weight_hashes(pipeline),
        dtype=str(pipeline.dtype).removeprefix("torch."),
    )
    report.save(args.output)
    if args.plot:
        plot(
            {name: {int(n): row["overall"] for n, row in of.items()} for name, of in values.items()},
            images,
            args.plot,
        )
        print(args.plot)


def plot(scores: dict[str, dict[int, float]], images: int, path: Path) -> None:
    """A curve for each solver, with a band of one standard error of a share of `images` images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, points in scores.items():
        steps, means = list(points), list(points.values())
        errors = [math.sqrt(mean * (1 - mean) / images) for mean in means]
        axes.plot(steps, means, marker="o", markersize=4, label=name)
        bounds = [
            [m - e for m, e in zip(means, errors, strict=True)],
            [m + e for m, e in zip(means, errors, strict=True)],
        ]
        axes.fill_between(steps, *bounds, alpha=0.15)
    axes.set_xscale("log")
    ticks = sorted({n for points in scores.values() for n in points})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("steps")
    axes.set_ylabel("score")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, *parser.parse_known_args())
