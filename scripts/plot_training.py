"""Plot the curves of trainings from their TensorBoard logs.

python scripts/plot_training.py output/sana_tiny/logs --tag loss --smooth 100 --output curves.png
"""

from argparse import Namespace
from pathlib import Path

from sana.utils.cli import Parser, at_least


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("logs", type=Path, nargs="+", help="log folders, one curve each")
    parser.add_argument("--tag", default="loss", help="what is plotted")
    parser.add_argument("--smooth", type=at_least(1), default=1, help="steps in the moving average")
    parser.add_argument("--log_scale", action="store_true", help="logarithmic vertical axis")
    parser.add_argument("--output", type=Path, required=True, help="PNG or SVG file")
    return parser


def read(folder: Path, tag: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a tag in a log folder, later events replacing earlier ones of the same step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        raise ValueError(f"no such log folder: {folder}")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    if tag not in tags:
        raise ValueError(f"{folder} has no {tag!r}; it has {', '.join(tags) or 'nothing'}")
    points = {event.step: event.value for event in events.Scalars(tag)}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def run(args: Namespace) -> None:
    """Draw and save."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for folder in args.logs:
        steps, values = read(folder, args.tag)
        width = min(args.smooth, len(values))
        means = [sum(values[i - width : i]) / width for i in range(width, len(values) + 1)]
        axes.plot(steps[width - 1 :], means, label=str(folder), linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel(args.tag + (f" (mean of {args.smooth} steps)" if args.smooth > 1 else ""))
    axes.grid(alpha=0.3)
    if args.log_scale:
        axes.set_yscale("log")
    if len(args.logs) > 1:
        axes.legend()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    print(args.output)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
