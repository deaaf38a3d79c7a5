"""Write the prompt file of the shapes benchmark: `python scripts/make_shapes_prompts.py [--output FILE]`."""

import argparse
from pathlib import Path

from sana.shapes.benchmark import PROMPTS_FILE, benchmark_prompts, to_jsonl
from sana.utils.files import write_atomic


def main() -> None:
    """Write the file and print its path and the number of prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(PROMPTS_FILE), help="the JSONL file to write")
    output = parser.parse_args().output
    prompts = benchmark_prompts()
    write_atomic(output, to_jsonl(prompts).encode("utf-8"))
    print(f"{output}: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
