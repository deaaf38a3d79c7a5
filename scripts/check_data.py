"""Look at training data before a GPU is used: samples of each size, what cannot be read, captions, batches of an epoch.

    python scripts/check_data.py asset/example_data
    python scripts/check_data.py DIR --config_path=configs/sana_config/512ms/Sana_600M_img512.yaml --np=8

The kind of data is seen from the folder, unless --data.type=KIND says it. Exit status 1: more samples cannot be read than
data.bad_sample_limit allows.
"""

import sys
from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING

from sana.utils.cli import Parser, at_least

if TYPE_CHECKING:
    from sana.config import SanaConfig
    from sana.data.check import DataReport


def make_parser() -> Parser:
    """The command line, but for the config's keys."""
    parser = Parser(description=__doc__, epilog="plus --KEY=VALUE for any key of the config")
    parser.add_argument(
        "folders", nargs="*", metavar="DIR", help="data folders; none: the config's data.data_dir"
    )
    parser.add_argument("--config_path", default="configs/sana_config/base.yaml", help="YAML file of the run")
    parser.add_argument("--np", type=at_least(1), default=1, help="processes (GPUs) of the run")
    parser.add_argument("--quick", action="store_true", help="do not decode pictures")
    parser.add_argument("--threads", type=at_least(1), default=4, help="threads that read")
    parser.add_argument("--show", type=at_least(0), default=20, help="bad samples to list")
    return parser


def run(args: Namespace, overrides: list[str]) -> None:
    """Load the config, look, print."""
    from sana.config import load_config
    from sana.utils import logging

    logging.configure("WARNING")
    config = load_config(args.config_path, overrides)
    if args.folders:
        folders = replace(config.data, data_dir=tuple(args.folders))
        config = replace(config, data=folders)

    # After the config's errors: they import torch.
    from sana.data.build import detected_type, open_dataset, reading_of
    from sana.data.check import inspect
    from sana.data.order import Order
    from sana.data.quarantine import allowed

    if args.folders and not any(word.lstrip("-").startswith("data.type") for word in overrides):
        config = replace(config, data=replace(config.data, type=detected_type(args.folders[0])))
    # Every bad sample is wanted, and none is written into the folder of a run.
    reading = replace(reading_of(config), bad_limit=1.0, bad_file=None)
    samples = open_dataset(config, reading)
    train = config.train
    batch_size = train.train_batch_size * train.gradient_accumulation_steps * args.np
    order = Order.of(samples, batch_size=batch_size, seed=train.seed)
    report = inspect(samples, order, reading.choice, decode=not args.quick, threads=args.threads)
    print("\n".join(lines(report, config, args.np, args.show)))
    limit = allowed(config.data.bad_sample_limit, report.samples + report.unlisted)
    if len(report.bad) > limit:
        setting = f"data.bad_sample_limit={config.data.bad_sample_limit}"
        print(f"{len(report.bad)} samples cannot be read; {setting} allows {limit}", file=sys.stderr)
        sys.exit(1)


def lines(report: "DataReport", config: "SanaConfig", processes: int, show: int) -> list[str]:
    """The report as text."""
    data, train = config.data, config.train
    accumulation = train.gradient_accumulation_steps
    places = (
        sum(bucket.batches for bucket in report.buckets) * train.train_batch_size * accumulation * processes
    )
    repeats = sum(bucket.repeats for bucket in report.buckets)
    text = [
        f"{', '.join(data.data_dir) or data.type}: {data.type}, {report.samples} samples, {len(report.bad)} bad",
        "",
    ]
    text.append(f"{'height x width':>16} {'samples':>10} {'batches':>10} {'repeats':>10}")
    for bucket in report.buckets:
        size = f"{bucket.height} x {bucket.width}"
        text.append(f"{size:>16} {bucket.samples:>10} {bucket.batches:>10} {bucket.repeats:>10}")
    text += [
        "",
        f"an epoch: {report.steps} steps; on each of {processes} processes {report.steps * accumulation} batches of "
        f"{train.train_batch_size}; {repeats} of {places} places are repeats ({repeats / places:.1%})",
    ]
    if repeats > places / 4:
        text.append("many repeats: take smaller batches, or fewer sizes (--model.multi_scale=false)")
    text += [
        "",
        f"{'captions':>20} {'pictures':>10} {'words: least':>13} {'median':>8} {'most':>6} {'scored':>8} {'drawn':>7}",
    ]
    for kind in report.captions:
        least, median, most = kind.words
        text.append(
            f"{kind.kind:>20} {kind.count:>10} {least:>13} {median:>8g} {most:>6} {kind.scored:>8} {kind.drawn:>7.1%}"
        )
    if report.bad and show:
        text += ["", "bad:"] + [f"  {label}: {reason}" for label, reason in list(report.bad.items())[:show]]
        if len(report.bad) > show:
            text.append(f"  and {len(report.bad) - show} more (--show)")
    return text


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, *parser.parse_known_args())
