"""Train a Sana transformer from a YAML config.

    python train_scripts/train.py --config_path=configs/sana_config/tiny/Sana_tiny_img256.yaml --work_dir=output/run
    torchrun --nproc_per_node=8 train_scripts/train.py --config_path=... --train.train_batch_size=16

Every config key can be overridden as --section.key=value (lists as "[a,b]"). `train.sh` is the usual way to start it.
"""

import sys

from sana.utils.cli import Parser, at_least

STOPPED = 143
"""Exit status of a run that was stopped by SIGTERM before its last step, and saved: started again, it goes on."""


def make_parser() -> Parser:
    """The command line, but for the config's keys."""
    parser = Parser(description=__doc__, epilog="plus --KEY=VALUE for any key of the config")
    parser.add_argument("--config_path", required=True, help="YAML file of the run")
    parser.add_argument(
        "--resume_from",
        help='a training checkpoint (a folder, or a .pth), or "latest": the newest whole one of the work_dir, if any',
    )
    parser.add_argument(
        "--plan",
        type=at_least(1),
        metavar="PROCESSES",
        help="print parameters, memory of each GPU and steps of a run in so many processes, and train nothing",
    )
    return parser


def run(config_path: str, resume_from: str | None, processes: int | None, overrides: list[str]) -> None:
    """Load the config, train; or plan it for `processes`."""
    from sana.config import load_config
    from sana.utils import logging

    logging.configure()
    config = load_config(config_path, overrides)

    if processes is not None:
        from sana.training.plan import plan

        print(plan(config, processes))
        return

    if config.caching:
        from sana.training.feature_cache import extract

        print(extract(config))
        return

    from sana.training.trainer import Trainer  # after the config's errors: it imports torch

    if not Trainer(config, resume_from).train():
        sys.exit(STOPPED)


if __name__ == "__main__":
    parser = make_parser()
    args, overrides = parser.parse_known_args()
    parser.run(run, args.config_path, args.resume_from, args.plan, overrides)
