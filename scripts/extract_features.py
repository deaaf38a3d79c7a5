"""Encode a training's pictures and captions once: latents and text features for `train.feature_cache_dir`.

    python scripts/extract_features.py --config_path=CONFIG --train.feature_cache_dir=output/features
    torchrun --nproc_per_node=8 scripts/extract_features.py --config_path=CONFIG --train.feature_cache_dir=output/features

Give the keys of the training. A process that is killed costs what it had in work: the same command goes on. Where the data
or an encoder is not what it was, it says so and changes nothing, unless --renew replaces what is stale.
"""

from argparse import Namespace

from sana.utils.cli import Parser


def make_parser() -> Parser:
    """The command line, but for the config's keys."""
    parser = Parser(description=__doc__, epilog="plus --KEY=VALUE for any key of the config")
    parser.add_argument("--config_path", required=True, help="YAML file of the training")
    parser.add_argument(
        "--dtype",
        choices=("half", "float32"),
        help="stored in; half: latents float16, texts bfloat16. Default: what is there, else half",
    )
    parser.add_argument(
        "--renew",
        action="store_true",
        help="read everything again, replace what is stale and keep what is not",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare the contents of all files, not only sizes and times"
    )
    return parser


def run(args: Namespace, overrides: list[str]) -> None:
    """Load the config, encode, say what there is."""
    from sana.config import load_config
    from sana.utils import distributed, logging

    logging.configure()
    config = load_config(args.config_path, overrides)

    from sana.training.feature_cache import extract  # after the config's errors: it imports torch

    summary = extract(config, dtype=args.dtype, renew=args.renew, check=args.check)
    if distributed.is_main():
        print(summary)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, *parser.parse_known_args())
