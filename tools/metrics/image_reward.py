"""What people would like: the mean ImageReward, PickScore or HPSv2.1 of a folder of pictures.

    python tools/metrics/image_reward.py IMAGES --prompts benchmark-prompts-dict.json
    python tools/metrics/image_reward.py IMAGES --model PickScore

Pictures are named ID.jpg or ID_SAMPLE.jpg by the ids of the prompts; without --prompts these are those of the folder's
manifest. JSON on stdout and in a file, a table on stderr; an interrupted run goes on; torchrun divides the work.
"""

import sys
from argparse import Namespace

from sana.metrics import command
from sana.utils.cli import Parser

MODELS = {"ImageReward": "image_reward", "PickScore": "pick_score", "HPSv2.1": "hps"}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    command.add_flags(parser, batch_size=32)
    parser.add_argument("--model", choices=MODELS, default="ImageReward", help="default: %(default)s")
    parser.add_argument("--tokenizer", help="of ImageReward or PickScore: folder or hub name")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16, fp16 (default: %(default)s)")
    return parser


def run(args: Namespace) -> None:
    """Measure and report."""
    from sana.utils import logging

    logging.configure()
    items = command.read_images(args)
    from sana.loading import find_device, find_dtype
    from sana.metrics import alignment, preference

    place = {"dtype": find_dtype(args.dtype), "device": find_device(args.device)}
    scorer = preference.load_scorer(args.model, args.weights, tokenizer=args.tokenizer, **place)
    report = alignment.measure(scorer, items, **command.loop(args, MODELS[args.model]))
    json, table = command.publish(report, command.report_path(args, MODELS[args.model]))
    print(table, end="", file=sys.stderr)
    print(json, end="")


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
