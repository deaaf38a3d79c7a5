"""Makes the picture of the demo page in the documentation, from the real page in a real browser.

Usage: python -m tests.app.screenshot
"""

import io
from argparse import Namespace
from pathlib import Path

from sana.utils.cli import Parser


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--prompt", default="a pink heart")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, default="asset/docs/images/app.png", help="default: %(default)s"
    )
    return parser


def run(args: Namespace) -> None:
    """Draw four images on the page, and take its picture."""
    from PIL import Image

    from tests.app import browser as web

    with web.served() as (address, _), web.opened_browser() as browser:
        page = web.visit(browser, address)
        web.fill(page, args.prompt, seed=args.seed, count=4)
        web.run(page)
        page.wait_for_load_state("networkidle")
        picture = Image.open(io.BytesIO(page.screenshot()))
    picture.convert("RGB").quantize(256).save(args.output, optimize=True)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
