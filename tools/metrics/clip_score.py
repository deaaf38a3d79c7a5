"""CLIP score of a folder of pictures: the mean of 100 cos(picture, prompt), over all and over each category.

    python tools/metrics/clip_score.py IMAGES --prompts MJHQ-30K/meta_data.json

Without --prompts they are those of the folder's manifest. The network is OpenAI's ViT-L/14, as in Sana's tables; scores are
not clamped at 0, and of a prompt longer than 77 tokens the beginning counts. JSON on stdout and in a file, a table on
stderr; an interrupted run goes on; torchrun divides the work.
"""

import sys
from argparse import Namespace

from sana.metrics import command
from sana.utils.cli import Parser


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    command.add_flags(parser, batch_size=50)
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16, fp16 (default: %(default)s)")
    return parser


def run(args: Namespace) -> None:
    """Measure and report."""
    from sana.utils import logging

    logging.configure()
    items = command.read_images(args)
    from sana.loading import find_device, find_dtype
    from sana.metrics import alignment
    from sana.metrics.clip_score import ClipScorer

    place = {"dtype": find_dtype(args.dtype), "device": find_device(args.device)}
    scorer = ClipScorer.from_pretrained(args.weights, **place)
    report = alignment.measure(scorer, items, **command.loop(args, "clip_score"))
    json, table = command.publish(report, command.report_path(args, "clip_score"))
    print(table, end="", file=sys.stderr)
    print(json, end="")


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
