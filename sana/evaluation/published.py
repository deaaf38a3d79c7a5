"""The table of the paper (arXiv 2410.10629), to put a measured row beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("images/s", "latency s", "params B", "speed-up", "FID", "CLIP", "GenEval", "DPG")
# Throughput and latency on an A100 in float16, the first at the best batch size; None: not given.
_AT_1024 = {
    "LUMINA-Next": (0.12, 9.1, 2.0, 2.8, 7.58, 26.84, 0.46, 74.6),
    "SDXL": (0.15, 6.5, 2.6, 3.5, 6.63, 29.03, 0.55, 74.7),
    "PlayGround v2.5": (0.21, 5.3, 2.6, 4.9, 6.09, 29.13, 0.56, 75.5),
    "Hunyuan-DiT": (0.05, 18.2, 1.5, 1.2, 6.54, 28.19, 0.63, 78.9),
    "PixArt-Sigma": (0.4, 2.7, 0.6, 9.3, 6.15, 28.26, 0.54, 80.5),
    "DALLE3": (None, None, None, None, None, None, 0.67, 83.5),
    "SD3-medium": (0.28, 4.4, 2.0, 6.5, 11.92, 27.83, 0.62, 84.1),
    "FLUX-dev": (0.04, 23.0, 12.0, 1.0, 10.15, 27.47, 0.67, 84.0),
    "FLUX-schnell": (0.5, 2.1, 12.0, 11.6, 7.94, 28.14, 0.71, 84.8),
    "Sana-0.6B": (1.7, 0.9, 0.6, 39.5, 5.81, 28.36, 0.64, 83.6),
    "Sana-1.6B": (1.0, 1.2, 1.6, 23.3, 5.76, 28.67, 0.66, 84.8),
}
_AT_512 = {
    "PixArt-alpha": (1.5, 1.2, 0.6, 1.0, 6.14, 27.55, 0.48, 71.6),
    "PixArt-Sigma": (1.5, 1.2, 0.6, 1.0, 6.34, 27.62, 0.52, 79.5),
    "Sana-0.6B": (6.7, 0.8, 0.6, 5.0, 5.67, 27.92, 0.64, 84.3),
    "Sana-1.6B": (3.8, 0.6, 1.6, 2.5, 5.16, 28.19, 0.66, 85.5),
}
TABLES: Mapping[int, Mapping[str, Sequence[float | None]]] = {512: _AT_512, 1024: _AT_1024}
"""Side of the pictures -> model -> a value for each of COLUMNS."""

# Column -> pattern of the metric's name in a report, and the name of the number there. Of DPG-Bench the name has the judge;
# "GenEval (shapes)" is another benchmark.
_OURS = {
    "FID": ("FID", "FID"),
    "CLIP": ("CLIP score", "CLIP score"),
    "GenEval": ("GenEval", "overall"),
    "DPG": (r"DPG-Bench \(.*\)", "overall"),
}
_FORMAT = ("{:.2f}", "{:.1f}", "{:.1f}", "{:.1f}x", "{:.2f}", "{:.2f}", "{:.2f}", "{:.1f}")


def comparison(reports: Sequence[Mapping[str, Any]], side: int, name: str = "this model") -> str:
    """The paper's table for pictures of `side` pixels (or the size nearest to it), and below it our row.

    Below that, what each number of ours is: no two protocols compare, and only the reader can tell which difference matters.

    Args:
        reports: of one model, as in `results.jsonl`; of several of one metric the last counts.
    """
    published = TABLES[min(TABLES, key=lambda known: abs(known - side))]
    ours: list[float | None] = [None] * len(COLUMNS)
    notes = []
    for column, (metric, value) in _OURS.items():
        found = [report for report in reports if re.fullmatch(metric, report["metric"])]
        if found:
            ours[COLUMNS.index(column)] = found[-1]["values"][value]
            notes.append(f"  {column}: {found[-1]['metric']}, n={found[-1]['n']}; {found[-1]['protocol']}")
    width = max(map(len, (*published, name)))
    lines = ["  ".join([" " * width, *(f"{column:>9}" for column in COLUMNS)])]
    for label, values in [*published.items(), (name, ours)]:
        cells = [
            "-" if value is None else form.format(value) for form, value in zip(_FORMAT, values, strict=True)
        ]
        lines.append("  ".join([f"{label:<{width}}", *(f"{cell:>9}" for cell in cells)]))
    return "\n".join([*lines, *notes])


def read_results(path: str | Path, weights_sha256: str | None = None) -> list[dict[str, Any]]:
    """The reports in a `results.jsonl`, of the model with these weights alone where a hash is given.

    Raises:
        ValueError: a line is no report; the message names it.
    """
    path = Path(path)
    reports = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), 1):
        try:
            report = json.loads(line)
            generation = report["settings"].get("generation", {})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is no report: {error!r}; mend or remove it") from error
        if weights_sha256 is None or generation.get("weights_sha256") == weights_sha256:
            reports.append(report)
    return reports
