"""Finish pictures whose decoding ran out of memory: NAME.latents.safetensors -> NAME.png beside it.

    python scripts/decode_latents.py output/folder/*.latents.safetensors

A picture made in a folder of generated images is then in its manifest as if nothing had happened, and its file of latents
is removed. Decoding takes strips of rows, and blended tiles if memory runs out again.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from sana.utils.cli import Parser, at_least

if TYPE_CHECKING:
    import torch

    from sana.runtime.latents import Picture

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="files of latents")
    add("--autoencoder", help="folder or hub id (default: the one that each file names)")
    add("--dtype", choices=DTYPES, help="of the autoencoder (default: the one that each file names)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--strip_mib", type=at_least(1), help="begin with strips that take so many MiB")
    add(
        "--tile", type=at_least(32), help="decode in blended tiles of so many pixels a side, a multiple of 32"
    )
    add("--keep", action="store_true", help="do not remove the files of latents")
    return parser


def finish(path: Path, picture: "Picture", pixels: "torch.Tensor") -> Path:
    """Write the picture, and its line in the manifest."""
    from sana.runtime.keeping import write_picture
    from sana.utils import images
    from sana.utils.manifest import Manifest

    [image] = images.to_pil(images.cover(pixels.float(), *picture.size))
    target = write_picture(image, path.parent / Path(picture.file).name, picture)
    if picture.row is not None:
        # The manifest may lie some folders above: the row's file name is relative to it.
        manifest = Manifest(path.resolve().parents[len(Path(picture.row["file"]).parts) - 1])
        manifest.merge()  # what a run that was cut short said of it comes first
        with manifest.part(0) as part:
            part.add(dict(picture.row))
        manifest.merge()
    return target


def run(args: Namespace) -> None:
    """Decode one file after the other; what fails keeps its file of latents. Torch is imported only here."""
    import torch

    from sana.loading import find_device
    from sana.models.autoencoder import Autoencoder
    from sana.runtime import decoding
    from sana.runtime.latents import load_latents
    from sana.runtime.stages import stage

    device = find_device(args.device)
    if args.tile and args.tile % 32:
        raise ValueError(f"--tile must be a multiple of 32, not {args.tile}")
    max_bytes = args.strip_mib and args.strip_mib * 2**20
    found = [(path, *load_latents(path)) for path in args.files]  # all are read before any is decoded
    loaded, failed = {}, []
    for path, latents, picture in found:
        key = (args.autoencoder or picture.autoencoder, DTYPES.get(args.dtype, picture.dtype))
        if key not in loaded:
            loaded.clear()  # one at a time in memory
            with stage(f"reading {key[0]}"):
                loaded[key] = Autoencoder.from_pretrained(key[0], dtype=getattr(torch, key[1]), device=device)
        try:
            with torch.inference_mode(), stage(f"making the picture of {path}"):
                pixels = decoding.decode(loaded[key], latents.to(device), max_bytes=max_bytes, tile=args.tile)
                written = finish(path, picture, pixels)
        except MemoryError as error:
            failed.append(f"{path}: {error}")
            continue
        print(written, flush=True)
        if not args.keep:
            path.unlink()
    for line in failed:
        print(f"decode_latents.py: error: {line}", file=sys.stderr)
    if failed:
        sys.exit(1)


def main() -> None:
    """Entry point."""
    parser = make_parser()
    parser.run(run, parser.parse_args())


if __name__ == "__main__":
    main()
