"""What the command lines of metrics share: flags, and where reports and partial results lie. Loads no torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana.utils import distributed
from sana.utils.cli import Parser, at_least

if TYPE_CHECKING:
    from sana.metrics.image_set import ScoredImage
    from sana.metrics.report import Report


def add_flags(parser: Parser, *, batch_size: int) -> None:
    """The pictures, their prompts, the report, and how to run."""
    parser.add_argument("images", help="folder of pictures, best with the manifest of scripts/inference.py")
    parser.add_argument("--prompts", help=".txt, or .json as MJHQ's meta_data.json (default: the manifest)")
    parser.add_argument("--sample_nums", type=at_least(1), metavar="N", help="use the first N prompts")
    parser.add_argument(
        "--allow_missing", action="store_true", help="measure what is there, name what is not"
    )
    parser.add_argument("--output", help="the report (default: IMAGES.<metric>.json, beside the folder)")
    parser.add_argument(
        "--work", help="partial results, to go on from (default: as the report, but .work); may be removed"
    )
    parser.add_argument("--weights", help="file, folder or hub name in place of the published weights")
    parser.add_argument("--batch_size", type=at_least(1), default=batch_size, help="default: %(default)s")
    parser.add_argument("--threads", type=at_least(1), default=4, help="that read pictures (default: 4)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")


def read_images(args: argparse.Namespace, *, prompted: bool = True) -> list[ScoredImage]:
    """The pictures that the flags name.

    Args:
        prompted: each must have a prompt.

    Raises:
        ValueError: as `read_image_set` and `require_prompts`.
    """
    from sana.metrics.image_set import read_image_set, require_prompts

    limit, allow_missing = args.sample_nums, args.allow_missing
    items = read_image_set(args.images, args.prompts, limit=limit, allow_missing=allow_missing)
    if prompted:
        require_prompts(items)
    return items


def report_path(args: argparse.Namespace, metric: str) -> Path:
    """Where the report is written."""
    images = Path(args.images)
    if images.name in ("", ".."):  # of "." and ".." the name is that of the folder
        images = images.resolve()
    return Path(args.output) if args.output else images.parent / f"{images.name}.{metric}.json"


def work_folder(args: argparse.Namespace, metric: str) -> Path:
    """Where partial results are kept."""
    return Path(args.work) if args.work else report_path(args, metric).with_suffix(".work")


def loop(args: argparse.Namespace, metric: str) -> dict[str, Any]:
    """The arguments of a `measure` that say how it runs and what it tells of it."""
    return {
        "work_folder": work_folder(args, metric),
        "batch_size": args.batch_size,
        "threads": args.threads,
        "settings": {
            "images": str(args.images),
            "prompt_file": args.prompts,
            "allow_missing": args.allow_missing,
        },
    }


def publish(report: Report, path: Path) -> tuple[str, str]:
    """Write the report, in the main process; its JSON text and a table for people, both empty in other processes."""
    if not distributed.is_main():
        return "", ""
    report.save(path)
    rows = list(_rows(report.values))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value:.4f}" for name, value in rows]
    return report.to_json(), "\n".join(
        [*lines, f"{report.n} pictures; {report.protocol}", f"written: {path}", ""]
    )


def _rows(values: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{indent}  ")
        else:
            yield f"{indent}{name}", value
