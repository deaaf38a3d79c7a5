"""Frechet distance of a folder of pictures from a reference: FID, and its kin over CLIP and DINOv2 features.

    python tools/metrics/fid.py IMAGES --reference MJHQ-30K/imgs --prompts MJHQ-30K/meta_data.json

The reference is a folder, or the statistics of one (.npz with mu and sigma, as pytorch-fid writes them; --save_reference
keeps them). Where the prompts have ids, both sets are the pictures of the first --sample_nums of them. --preset says how
pictures are put into the Inception: pytorch-fid@512 is the protocol of Sana's tables; pytorch-fid, torch-fidelity, clean are
those of the libraries, each also with a size behind "@". Distances of different presets or numbers of pictures do not compare.
JSON on stdout and in a file, a table on stderr; an interrupted run goes on; torchrun divides the work.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from sana.metrics import command
from sana.utils.cli import Parser

if TYPE_CHECKING:
    from sana.metrics.fid import Statistics
    from sana.metrics.image_set import ScoredImage

FEATURES = ("inception", "clip-vit-b-32", "clip-vit-l-14", "dinov2-vit-b-14", "dinov2-vit-l-14")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    command.add_flags(parser, batch_size=50)
    parser.add_argument("--reference", required=True, help="folder of pictures, or .npz of statistics")
    parser.add_argument("--features", choices=FEATURES, default="inception", help="default: inception")
    parser.add_argument("--preset", help="of the Inception (default: pytorch-fid@512)")
    parser.add_argument(
        "--dims", type=int, choices=(64, 192, 768, 2048), help="of the Inception (default: 2048)"
    )
    parser.add_argument("--save_stats", metavar="NPZ", help="write the statistics of IMAGES")
    parser.add_argument("--save_reference", metavar="NPZ", help="write the statistics of the reference")
    return parser


def read_reference(args: Namespace) -> "Statistics | list[ScoredImage]":
    """Statistics, or the pictures of a folder."""
    from sana.metrics.fid import Statistics
    from sana.metrics.image_set import read_image_set

    if Path(args.reference).suffix == ".npz":
        return Statistics.load(args.reference)
    by_id = args.prompts if Path(args.prompts or "").suffix.lower() == ".json" else None
    if args.sample_nums and not by_id:
        raise ValueError(
            "--sample_nums would not cut the reference, whose pictures are found by the ids of --prompts FILE.json: "
            "give that, or its statistics (.npz)"
        )
    return read_image_set(args.reference, by_id, limit=args.sample_nums, allow_missing=args.allow_missing)


def run(args: Namespace) -> None:
    """Measure and report."""
    from sana.utils import distributed, logging

    logging.configure()
    items = command.read_images(args, prompted=False)
    from sana.loading import find_device
    from sana.metrics import features, fid

    reference = read_reference(args)
    network = features.feature_network(
        args.features,
        preset=args.preset,
        dims=args.dims,
        weights=args.weights,
        device=find_device(args.device),
    )
    chosen = (args.features if args.features != "inception" else None, args.preset, args.dims)
    name = "-".join(["fid", *(str(value) for value in chosen if value)])  # each kind in files of its own
    settings = command.loop(args, name)
    settings["settings"]["reference"] = args.reference
    report, statistics, reference = fid.measure(items, reference, network, **settings)
    json, table = command.publish(report, command.report_path(args, name))
    if distributed.is_main():
        if args.save_stats:
            statistics.save(args.save_stats)
        if args.save_reference:
            reference.save(args.save_reference)
    print(table, end="", file=sys.stderr)
    print(json, end="")


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
