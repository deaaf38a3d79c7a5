"""Check on this machine that a model computes what its weights mean: every part against independent code and goldens.

Without --config and --model_path the model shipped with the repository is checked. The table goes to stdout, with what to
do about each FAIL. Exit status: 0 all passed, 1 a check failed, 2 the input is wrong. Words like --scheduler.flow_shift=3
override the config. See asset/docs/verify.md.

    python scripts/verify.py
    python scripts/verify.py --config FILE.yaml --model_path hf://owner/repo/file.pth --json report.json
"""

import sys
from argparse import Namespace
from pathlib import Path

from sana.utils.cli import Parser, words

GOLDENS = "asset/verify"


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--config", help="YAML file (default: config.yaml beside --model_path, else the embedded model's)")
    add("--model_path", help="transformer: path or hf://owner/repo/file (default: the config's load_from)")
    add(
        "--dtype",
        type=words,
        help="fp32, bf16, fp16 or several, comma between (default: all that the device can)",
    )
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--goldens", type=Path, help=f"folder of the goldens (default: {GOLDENS} of the repository)")
    add("--update", action="store_true", help="store new goldens for these weights, if nothing else fails")
    add("--json", type=Path, metavar="FILE", help="also write a report")
    return parser


def run(args: Namespace, overrides: list[str]) -> None:
    """Check, print as it goes, and leave with status 1 if a check failed. Torch is imported only here."""
    from sana.evaluation import checks, goldens, verify
    from sana.loading import find_config
    from sana.models.state_dict import load_transformer_state, to_diffusers
    from sana.pipeline import DEFAULT_CONFIG, SanaPipeline
    from sana.utils import hub, logging

    logging.configure("WARNING")
    config = find_config(args.config, args.model_path, overrides)
    if not config.model.load_from:
        raise ValueError(
            "no weights to check: name them with --model_path, or in the config's model.load_from"
        )
    folder = args.goldens or hub.ROOT / GOLDENS
    about: dict = {}

    def load(dtype: str) -> SanaPipeline:
        pipeline = SanaPipeline(config, device=args.device, dtype=dtype)
        about.update(file=pipeline.weights, device=str(pipeline.device))
        return pipeline

    known = goldens.Goldens(None if args.update else goldens.read(folder))
    results, made = [], []
    print(checks.line("part", "check", "where", "", "measured"))
    for result in verify.verify(
        load, lambda path: to_diffusers(load_transformer_state(path)), args.dtype, goldens=known
    ):
        if isinstance(result, goldens.Entry):
            made.append(result)
        else:
            results.append(result)
            row = checks.line(result.part, result.name, result.where, result.status, result.found)
            print(row, flush=True)
    failed = [check for check in results if check.status == checks.FAIL]
    for check in failed:
        print(f"\n{check.part}, {check.name} ({check.where}): {check.advice}")
    print(f"\n{checks.summary(results)}")
    if args.json:
        settings = {"config": str(args.config or DEFAULT_CONFIG), "model_path": str(about["file"])}
        settings |= {"dtypes": args.dtype, "device": about["device"], "overrides": overrides}
        checks.report(results, settings, known.weights).save(args.json)
    if failed:
        sys.exit(1)
    if args.update:
        default = not args.config and not args.model_path
        name = "sana_tiny" if default else f"{about['file'].stem}-{known.weights['transformer'][:8]}"
        print(f"{len(made)} goldens in {goldens.write(folder / f'{name}.json', made)}")


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, *parser.parse_known_args())
