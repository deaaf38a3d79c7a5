"""Write captions beside pictures, with one or several vision-language models, as the training reads them.

    python scripts/caption_images.py DIR --model Qwen/Qwen2.5-VL-3B-Instruct --model HuggingFaceTB/SmolVLM2-2.2B-Instruct

DIR is a folder of pictures (NAME_<kind>.json is written beside each) or of tar shards (SHARD_<kind>.json). The kind is the
model's name unless --kind gives another. Captions that are there are kept, so a run that was ended goes on; torchrun
divides the work among its processes. A picture that cannot be read, and an empty answer, are named and left out. At the end:
what the config of a training needs. Exit status 1: no picture has a caption.
"""

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from sana.utils.cli import Parser, at_least

if TYPE_CHECKING:
    from sana.data.labelling import Outcome, PictureFiles

PROMPT = "Describe this image in detail."


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="pictures, or tar shards")
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="MODEL",
        help="transformers vision-language model with a chat template: hub name or folder; may be given again",
    )
    parser.add_argument(
        "--kind", nargs="+", metavar="NAME", help="kind of captions of each --model, in their order"
    )
    parser.add_argument("--prompt", default=PROMPT, help="the question (default: %(default)s)")
    parser.add_argument(
        "--max_new_tokens", type=at_least(1), default=256, help="longest answer (default: 256)"
    )
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="pictures at once (default: 8)")
    parser.add_argument(
        "--threads", type=at_least(1), default=4, help="threads that read pictures (default: 4)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write captions of these kinds anew")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--dtype", help="fp32, bf16, fp16 (default: bf16, on a CPU fp32)")
    return parser


def run(args: Namespace) -> None:
    """Label the pictures with one model after the other."""
    from sana.utils import distributed, hub, logging

    logging.configure()
    from sana.data import labelling  # it imports torch

    kinds = args.kind or [labelling.kind_of(model) for model in args.model]
    if len(kinds) != len(args.model) or len(set(kinds)) != len(kinds):
        raise ValueError(
            f"--kind: one name for each --model, all different, is needed; got {', '.join(kinds)}"
        )
    ends = [labelling.caption_suffix(labelling.check_kind(kind)) for kind in kinds]
    samples = labelling.open_samples(args.folder, ends)
    for model in args.model:
        hub.resolve_model(model)  # before hours of work with the first: is the last one there?
    done = 0
    for model, kind in zip(args.model, kinds, strict=True):
        outcome = caption(samples, model, kind, args)
        done += outcome.written + outcome.kept
        if distributed.is_main():
            print(f"{kind}: {outcome}")
    if distributed.is_main():
        print(f"\n{labelling.config_lines(samples, args.folder)}")
        print(f"Captions are drawn by their scores: python scripts/score_captions.py {args.folder}")
    if not done:
        sys.exit(1)


def caption(samples: "PictureFiles", model: str, kind: str, args: Namespace) -> "Outcome":
    """Label with one model what has no caption of its kind."""
    from sana.data.labelling import Labelling

    work = Labelling.captions(samples, kind, overwrite=args.overwrite)
    if work.missing:  # a finished run need not load the model
        import torch

        from sana.loading import find_device, find_dtype
        from sana.models.captioner import Captioner

        device = find_device(args.device)
        dtype = find_dtype(args.dtype) or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        settings = {"prompt": args.prompt, "max_new_tokens": args.max_new_tokens}
        captioner = Captioner.from_pretrained(model, device=device, dtype=dtype, **settings)
        work.run(
            lambda pictures, _: [{kind: text} for text in captioner.describe(pictures)],
            batch_size=args.batch_size,
            threads=args.threads,
        )
    return work.finish()


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
