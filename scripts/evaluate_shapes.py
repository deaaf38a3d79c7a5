"""Measure how well a model follows prompts, on the shapes benchmark (asset/docs/shapes_benchmark.md).

Draws four images for each of its 260 held-out prompts and scores them; the embedded model when none is named:

    python scripts/evaluate_shapes.py --output report.json
    python scripts/evaluate_shapes.py --images FOLDER        # score images that are there already

The table goes to stderr, the JSON report to stdout or --output. A second run goes on where the first stopped.
`torchrun` divides the drawing among processes.
"""

import argparse
import json
import sys
from pathlib import Path

from sana.shapes.benchmark import PROMPTS_FILE


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; nothing heavy is imported before it is found valid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, help="score this folder: drawn by this repository, or in GenEval's layout"
    )
    parser.add_argument("--prompts", default=PROMPTS_FILE, help="JSONL file with one GenEval record a line")
    parser.add_argument("--limit", type=int, help="only so many prompts of each tag, spread over its list")
    parser.add_argument("--output", type=Path, help="JSON report; stdout when left out")
    parser.add_argument(
        "--records", type=Path, help="JSONL file for the verdict, reason and boxes of every image"
    )
    model = parser.add_argument_group("model and sampling (without --images)")
    model.add_argument("--config", help="YAML config; the embedded model when left out")
    model.add_argument("--model_path", help="weights of the transformer; those of the config when left out")
    model.add_argument(
        "--ema", action="store_true", help="use the averaged weights of the training checkpoint --model_path"
    )
    model.add_argument("--steps", "--step", type=int, default=20, help="sampling steps (20)")
    model.add_argument("--cfg_scale", type=float, default=4.5, help="guidance scale (4.5)")
    model.add_argument(
        "--sampler", "--sampling_algo", help="flow_dpm-solver or flow_euler; the config's when left out"
    )
    model.add_argument("--seed", type=int, default=0, help="decides the noise of every image (0)")
    model.add_argument("--bs", type=int, default=32, help="images drawn at once (32)")
    model.add_argument(
        "--work_dir", type=Path, default=Path("output/shapes_benchmark"), help="images go below it"
    )
    args = parser.parse_args(arguments)
    if args.ema and not args.model_path:
        parser.error("--ema needs --model_path: a training checkpoint that holds averaged weights")
    return args


def draw_images(args: argparse.Namespace, prompts: dict) -> tuple[Path, dict]:
    """Draw what is missing; returns the folder and what the report says of the model."""
    from sana.evaluation import shapes_benchmark
    from sana.generation import Settings, folder_name
    from sana.pipeline import SanaPipeline

    pipeline = SanaPipeline(config_path=args.config)
    if args.model_path:
        pipeline.from_pretrained(args.model_path)
    if args.ema:
        load_averaged(pipeline)
    settings = Settings(
        seed=args.seed, num_inference_steps=args.steps, guidance_scale=args.cfg_scale, sampler=args.sampler
    )
    folder = args.work_dir / folder_name(pipeline, settings, "shapes", label="_ema" if args.ema else "")
    shapes_benchmark.draw(pipeline, prompts, folder, settings, batch_size=args.bs, progress=True)
    extra = {"ema": args.ema, "device": str(pipeline.device)}
    return folder, {"weights": shapes_benchmark.weight_hashes(pipeline), "extra": extra}


def load_averaged(pipeline) -> None:  # noqa: ANN001 SanaPipeline is imported late
    """Replace the transformer's weights by the averaged ones of the same checkpoint."""
    import torch

    from sana.models.state_dict import load_into

    is_checkpoint = pipeline.weights.suffix == ".pth"
    checkpoint = torch.load(pipeline.weights, map_location="cpu", weights_only=True) if is_checkpoint else {}
    if "state_dict_ema" not in checkpoint:
        raise ValueError(f"{pipeline.weights} holds no averaged weights (state_dict_ema); leave --ema out")
    load_into(pipeline.transformer, checkpoint["state_dict_ema"])


def main() -> None:
    """Draw unless --images is given, score, report."""
    args = parse_args()
    from sana.evaluation import shapes_benchmark
    from sana.metrics.geneval import load_prompts
    from sana.utils import distributed, hub, logging

    logging.configure()
    try:
        prompts = shapes_benchmark.subset(load_prompts(hub.resolve(args.prompts)), args.limit)
        folder, about = (args.images, {}) if args.images else draw_images(args, prompts)
        if not distributed.is_main():
            return
        records = shapes_benchmark.score(shapes_benchmark.find_images(folder, prompts))
        report = shapes_benchmark.report(records, folder, **about)
    except ValueError as error:
        sys.exit(f"error: {error}")

    print(shapes_benchmark.table(records), file=sys.stderr)
    if args.records:
        args.records.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    if args.output:
        report.save(args.output)
    else:
        print(report.to_json(), end="")


if __name__ == "__main__":
    main()
