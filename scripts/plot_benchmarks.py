"""Write the tables and the plot of asset/docs/benchmarks.md from the reports in asset/bench.

python scripts/plot_benchmarks.py
"""

from argparse import Namespace
from pathlib import Path

from sana.utils.cli import Parser

ROOT = Path(__file__).resolve().parents[1]


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--reports",
        type=Path,
        default=ROOT / "asset/bench",
        help="folder of JSON reports (default: asset/bench)",
    )
    add("--page", type=Path, default=ROOT / "asset/docs/benchmarks.md", help="Markdown with the two markers")
    add(
        "--plot",
        type=Path,
        default=ROOT / "asset/docs/images/benchmarks.png",
        help="PNG file (default: that of the page)",
    )
    return parser


def run(args: Namespace) -> None:
    """Read, write the page, draw."""
    from sana.benchmarks import page as bench_page

    reports = bench_page.read_reports(args.reports)
    page = args.page.read_text(encoding="utf-8")
    args.page.write_text(bench_page.with_tables(page, reports), encoding="utf-8")
    bench_page.plot(reports, args.plot)
    print(f"{args.page}\n{args.plot}")


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
