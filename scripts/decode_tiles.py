"""What decoding and encoding in blended tiles costs in quality: PSNR against the whole picture, per tile and overlap.

    python scripts/decode_tiles.py --picture asset/example_data/00000000.jpg --size 1024

Prints a Markdown table; the last column is the tiled decoder of diffusers.
"""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from sana.utils.cli import Parser, at_least, words

if TYPE_CHECKING:
    from torch import Tensor


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--picture", type=Path, default=Path("asset/example_data/00000000.jpg"), help="any picture")
    add(
        "--size",
        type=at_least(64),
        default=1024,
        help="its middle is scaled to that many pixels a side (default: 1024)",
    )
    add(
        "--autoencoder", default="asset/sana_tiny/autoencoder", help="folder or hub id (default: Sana-tiny's)"
    )
    add("--tiles", type=words, default=["256", "512", "768"], help="pixels a side (default: 256,512,768)")
    add("--overlaps", type=words, default=["0", "32", "64", "128"], help="pixels (default: 0,32,64,128)")
    return parser


def psnr(image: "Tensor", reference: "Tensor") -> float:
    """In dB, of pixels in [-1, 1]."""
    return -10 * ((image - reference) / 2).square().mean().log10().item()


def run(args: Namespace) -> None:
    """Print the table. Torch is imported only here."""
    import copy

    import torch
    from PIL import ImageOps

    from sana.models.autoencoder import Autoencoder
    from sana.utils import hub, images

    tiles, overlaps = ([int(word) for word in found] for found in (args.tiles, args.overlaps))
    autoencoder = Autoencoder.from_pretrained(args.autoencoder)
    picture = ImageOps.fit(images.load(hub.resolve(args.picture)).convert("RGB"), (args.size, args.size))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(
        1, args.size, args.size, 3
    )
    pixels = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    print(
        "| tile | overlap | decode, dB | encode and decode, dB | diffusers' decode, dB |\n|---|---|---|---|---|"
    )
    with torch.inference_mode():
        latents = autoencoder.encode(pixels)
        whole = autoencoder.decode(latents)
        for tile in tiles:
            for overlap in overlaps:
                settings = {"tile": tile, "overlap": overlap}
                decoded = autoencoder.decode(latents, **settings)
                again = autoencoder.decode(autoencoder.encode(pixels, **settings), **settings)
                model = copy.deepcopy(autoencoder.model)  # it would stay tiled
                model.enable_tiling(tile, tile, tile - overlap, tile - overlap)
                theirs = model.decode(latents / autoencoder.scaling_factor).sample
                figures = " | ".join(f"{psnr(image, whole):.1f}" for image in (decoded, again, theirs))
                print(f"| {tile} | {overlap} | {figures} |", flush=True)
    print(f"\nThe whole, encoded and decoded, against the picture: {psnr(whole, pixels):.1f} dB.")


def main() -> None:
    """Entry point."""
    parser = make_parser()
    parser.run(run, parser.parse_args())


if __name__ == "__main__":
    main()
