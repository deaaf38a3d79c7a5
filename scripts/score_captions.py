"""Write the CLIP score of every caption beside pictures, as the training reads them: it draws captions by these scores.

    python scripts/score_captions.py DIR

DIR is a folder of pictures or of tar shards. All captions are scored: the picture's own (kind prompt) and those of every
NAME_<suffix>.json or SHARD_<suffix>.json; a score is 100 * cosine, in NAME_<kind>_clip_score.json or
SHARD_<kind>_clip_score.json. Of a caption longer than CLIP's 77 tokens the beginning counts, as in the reference. Scores that
are there are kept, so a run that was ended goes on; after captions were edited by hand use --overwrite. torchrun divides the
work among its processes. What cannot be read is named and left out. At the end: what the config of a training needs.
Exit status 1: no caption has a score.
"""

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from sana.utils.cli import Parser, at_least

if TYPE_CHECKING:
    from PIL.Image import Image

    from sana.data.labelling import Labelling


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="pictures, or tar shards")
    parser.add_argument(
        "--model", help="transformers CLIP: hub name or folder (default: openai/clip-vit-large-patch14)"
    )
    parser.add_argument(
        "--kind",
        nargs="+",
        default=[],
        metavar="NAME",
        help="kinds to score, in shards also fields of KEY.json (default: all)",
    )
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="pictures at once (default: 32)")
    parser.add_argument(
        "--threads", type=at_least(1), default=4, help="threads that read pictures (default: 4)"
    )
    parser.add_argument("--overwrite", action="store_true", help="measure scores anew")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16, fp16 (default: %(default)s)")
    return parser


def run(args: Namespace) -> None:
    """Score what has no score."""
    from sana.utils import distributed, logging

    logging.configure()
    from sana.data import labelling  # it imports torch

    samples = labelling.open_samples(args.folder, [labelling.SCORE_END], args.kind)
    work = labelling.Labelling.scores(samples, args.kind, overwrite=args.overwrite)
    if work.missing:  # a finished run need not load the model
        score(work, args)
    outcome = work.finish()
    if distributed.is_main():
        print(f"{outcome}\n\n{labelling.config_lines(samples, args.folder)}", end="")
    if not outcome.written + outcome.kept:
        sys.exit(1)


def score(work: "Labelling", args: Namespace) -> None:
    """Measure what is missing."""
    from sana.loading import find_device, find_dtype
    from sana.metrics.clip_score import CLIP_NAME, ClipScore, compare
    from sana.utils.logging import get_logger

    clip = ClipScore.from_pretrained(
        args.model or CLIP_NAME, device=find_device(args.device), dtype=find_dtype(args.dtype)
    )
    cut = 0

    def answer(pictures: "list[Image]", captions: list[dict[str, str]]) -> list[dict[str, str]]:
        nonlocal cut
        texts = [text for own in captions for text in own.values()]
        owners = [place for place, own in enumerate(captions) for _ in own]
        scores = iter(compare(clip.images(pictures)[owners], clip.texts(texts)).tolist())
        cut += sum(map(clip.is_cut, texts))
        return [{kind: f"{next(scores):.3f}" for kind in own} for own in captions]

    work.run(answer, batch_size=args.batch_size, threads=args.threads)
    if cut:
        get_logger("score").warning("%d captions are longer than the %d tokens that count", cut, clip.context)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
