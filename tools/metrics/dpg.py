"""DPG-Bench of a folder of pictures: how much of a long prompt they show, by questions to a vision-language model.

    python tools/metrics/dpg.py FOLDER                                      # ID.png, ID-s1.png, ...: four of each prompt
    python tools/metrics/dpg.py FOLDER --grid 2 --judge Qwen/Qwen2.5-VL-7B-Instruct      # ID.jpg: grids of make_grid
    python tools/metrics/dpg.py --answers dpg-bench_results_detail.txt --compat ella     # counted again, no judge

The questions are those of dpg_bench.csv. The table goes to stderr, the JSON report to stdout and --output, every answer to
--records, as published. A second run goes on where the first stopped; torchrun divides the work. What differs from the
published evaluator: asset/docs/metrics_toolkit.md.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from sana.utils.cli import Parser, at_least

if TYPE_CHECKING:
    from sana.metrics.dpg import Item
    from sana.metrics.dpg_folder import Protocol
    from sana.metrics.report import Report

QUESTIONS = "data/test/dpg_bench/dpg_bench.csv"


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("images", metavar="FOLDER", nargs="?", help="the pictures, named by the ids of their prompts")
    add("--csv", default=QUESTIONS, help="the question file (default: %(default)s)")
    add(
        "--grid",
        type=at_least(0),
        metavar="PADDING",
        help="each file is a 2 x 2 grid; 2 for make_grid's, else 0",
    )
    add(
        "--compat",
        default="fixed",
        help="fixed, or ella: with the faults of the published numbers (default: fixed)",
    )
    add(
        "--judge",
        help="BLIP, ViLT or chat model, folder or hub name (default: Salesforce/blip-vqa-capfilt-large)",
    )
    add(
        "--answers",
        type=Path,
        help="a _detail.txt of the published evaluator or of ours, in place of a judge",
    )
    add("--allow_missing", action="store_true", help="measure what is there, name what is not")
    add("--output", help="the report (default: FOLDER.dpg.json, beside the folder)")
    add("--records", type=Path, help="all answers (default: as the report, but _detail.txt)")
    add("--work", help="partial results, to go on from (default: as the report, but .work); may be removed")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--dtype", default="fp32", help="fp32, bf16, fp16, of the judge (default: %(default)s)")
    return parser


def run(args: Namespace) -> None:
    """Judge, or read the answers; count and report."""
    from sana.metrics.command import publish, report_path
    from sana.metrics.dpg import FETCH, read_answers, read_items, table
    from sana.metrics.dpg_folder import Protocol, report
    from sana.metrics.weights import fetched_by
    from sana.utils import distributed, hub, logging

    logging.configure()
    if (args.images is None) == (args.answers is None):
        raise ValueError("name a folder of pictures, or --answers, and not both")
    with fetched_by(FETCH, args.csv):
        items = read_items(hub.resolve(args.csv), compat=args.compat)
    protocol = Protocol(compat=args.compat, padding=args.grid)
    if args.answers:
        answers = read_answers(args.answers, items)
        if args.allow_missing:
            items = {key: item for key, item in items.items() if key in answers}
        facts = {"questions_sha256": hub.sha256(hub.resolve(args.csv))}
        result = report(items, answers, protocol, args.answers.name, settings=facts)
        args.images = args.answers.with_suffix("")
    else:
        result = judged(args, items, protocol)
    if distributed.is_main():
        print(table(result.values), file=sys.stderr)
    print(publish(result, report_path(args, "dpg"))[0], end="")


def judged(args: Namespace, items: "dict[str, Item]", protocol: "Protocol") -> "Report":
    """The report of a folder."""
    from sana.metrics.command import report_path, work_folder
    from sana.metrics.dpg_folder import judge_pictures, read_pictures, report, write_details
    from sana.metrics.image_set import described
    from sana.utils import distributed, hub

    pictures = read_pictures(args.images, items, protocol, allow_missing=args.allow_missing)
    from sana.loading import find_device, find_dtype  # torch, which is slow to load
    from sana.metrics.vqa import JUDGE_NAME, load_judge
    from sana.metrics.weights import folder_sha256

    name = args.judge or JUDGE_NAME
    judge = load_judge(name, dtype=find_dtype(args.dtype), device=find_device(args.device))
    weights, path = {"judge": folder_sha256(name)}, report_path(args, "dpg")
    questions = hub.sha256(hub.resolve(args.csv))
    facts = {"questions_sha256": questions, "judge_path": name, "judge_dtype": args.dtype}
    work, known = work_folder(args, "dpg"), {**facts, "weights": weights}
    found = judge_pictures(pictures, items, judge, protocol, work, known)
    items = {key: item for key, item in items.items() if key in found.answers}
    if distributed.is_main():
        write_details(found, args.records or path.with_name(f"{path.stem}_detail.txt"))
    settings = facts | described(pictures)
    return report(items, found.answers, protocol, judge.name, settings=settings, weights=weights)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
