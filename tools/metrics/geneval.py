"""GenEval of a folder of images: which share of them shows the objects, counts, colours and positions that were asked for.

    python tools/metrics/geneval.py FOLDER
    python tools/metrics/geneval.py FOLDER --detector shapes      # images of Sana-tiny

FOLDER has the published layout, 00000/metadata.jsonl and 00000/samples/00000.png and so on, or is one that
scripts/inference.py wrote (then with --prompts). The table goes to stderr, the JSON report to stdout and --output, the verdict
and reason of every image to --records, as published. A second run goes on where the first stopped; torchrun divides the work.
What differs from the published evaluator: asset/docs/metrics_toolkit.md.
"""

import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from sana.metrics.geneval import GenEvalOptions
from sana.utils.cli import Parser, boolean

OPTIONS = asdict(GenEvalOptions())
NETWORK_FLAGS = (*OPTIONS, "detector_path", "clip_path", "bgcolor", "crop", "device", "dtype")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("images", metavar="FOLDER", help="the images")
    add("--prompts", help="evaluation_metadata.jsonl: each of its prompts must have an image")
    add("--allow_missing", action="store_true", help="measure what is there, name what is not")
    add("--output", help="the report (default: FOLDER.geneval.json, beside the folder)")
    add("--records", type=Path, help="all verdicts (default: as the report, but .jsonl)")
    add("--work", help="partial results, to go on from (default: as the report, but .work); may be removed")
    add("--detector", default="mask2former", choices=("mask2former", "shapes"), help="default: %(default)s")
    add = parser.add_argument_group("with --detector mask2former").add_argument
    add(
        "--detector_path",
        help="transformers folder or hub name (default: facebook/mask2former-swin-small-coco-instance)",
    )
    add("--clip_path", help="for colours: folder or hub name (default: openai/clip-vit-large-patch14)")
    for name, value in OPTIONS.items():
        add(f"--{name}", type=type(value), help=f"default, as published: {value}")
    add("--bgcolor", help='around an object whose colour is named, or "original" (default: #999)')
    add("--crop", type=boolean, help="show CLIP the object's box alone (default: true)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--dtype", help="fp32, bf16, fp16, of detector and CLIP (default: fp32)")
    return parser


def run(args: Namespace) -> None:
    """Score and report."""
    from sana.metrics.command import publish, report_path, work_folder
    from sana.metrics.geneval import load_prompts, table
    from sana.metrics.geneval_folder import read_samples, report, score, write_records
    from sana.utils import distributed, hub, logging

    logging.configure()
    prompts = dict(enumerate(load_prompts(hub.resolve(args.prompts)))) if args.prompts else None
    samples = read_samples(args.images, prompts, allow_missing=args.allow_missing)
    eyes = load_eyes(args)
    path = report_path(args, "geneval")
    records = score(samples, eyes, work_folder(args, "geneval"))
    if distributed.is_main():
        write_records(records, args.records or path.with_suffix(".jsonl"))
        print(table(records), file=sys.stderr)
    print(publish(report(samples, records, eyes), path)[0], end="")


def load_eyes(args: Namespace) -> object:
    """The detector and the colour classifier that the flags name."""
    from sana.metrics.geneval_folder import shapes_eyes

    chosen = {
        name: value for name, value in vars(args).items() if name in NETWORK_FLAGS and value is not None
    }
    if args.detector == "shapes":
        if chosen:
            raise ValueError(f"--{next(iter(chosen))} is for --detector mask2former; leave it out")
        return shapes_eyes()
    from sana.loading import find_device, find_dtype
    from sana.metrics.mask2former import CLIP_NAME, DETECTOR_NAME, mask2former_eyes

    return mask2former_eyes(
        chosen.get("detector_path", DETECTOR_NAME),
        chosen.get("clip_path", CLIP_NAME),
        options=GenEvalOptions(**{name: chosen.get(name, value) for name, value in OPTIONS.items()}),
        background=chosen.get("bgcolor", "#999"),
        crop=chosen.get("crop", True),
        dtype=find_dtype(args.dtype or "fp32"),
        device=find_device(args.device),
    )


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
