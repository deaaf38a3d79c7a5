"""From a checkpoint to its numbers: draws the pictures of each suite, measures them, keeps a report of each metric.

    python scripts/evaluate.py CONFIG CHECKPOINT --suite mjhq,geneval,dpg,image_reward --compare
    python scripts/evaluate.py --suite shapes                    # the model of the repository, without a network

CONFIG may be left out for what CHECKPOINT says of itself. mjhq is FID and CLIP score on MJHQ-30K; geneval, dpg and image_reward
are their benchmarks; shapes is the one of Sana-tiny. Reports are lines of results.jsonl in --work_dir, and numbers are in
TensorBoard there. A second run draws and scores what is missing; torchrun divides the work. A metric that fails costs no other one;
the exit status is then 2. Words like --model.mixed_precision=bf16 override the config. See asset/docs/metrics_toolkit.md.
"""

import contextlib
import re
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from sana.utils.cli import Parser, at_least, words

if TYPE_CHECKING:
    from sana.metrics.report import Report
    from sana.pipeline import SanaPipeline

RESULTS = "results.jsonl"
# Flag, help: fields of `sana.evaluation.suites.Sources`.
SOURCES = {
    "mjhq": "folder with meta_data.json and imgs (default: data/test/PG-eval-data/MJHQ-30K)",
    "reference": "of FID: folder of pictures or .npz (default: imgs of --mjhq)",
    "geneval_prompts": "default: data/test/geneval/evaluation_metadata.jsonl",
    "dpg_csv": "default: data/test/dpg_bench/dpg_bench.csv",
    "image_reward_prompts": "default: data/test/image_reward/benchmark-prompts.json",
    "inception": "of FID: file in place of the published weights",
    "clip": "of CLIP score and GenEval's colours: folder or hub name (default: openai/clip-vit-large-patch14)",
    "detector": "of GenEval: folder or hub name, or shapes (default: facebook/mask2former-swin-small-coco-instance)",
    "judge": "of DPG-Bench: BLIP, ViLT or chat model (default: Salesforce/blip-vqa-capfilt-large)",
    "reward": "of ImageReward: file in place of the published weights",
    "reward_tokenizer": "of ImageReward: folder or hub name (default: bert-base-uncased)",
}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("paths", nargs="*", metavar="CONFIG CHECKPOINT", help="YAML file and weights, or either alone")
    add("--suite", type=words, default=[], help="some of mjhq,geneval,dpg,image_reward,shapes")
    add("--compare", action="store_true", help="print the paper's table with our row, from results.jsonl")
    add("--work_dir", type=Path, default=Path("output/evaluation"), help="default: %(default)s")
    add("--add_label", default="", help="end of the names of the folders of pictures")
    add("--limit", type=at_least(1), help="so many prompts of each suite (GenEval: of each tag)")
    add = parser.add_argument_group("drawing").add_argument
    add("--step", type=at_least(1), help="network evaluations (default: 20, 28 for flow_euler, 2 for scm)")
    add("--cfg_scale", type=float, default=4.5, help="classifier-free guidance; 1 is off (default: 4.5)")
    add("--pag_scale", type=float, default=1.0, help="perturbed-attention guidance; 1 is off (default: 1)")
    add("--sampling_algo", help="flow_dpm-solver, flow_euler, scm for Sprint (default: the config's)")
    add("--seed", type=int, default=0, help="of the noise, together with a prompt's place in its file")
    add("--bs", type=at_least(1), default=4, help="pictures drawn at once (default: 4)")
    add(
        "--jpeg_quality",
        type=at_least(1),
        help="JPEG, colours at half resolution; published: 75 (default: PNG)",
    )
    add("--dpg_grids", action="store_true", help="also 2 x 2 grids, ID.png, for the published DPG evaluator")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--dtype", help="fp32, bf16 or fp16, of the transformer (default: the config's, and fp32 on a CPU)")
    add = parser.add_argument_group("prompts and networks of the metrics").add_argument
    for name, text in SOURCES.items():
        add(f"--{name}", help=text)
    return parser


def run(args: Namespace, overrides: list[str]) -> None:
    """Draw, measure, report, compare."""
    from sana.utils import distributed, logging

    logging.configure()
    from sana.evaluation.published import comparison, read_results
    from sana.loading import find_config
    from sana.pipeline import SanaPipeline

    is_config = [Path(path).suffix in (".yaml", ".yml") for path in args.paths]
    if len(args.paths) > 2 or (len(args.paths) == 2 and is_config != [True, False]):
        raise ValueError(f"expected CONFIG.yaml and CHECKPOINT, got {' '.join(args.paths)}")
    config = args.paths[0] if True in is_config else None
    config = find_config(config, args.paths[-1] if False in is_config else None, overrides)
    if not (args.suite or args.compare):
        raise ValueError("name what to measure (--suite mjhq,geneval,dpg,image_reward,shapes), or --compare")
    pipeline = SanaPipeline(config, device=args.device, dtype=args.dtype)
    failures = measure(args, pipeline) if args.suite else {}
    if distributed.is_main() and args.compare:
        ours = read_results(args.work_dir / RESULTS, pipeline.weights_sha256)
        print(comparison(ours, pipeline.config.model.image_size, pipeline.config.model.model))
    if failures:
        raise ValueError(f"failed: {', '.join(failures)} (reasons above); what is done is kept")


def measure(args: Namespace, pipeline: "SanaPipeline") -> dict[str, str]:
    """Run the suites; what failed."""
    from torch.utils.tensorboard import SummaryWriter

    from sana.evaluation import suites
    from sana.evaluation.goldens import weight_hashes
    from sana.generation import Settings
    from sana.utils import distributed

    jpeg = {"image_format": "jpg", "jpeg_quality": args.jpeg_quality, "jpeg_subsampling": "4:2:0"}
    settings = Settings(
        seed=args.seed,
        num_inference_steps=args.step,
        guidance_scale=args.cfg_scale,
        pag_guidance_scale=args.pag_scale,
        sampler=args.sampling_algo,
        **(jpeg if args.jpeg_quality else {}),
    )
    names = (field.name for field in fields(suites.Sources))
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    sources = suites.Sources(**chosen | {"device": pipeline.device})
    step = int((re.search(r"step_(\d+)", str(pipeline.weights)) or [0, 0])[1])
    logs = SummaryWriter(args.work_dir / "logs") if distributed.is_main() else contextlib.nullcontext()

    def publish(report: "Report") -> None:
        print(suites.append_result(report, args.work_dir / RESULTS), flush=True)
        for name, value in suites.scalars(report).items():
            writer.add_scalar(name, value, step)

    with logs as writer:
        outcome = suites.evaluate(
            pipeline,
            args.suite,
            sources,
            settings,
            args.work_dir,
            batch_size=args.bs,
            label=args.add_label,
            weights=weight_hashes(pipeline),
            publish=publish,
            progress=True,
        )
    return dict(outcome.failures)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, *parser.parse_known_args())
