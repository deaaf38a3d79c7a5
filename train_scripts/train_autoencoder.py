"""Train a small F32C32 deep-compression autoencoder from scratch, or fine-tune a published one.

    python train_scripts/train_autoencoder.py --steps 2000 --work_dir output/tiny_autoencoder
    python train_scripts/train_autoencoder.py --load_from mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers \
        --data_dir PICTURES --image_size 1024 --batch_size 2 --lr 1e-5 --steps 10000 --work_dir output/dc_ae

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sana.utils.cli import Parser, at_least

if TYPE_CHECKING:
    from torch import Tensor

Picture = Callable[[int], "Tensor"]


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="everything is written here")
    parser.add_argument("--steps", type=at_least(1), required=True, help="optimizer steps in all")
    parser.add_argument("--batch_size", type=at_least(1), default=8)
    parser.add_argument(
        "--image_size", type=at_least(32), default=256, help="side of the squares, a multiple of 32"
    )
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument(
        "--latent_noise", type=float, default=0.2, help="most noise on the latents, of their deviation"
    )
    parser.add_argument(
        "--latent_spread",
        type=float,
        help="weight of the term that gives every latent channel mean 0 and variance 1; default: 0.01, and 0 "
        "with --load_from",
    )
    parser.add_argument("--save_every", type=at_least(1), default=500, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir", nargs="+", help="folders of pictures; default: the procedural shapes")
    parser.add_argument("--num_scenes", type=at_least(1), default=60000, help="training scenes of the shapes")
    parser.add_argument("--load_from", help="autoencoder to fine-tune: a diffusers folder or a hub name")
    parser.add_argument(
        "--freeze_encoder", action="store_true", help="train the decoder alone; latents stay as they are"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    return parser


def pictures(args: Namespace) -> tuple[Picture, int, list[Tensor]]:
    """(picture of an index, how many to train on, the held-out pictures)."""
    if args.data_dir:
        from sana.data.image_folder import ImageFolder

        folder = ImageFolder(args.data_dir, args.image_size)
        held_out = set(range(0, len(folder), max(2, len(folder) // 64)))
        kept = [i for i in range(len(folder)) if i not in held_out]
        if not kept:
            raise ValueError(
                f"--data_dir: one picture to train on and one to hold out are needed, got {len(folder)}"
            )
        return (lambda i: folder.image(kept[i])), len(kept), [folder.image(i) for i in sorted(held_out)]

    from sana.data.shapes import ShapesDataset

    unseen = ShapesDataset(args.image_size, 64, split="validation")
    return (
        ShapesDataset(args.image_size, args.num_scenes).image,
        args.num_scenes,
        [unseen.image(i) for i in range(len(unseen))],
    )


def run(args: Namespace) -> None:
    """Wire and train."""
    import torch

    from sana.models.autoencoder import Autoencoder, AutoencoderConfig
    from sana.training.autoencoder import AutoencoderTrainer, AutoencoderTraining
    from sana.utils import logging
    from sana.utils.seeding import generator

    logging.configure()
    if args.image_size % 32:
        raise ValueError(f"--image_size must be a multiple of 32, got {args.image_size}")
    picture, count, held_out = pictures(args)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    autoencoder = (
        Autoencoder.from_pretrained(args.load_from)
        if args.load_from
        else Autoencoder.from_config(AutoencoderConfig())
    )

    def batch(step: int) -> torch.Tensor:
        draw = generator("autoencoder batch", args.seed, step)
        indices = torch.randint(count, (args.batch_size,), generator=draw)
        return torch.stack([picture(i) for i in indices.tolist()]).to(device)

    settings = AutoencoderTraining(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        latent_noise=args.latent_noise,
        latent_spread=(
            args.latent_spread if args.latent_spread is not None else 0.0 if args.load_from else 0.01
        ),
        freeze_encoder=args.freeze_encoder,
        save_every=args.save_every,
    )
    trainer = AutoencoderTrainer(autoencoder.to(device), settings, batch, args.work_dir)
    trainer.resume()
    psnr = trainer.train(torch.stack(held_out).to(device))
    print(f"{args.work_dir / 'autoencoder'}  PSNR {psnr:.2f} dB")


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
