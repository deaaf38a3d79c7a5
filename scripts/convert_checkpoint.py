"""Convert a checkpoint between the published .pth, a diffusers pipeline folder and one .safetensors file.

    python scripts/convert_checkpoint.py SOURCE TARGET

SOURCE is any checkpoint that can be loaded, local or on the hub. The ending of TARGET says what is written: `.pth`, as
published; `.safetensors`, with its config in the metadata; otherwise a folder that diffusers' SanaPipeline loads. The
folder of a DC-AE, also one with the names of its authors, becomes a folder of diffusers' AutoencoderDC. Words like
--scheduler.flow_shift=4 override the config. The paths of the files are printed, one a line.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from sana.utils.cli import Parser, at_least, boolean

if TYPE_CHECKING:
    import torch

# The published converter's names of the samplers.
SCHEDULERS = {"flow-dpm_solver": "flow_dpm-solver", "flow-euler": "flow_euler"}

# Flag and help; the spelling is the published one where there is one.
TEXTS = {
    "orig_ckpt_path": "the published name of SOURCE",
    "dump_path": "the published name of TARGET",
    "config": "YAML file of the model (default: what the source says)",
    "dtype": "fp32, fp16 or bf16, of the converted network (default: as it is)",
    "vae": "autoencoder of the pipeline folder (default: the config's)",
    "text_encoder": "text encoder of the pipeline folder (default: the config's)",
    "model_type": "name of the architecture (default: the config's)",
    "scheduler_type": "flow-dpm_solver, flow-euler or scm (default: the config's sampler)",
}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("source", nargs="?", help="file or folder, local or hf://owner/repo/path")
    parser.add_argument("target", nargs="?", help="FILE.pth, FILE.safetensors or a folder")
    for name, text in TEXTS.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("--image_size", type=at_least(32), help="pixels (default: the config's)")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a training checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET where it exists")
    optional = {"nargs": "?", "const": True, "default": True, "type": boolean}
    parser.add_argument("--save_full_pipeline", **optional, help="false: transformer only (default: true)")
    return parser


def run(args: Namespace, overrides: list[str]) -> None:
    """Everything after the flags are read. Torch is imported only here."""
    source, target = args.source or args.orig_ckpt_path, args.target or args.dump_path
    if not source or not target:
        raise ValueError("the arguments are required: SOURCE and TARGET")

    from sana.loading import find_dtype
    from sana.models.autoencoder import Autoencoder, find_autoencoder
    from sana.models.diffusers_folder import check_free, new_folder
    from sana.utils import logging

    logging.configure()
    target, dtype = Path(target), find_dtype(args.dtype)
    check_free(target, overwrite=args.overwrite)
    if folder := find_autoencoder(source):
        with new_folder(target, overwrite=args.overwrite) as fresh:
            Autoencoder.from_pretrained(folder, dtype=None).save_pretrained(fresh, dtype)
    else:
        convert_transformer(source, target, dtype, args, overrides)
    files = target.rglob("*") if target.is_dir() else [target]
    print(*sorted(file for file in files if file.is_file()), sep="\n")


def convert_transformer(
    source: str, target: Path, dtype: torch.dtype | None, args: Namespace, overrides: list[str]
) -> None:
    """Read the weights and their config, and write both."""
    from sana.loading import find_config, read_checkpoint
    from sana.models import diffusers_folder
    from sana.models.autoencoder import Autoencoder
    from sana.models.single_file import SUFFIXES, write_single_file
    from sana.models.text_encoder import TextEncoder

    if target.suffix in (".bin", ".pt", ".ckpt", ".safetensor"):
        raise ValueError(
            f"{target}: write a {' or '.join(SUFFIXES)} file, or a folder (a name without a suffix)"
        )
    config = find_config(args.config, source, [*override_words(args), *overrides])
    read = read_checkpoint(config, source, dtype=dtype, ema=args.ema)
    about = {"config_text": read.config_text, "published": read.published}
    if target.suffix in SUFFIXES:
        write_single_file(target, read.state, name=config.model.model, network=read.network, **about)
        return
    size, factor = config.model.image_size, config.vae.vae_downsample_rate
    transformer = diffusers_folder.build_transformer_twin(read.state, read.network, size, factor)
    with diffusers_folder.new_folder(target, overwrite=args.overwrite) as folder:
        if args.save_full_pipeline:
            diffusers_folder.write_pipeline_folder(
                folder,
                transformer,
                autoencoder=Autoencoder.from_pretrained(config.vae.vae_pretrained, dtype=None),
                text_encoder=TextEncoder.from_pretrained(config.text_encoder.text_encoder_name, dtype="auto"),
                sampler=config.scheduler.vis_sampler,
                flow_shift=config.scheduler.sampling_shift,
            )
        else:
            transformer.save_pretrained(folder / "transformer")
        diffusers_folder.write_side_files(folder, read.state, **about)


def override_words(args: Namespace) -> list[str]:
    """Flags as overrides of the config."""
    name = args.model_type or ""
    values = {
        "model.model": name.replace("SanaMS1.5_", "SanaMS_").replace("SanaSprint_", "SanaMSCM_"),
        "model.image_size": args.image_size,
        "model.aspect_ratio_type": args.image_size and f"ASPECT_RATIO_{args.image_size}",
        "scheduler.vis_sampler": SCHEDULERS.get(args.scheduler_type, args.scheduler_type),
        "vae.vae_pretrained": args.vae,
        "text_encoder.text_encoder_name": args.text_encoder,
    }
    return [f"--{key}={value}" for key, value in values.items() if value]


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, *parser.parse_known_args())
