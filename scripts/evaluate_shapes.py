"""Measure how well a model follows prompts, on the shapes benchmark (asset/docs/shapes_benchmark.md).

Draws four images for each of its 260 held-out prompts and scores them; the embedded model when none is named:

    python scripts/evaluate_shapes.py --output report.json
    python scripts/evaluate_shapes.py --images FOLDER        # score images that are there already

The table goes to stderr, the JSON report to stdout or --output. A second run goes on where the first stopped.
`torchrun` divides the drawing among processes. Words like --model.mixed_precision=bf16 override the config.
"""

import sys
from argparse import Namespace
from pathlib import Path

from sana.shapes.benchmark import PROMPTS_FILE
from sana.utils.cli import Parser, at_least


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--images", type=Path, help="score this folder: drawn by this repository, or in GenEval's layout")
    add("--prompts", default=PROMPTS_FILE, help="JSONL file with one GenEval record a line")
    add("--limit", type=at_least(1), help="only so many prompts of each tag, spread over its list")
    add("--output", type=Path, help="file for the report (default: stdout)")
    add("--records", type=Path, help="JSONL file for the verdict, reason and boxes of every image")
    add = parser.add_argument_group("model and sampling (without --images)").add_argument
    add("--config", help="YAML file (default: config.yaml beside --model_path, else the embedded model's)")
    add("--model_path", help="transformer: path or hf://owner/repo/file (default: the config's load_from)")
    add("--ema", action="store_true", help="the averaged weights of the training checkpoint --model_path")
    add("--steps", "--step", type=at_least(1), default=20, help="network evaluations (default: 20)")
    add("--cfg_scale", type=float, default=4.5, help="classifier-free guidance; 1 is off (default: 4.5)")
    add("--sampler", "--sampling_algo", help="flow_dpm-solver or flow_euler (default: the config's)")
    add("--seed", type=int, default=0, help="of the noise, together with a prompt's place in its file")
    add("--bs", type=at_least(1), default=32, help="images drawn at once (default: 32)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--dtype", help="fp32, bf16 or fp16, of the transformer (default: the config's, and fp32 on a CPU)")
    add("--work_dir", type=Path, default=Path("output/shapes_benchmark"), help="the images go below it")
    return parser


def run(args: Namespace, overrides: list[str]) -> None:
    """Draw unless --images is given, score, report."""
    from sana.evaluation import shapes_benchmark
    from sana.metrics.geneval import load_prompts, table
    from sana.metrics.geneval_folder import write_records
    from sana.utils import distributed, hub, logging

    logging.configure()
    if args.images and (overrides or args.model_path or args.config):
        raise ValueError("--images scores a folder as it is: leave config, model and overrides out")
    if args.ema and not args.model_path:
        raise ValueError("--ema needs --model_path: a training checkpoint that holds averaged weights")
    prompts = shapes_benchmark.subset(load_prompts(hub.resolve(args.prompts)), args.limit)
    folder, about = (args.images, {}) if args.images else draw(args, overrides, prompts)
    if not distributed.is_main():
        return
    records = shapes_benchmark.score(shapes_benchmark.find_images(folder, prompts))
    report = shapes_benchmark.report(records, folder, **about)

    print(table(records), file=sys.stderr)
    if args.records:
        write_records(records, args.records)
    if args.output:
        report.save(args.output)
    else:
        print(report.to_json(), end="")


def draw(args: Namespace, overrides: list[str], prompts: dict) -> tuple[Path, dict]:
    """Draw what is missing (this imports torch); returns the folder and what the report says of the model."""
    from sana.config import load_config
    from sana.evaluation import shapes_benchmark
    from sana.evaluation.goldens import weight_hashes
    from sana.generation import Settings, folder_name
    from sana.pipeline import DEFAULT_CONFIG, SanaPipeline
    from sana.utils import hub

    config = args.config or DEFAULT_CONFIG
    if args.model_path:
        config = args.config or hub.find_beside(args.model_path, "config.yaml")
        overrides = [*overrides, f"--model.load_from={args.model_path}"]
    pipeline = SanaPipeline(load_config(config, overrides), device=args.device, dtype=args.dtype)
    if args.ema:
        load_averaged(pipeline)
    settings = Settings(
        seed=args.seed,
        num_inference_steps=args.steps,
        guidance_scale=args.cfg_scale,
        sampler=args.sampler,
    )
    folder = args.work_dir / folder_name(pipeline, settings, "shapes", label="_ema" if args.ema else "")
    shapes_benchmark.draw(pipeline, prompts, folder, settings, batch_size=args.bs, progress=True)
    extra = {"ema": args.ema, "device": str(pipeline.device)}
    return folder, {"weights": weight_hashes(pipeline), "extra": extra}


def load_averaged(pipeline) -> None:  # noqa: ANN001 SanaPipeline is imported late
    """Replace the transformer's weights by the averaged ones of the same checkpoint."""
    from sana.models.state_dict import load_into, load_transformer_state

    load_into(pipeline.transformer, load_transformer_state(pipeline.weights, ema=True))


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, *parser.parse_known_args())
