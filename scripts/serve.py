"""An HTTP server that draws images: OpenAI's POST /v1/images/generations, GET /health and /metrics.

Without --config and --model_path the model shipped with the repository is used, and no network. Requests of one size and
settings are drawn together. SIGTERM and Ctrl-C finish what was taken, and stop. Words like --model.mixed_precision=bf16
override the config.
"""

import math
from argparse import ArgumentTypeError, Namespace

from sana.utils.cli import Parser, at_least


def positive(text: str) -> float:
    """Argument type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def port(text: str) -> int:
    """Argument type: 0 to 65535."""
    number = at_least(0)(text)
    if number > 65535:
        raise ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return number


# Flag, type, default, help.
FLAGS = (
    ("config", str, None, "YAML file (default: what --model_path says of itself, else the embedded model's)"),
    ("model_path", str, None, "weights: path or hf://owner/repo/path (default: the config's load_from)"),
    ("host", str, "127.0.0.1", "address to listen on; 0.0.0.0 is every one"),
    ("port", port, 8000, "0 takes a free one"),
    ("max_batch", at_least(1), 8, "images drawn at once"),
    ("max_wait_ms", at_least(0), 20, "how long a request waits for others to join its batch"),
    ("queue", at_least(1), 64, "images that may wait; beyond that a request is refused with status 429"),
    ("timeout", positive, 300.0, "seconds that a request has, then its status is 504"),
    (
        "max_pixels",
        at_least(1),
        None,
        "width x height of an image (default: four times the model's own size)",
    ),
    ("safety_model", str, None, "a classifier of pictures or prompts: folder or hub name (default: none)"),
    ("safety_label", str, "nsfw", "the label of it that is acted on"),
    ("safety_device", str, "cpu", "where it runs"),
    ("device", str, None, "cpu, cuda, cuda:1 (default: a GPU where there is one)"),
    ("dtype", str, None, "fp32, bf16 or fp16, of the transformer (default: the config's, and fp32 on a CPU)"),
)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    for name, kind, default, text in FLAGS:
        shown = text if default is None else f"{text} (default: {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=shown)
    return parser


def run(args: Namespace, overrides: list[str]) -> None:
    """Everything after the flags are read. Torch is imported only here."""
    import uvicorn

    from sana.loading import find_config
    from sana.pipeline import SanaPipeline
    from sana.serving.api import make_app
    from sana.serving.engine import Engine
    from sana.serving.limits import Limits
    from sana.serving.safety import Safety
    from sana.utils import logging

    logging.configure()
    config = find_config(args.config, args.model_path, overrides)
    safety = None
    if args.safety_model is not None:
        safety = Safety(args.safety_model, label=args.safety_label, device=args.safety_device)
    pipeline = SanaPipeline(config, device=args.device, dtype=args.dtype)
    engine = Engine(
        pipeline,
        max_batch=args.max_batch,
        max_wait=args.max_wait_ms / 1000,
        queue=args.queue,
        timeout=args.timeout,
        limits=Limits(pixels=args.max_pixels),
        safety=safety,
    )
    uvicorn.run(make_app(engine), host=args.host, port=args.port, log_level="info")


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, *parser.parse_known_args())
