"""Write the prompt file of the shapes benchmark: `python scripts/make_shapes_prompts.py [--output FILE]`."""

from argparse import Namespace
from pathlib import Path

from sana.shapes.benchmark import PROMPTS_FILE, benchmark_prompts, to_jsonl
from sana.utils.cli import Parser
from sana.utils.files import write_atomic


def run(args: Namespace) -> None:
    """Write the file and print its path and the number of prompts."""
    prompts = benchmark_prompts()
    write_atomic(args.output, to_jsonl(prompts).encode("utf-8"))
    print(f"{args.output}: {len(prompts)} prompts")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(PROMPTS_FILE), help="the JSONL file to write")
    parser.run(run, parser.parse_args())
