"""Write a complete model with random weights, of the size of a published one: for measurements of memory and time.

    python scripts/make_random_model.py --output output/random_600M
    python scripts/inference.py --config=output/random_600M/config.yaml --dtype=bf16 --prompt="a red circle"

Transformer, DC-AE and a Gemma-2 text encoder lie there as a release has them, in shards. Pictures are noise.
"""

from argparse import Namespace
from pathlib import Path

from sana.utils.cli import Parser, at_least, words

TEXT_SIZES = ("gemma-2-2b", "small")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the folder; must not exist")
    parser.add_argument("--model", default="SanaMS_600M_P1_D28", help="architecture (default: %(default)s)")
    parser.add_argument(
        "--text_encoder", choices=TEXT_SIZES, default="gemma-2-2b", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--autoencoder", choices=["dc-ae", "tiny"], default="dc-ae", help="(default: %(default)s)"
    )
    parser.add_argument("--image_size", type=at_least(256), default=512, help="pixels (default: 512)")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], default="bf16", help="of the files (default: bf16)"
    )
    parser.add_argument("--overrides", type=words, default=[], help="[KEY=VALUE,...]: more of the config")
    return parser


def run(args: Namespace) -> None:
    """Write all of it. Torch is imported only here."""
    import torch
    import yaml

    from sana.config import dump_config, load_config, transformer_overrides
    from sana.loading import BASE_CONFIG
    from sana.models import random_model

    if args.output.exists():
        raise ValueError(f"{args.output} exists: name another folder")
    width = random_model.TEXT_SIZES[args.text_encoder].get("hidden_size", 2304)
    keys = {
        "model.model": args.model,
        "model.image_size": args.image_size,
        "model.mixed_precision": "bf16",
        "model.load_from": str(args.output / "transformer"),
        "vae.vae_pretrained": str(args.output / "autoencoder"),
        "vae.weight_dtype": "bfloat16",
        "text_encoder.text_encoder_name": str(args.output / "text_encoder"),
        "text_encoder.caption_channels": width,
    }
    overrides = [f"{key}={yaml.safe_dump(value).splitlines()[0]}" for key, value in keys.items()]
    config = load_config(BASE_CONFIG, [*overrides, *args.overrides])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    random_model.write(
        args.output,
        transformer=args.model,
        autoencoder=args.autoencoder,
        text_encoder=args.text_encoder,
        dtype=dtype,
        texts=config.text_encoder.chi_prompt,
        overrides=transformer_overrides(config),
    )
    dump_config(config, args.output / "config.yaml")
    print(args.output / "config.yaml")


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
