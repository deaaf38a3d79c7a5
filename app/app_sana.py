"""A page to draw images with, in the browser, on port 15432 (or DEMO_PORT).

Without --config and --model_path the model shipped with the repository is used, and no network. ROOT_PATH is the path of
the page behind a proxy, MAX_IMAGE_SIZE the longest side of a square image. Words like --model.mixed_precision=bf16
override the config.
"""

import os
import time
from argparse import Namespace

from sana.utils.cli import Parser, at_least, boolean


def steps(text: str) -> int | None:
    """Argument type: -1 stands for the sampler's usual number."""
    return None if text == "-1" else at_least(1)(text)


# Flag, type, default, help. The spelling is the published one where there is one.
FLAGS = (
    ("config", str, None, "YAML file (default: what --model_path says of itself, else the embedded model's)"),
    ("model_path", str, None, "weights: path or hf://owner/repo/path (default: the config's load_from)"),
    ("image_size", at_least(1), None, "side of the images that the form asks for (default: the model's own)"),
    ("cfg_scale", float, 4.5, "the form's scale of classifier-free guidance"),
    ("pag_scale", float, 1.0, "the form's scale of perturbed-attention guidance"),
    ("step", steps, None, "the form's number of steps (default or -1: 20, 28 for flow_euler, 2 for scm)"),
    ("seed", at_least(0), 0, "the form's seed"),
    ("bs", at_least(1), 8, "images drawn at once, those of several visitors together"),
    ("queue", at_least(1), 64, "images that may wait"),
    ("timeout", at_least(1), 300, "seconds that a request has"),
    ("safety_model", str, None, "a classifier of pictures or prompts: folder or hub name (default: none)"),
    ("safety_label", str, "nsfw", "the label of it that is acted on"),
    ("safety_device", str, "cpu", "where it runs"),
    ("host", str, "0.0.0.0", "address to listen on"),
    ("share", boolean, False, "also give the page a public address, through gradio's servers"),
    ("device", str, None, "cpu, cuda, cuda:1 (default: a GPU where there is one)"),
    ("dtype", str, None, "fp32, bf16 or fp16, of the transformer (default: the config's, and fp32 on a CPU)"),
)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    for name, kind, default, text in FLAGS:
        optional = {"nargs": "?", "const": True} if kind is boolean else {}
        shown = text if default is None else f"{text} (default: {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=shown, **optional)
    return parser


def variable(name: str) -> int | None:
    """A whole number in the environment.

    Raises:
        ValueError: it is none.
    """
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal() or not int(text):
        raise ValueError(f"{name} must be a positive whole number, got {text!r}")
    return int(text)


def run(args: Namespace, overrides: list[str]) -> None:
    """Everything after the flags are read. Torch and gradio are imported only here."""
    start = time.monotonic()
    port, side = variable("DEMO_PORT") or 15432, variable("MAX_IMAGE_SIZE")

    from sana.loading import DEFAULT_CONFIG, find_config
    from sana.pipeline import SanaPipeline
    from sana.serving import page, styles
    from sana.serving.engine import Engine
    from sana.serving.limits import Limits
    from sana.serving.safety import Safety
    from sana.utils import hub, logging

    logging.configure()
    config = find_config(args.config, args.model_path, overrides)
    safety = None
    if args.safety_model is not None:
        safety = Safety(args.safety_model, label=args.safety_label, device=args.safety_device)
    pipeline = SanaPipeline(config, device=args.device, dtype=args.dtype)
    limits = Limits(pixels=side**2 if side else None)
    engine = Engine(
        pipeline, max_batch=args.bs, queue=args.queue, timeout=args.timeout, limits=limits, safety=safety
    )
    embedded = not args.model_path and args.config in (None, DEFAULT_CONFIG)
    shapes = hub.resolve("asset/samples_mini.txt").read_text(encoding="utf-8").splitlines()
    form = page.Start(
        image_size=args.image_size,
        steps=args.step,
        guidance_scale=args.cfg_scale,
        pag_guidance_scale=args.pag_scale,
        seed=args.seed,
        examples=shapes if embedded else styles.EXAMPLES,
    )
    demo = page.build(engine, form)
    try:
        demo.launch(
            server_name=args.host,
            server_port=port,
            share=args.share,
            root_path=os.environ.get("ROOT_PATH"),
            css=page.CSS,
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"up in {time.monotonic() - start:.1f} s: http://localhost:{port}", flush=True)
        demo.block_thread()
    finally:
        demo.close()
        engine.close()


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, *parser.parse_known_args())
