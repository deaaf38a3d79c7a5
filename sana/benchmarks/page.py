"""The reports of the benchmarks as tables and as a picture."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- tables: scripts/plot_benchmarks.py -->", "<!-- end of tables -->"
"""What is between these lines of the page is written here."""

PLOT = "images/benchmarks.png"
"""From the page."""

LABELS = {
    "ours": "ours",
    "ours_compiled": "ours, compiled",
    "diffusers": "diffusers",
    "diffusers_compiled": "diffusers, compiled",
    "diffusers_graphs": "diffusers, compiled, CUDA graphs",
}
_COLOURS = dict(zip(LABELS, ("#1f77b4", "#0b3c5d", "#bbbbbb", "#888888", "#555555"), strict=True))
_STAGES = {
    "text": "text",
    "denoise": "denoising",
    "decode": "decoding",
    "all": "prompt to pixels",
    "train": "training",
}

_METRICS = ("pipeline", "training", "options", "fused operations")

Report = dict[str, Any]


def read_reports(folder: Path) -> list[Report]:
    """The reports of `scripts/bench_{pipeline,train,options,ops}.py` in a folder, by file name.

    Raises:
        ValueError: a file is no such report.
    """
    reports = []
    for path in sorted(folder.glob("*.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            kind, values = report["metric"], report["values"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no report of a benchmark: {error}") from error
        if kind in _METRICS and values:
            reports.append(report)
    return reports


def cases(reports: Sequence[Report]) -> Iterator[tuple[Report, str, str, dict[str, Any]]]:
    """(report, stage, batch, implementation -> figures) of all that was measured."""
    for report in reports:
        if report["metric"] not in ("pipeline", "training"):
            continue
        stages = {"train": report["values"]} if report["metric"] == "training" else report["values"]
        for stage, batches in stages.items():
            for batch, rows in batches.items():
                if batch != "best" and rows:
                    yield report, stage, batch, rows


def tables(reports: Sequence[Report]) -> str:
    """Markdown: for each machine what it is, and a table."""
    if not reports:
        return "Nothing was measured yet.\n"
    parts = [f"![Speed over diffusers]({PLOT})\n"]
    for machine in dict.fromkeys(map(_machine, reports)):
        own = [report for report in reports if _machine(report) == machine]
        options, operations = (
            [report for report in own if report["metric"] == metric]
            for metric in ("options", "fused operations")
        )
        origins = ", ".join(dict.fromkeys(map(_origin, own)))
        lines = [f"{machine}; commit {origins}, with + if there were changes on top.", ""]
        lines += [
            "| what | implementation | median | fastest to slowest | a second | speed | apart | first call | call takes | others | load |"
        ]
        lines += [f"|{'---|' * 11}"]
        for report, stage, batch, rows in cases(own):
            for name, row in rows.items():
                what = _title(report, stage, batch) if name == next(iter(rows)) else ""
                lines.append(f"| {what} | {_row(name, row)} |")
        lines += [
            "",
            *_best(own),
            *itertools.chain(*map(_options, options), *map(_operations, operations)),
            "Commands:",
            "",
            "```bash",
            *dict.fromkeys(report["command"] for report in own),
            "```",
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _machine(report: Report) -> str:
    """What a table has in common."""
    versions = report["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers", "transformers"))
    return f"**{report['hardware']}**; {report['settings']['threads']} threads; {libraries}"


def _origin(report: Report) -> str:
    commit = report["settings"]["commit"]
    return f"{commit[:10]}{'+' if commit.endswith('+') else ''} ({report['date'][:10]})"


def _title(report: Report, stage: str, batch: str) -> str:
    settings = report["settings"]
    steps = f", {settings['steps']} steps" if stage in ("denoise", "all") else ""
    size = f"{settings['size']} x {settings['size']}"
    return f"{settings['model']}, {size}, {report['dtype']}, batch {batch}: {_STAGES[stage]}{steps}"


def _row(name: str, row: dict[str, Any]) -> str:
    speed = f"**{row['speedup']:.2f}**" if name.startswith("ours") and "speedup" in row else ""
    if not speed:
        speed = f"{row['speedup']:.2f}" if "speedup" in row else ""
    share = row.get("share_of_matmul")
    rate = f"{row['images_per_second']:.3g} images" + (
        f", {share:.0%} of a product's rate" if share is not None else ""
    )
    memory = f"{row['call_bytes'] / 2**20:,.0f} MiB" if row["call_bytes"] is not None else "unknown"
    columns = [
        LABELS.get(name, name),
        seconds(row["seconds"]),
        f"{seconds(row['fastest'])} to {seconds(row['slowest'])}",
        rate,
        speed,
        f"{row['error']:.0e}" + (f", {row['psnr']:.0f} dB" if row.get("psnr") is not None else ""),
        seconds(row["first_call"]),
        memory,
        f"{row['other_cores']:.2f}",
        f"{row['load']:.1f}",
    ]
    return " | ".join(columns)


def _best(reports: Sequence[Report]) -> list[str]:
    """A line for each measurement of several batches."""
    lines = []
    for report in reports:
        if report["metric"] != "pipeline":
            continue
        for stage, batches in report["values"].items():
            best = [
                f"{LABELS[name]} {found['images_per_second']:.3g} images a second at batch {found['batch']}"
                for name, found in batches.get("best", {}).items()
            ]
            if best:
                title = _title(report, stage, "").replace(", batch ", "")
                lines += [f"Most of {title}: {'; '.join(best)}.", ""]
    return lines


def _options(report: Report) -> list[str]:
    """A table of what options gain and cost."""
    settings = report["settings"]
    title = f"Options of tiny, {report['n']} prompts, batches of {settings['batch']}:"
    lines = [
        title,
        "",
        "| option | a batch | speed | latents apart | PSNR: median, worst | images of 40 dB | score |",
        f"|{'---|' * 7}",
    ]
    for name, row in report["values"].items():
        apart = (
            f"{row['latent_error']:.1e} | {row['psnr']:.1f}, {row['worst_psnr']:.1f} dB | {row['within_40_db']}"
            if name != "exact"
            else "| |"
        )
        lines.append(
            f"| {name} | {seconds(row['seconds'])} | {row['speed']:.2f} | {apart} | {row['score']:.3f} |"
        )
    return [*lines, ""]


def _operations(report: Report) -> list[str]:
    """A table of the fused operations, a row for each and each pass."""
    settings, values = report["settings"], report["values"]
    copy = values["ceilings"]["copy_bytes_per_second"]
    rows = {
        f"{name}, {direction}": kinds
        for name, directions in values.items()
        if name != "ceilings"
        for direction, kinds in directions.items()
    }
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    lines = [
        f"Operations of {settings['model']}, {report['dtype']}, batch {settings['batch']}, {settings['side']} x "
        f"{settings['side']} tokens; in brackets the bandwidth as a share of a copy's, {copy / 1e9:.0f} GB/s:",
        "",
        f"| operation, pass | {' | '.join(kinds)} |",
        f"|{'---|' * (1 + len(kinds))}",
    ]
    for name, row in rows.items():
        figures = [
            f"{seconds(row[kind]['seconds'])} ({row[kind]['share_of_copy']:.0%})" if kind in row else ""
            for kind in kinds
        ]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return [*lines, ""]


def seconds(value: float) -> str:
    """For people: ms below one second."""
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def with_tables(page: str, reports: Sequence[Report]) -> str:
    """The page with new tables between its markers.

    Raises:
        ValueError: they are not there.
    """
    return replaced(page, BEGIN, END, tables(reports))


def replaced(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between two markers.

    Raises:
        ValueError: they are not there.
    """
    before, first, rest = page.partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"the page needs a line {begin} and a line {end} for the tables")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def plot(reports: Sequence[Report], path: Path) -> None:
    """Bars of speed over diffusers, a group for each measurement; nothing where nothing was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [case for case in cases(reports) if any("speedup" in row for row in case[3].values())]
    if not found:
        return
    rows = sum(len(case[3]) for case in found)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.32 * rows + 0.25 * len(found)), layout="constrained")
    place, ticks = 0.0, []
    for report, stage, batch, figures in found:
        ticks.append((place + (len(figures) - 1) / 2, _title(report, stage, batch)))
        for name, row in figures.items():
            if "speedup" in row:
                axes.barh(place, row["speedup"], color=_COLOURS.get(name, "#aaaaaa"), height=0.85)
                text = f"{row['speedup']:.2f}  {LABELS.get(name, name)}, {seconds(row['seconds'])}"
                axes.text(row["speedup"] + 0.02, place, text, va="center", fontsize=8)
            place += 1
        place += 0.8
    axes.set_yticks(*zip(*ticks, strict=True), fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(right=1.7 * max(row.get("speedup", 0) for case in found for row in case[3].values()))
    axes.set_xlabel("speed over diffusers, eager; more is better")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
