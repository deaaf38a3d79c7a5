"""Convert a checkpoint between the published .pth, a diffusers pipeline folder and one .safetensors file.

    python scripts/convert_checkpoint.py SOURCE TARGET

SOURCE is any checkpoint that can be loaded, local or on the hub. The ending of TARGET says what is written: `.pth`, as
published; `.safetensors`, with its config in the metadata; otherwise a folder that diffusers' SanaPipeline loads. The
folder of a DC-AE, also one with the names of its authors, becomes a folder of diffusers' AutoencoderDC. Words like
--scheduler.flow_shift=4 override the config. The paths of the files are printed, one a line.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from sana.utils.cli import Parser, at_least, boolean

if TYPE_CHECKING:
    import torch

    from sana.config import SanaConfig

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
    from sana.loading import DTYPES, empty_transformer, find_config
    from sana.models import diffusers_folder
    from sana.models.autoencoder import Autoencoder
    from sana.models.checkpoints import choose_dtype, find_published
    from sana.models.key_names import misfits
    from sana.models.single_file import SUFFIXES, write_single_file
    from sana.models.state_dict import load_transformer_state
    from sana.models.text_encoder import TextEncoder

    if target.suffix in (".bin", ".pt", ".ckpt", ".safetensor"):
        raise ValueError(
            f"{target}: write a {' or '.join(SUFFIXES)} file, or a folder (a name without a suffix)"
        )
    config = find_config(args.config, source, [*override_words(args), *overrides])
    model = replace(config.model, load_from=None)  # the weights come with it
    if published := find_published(source):
        if dtype is not None:
            choose_dtype(published.dtypes, dtype, explicit=True, device="cpu")
        # The name by which the precision was known is lost here: the config says it from now on.
        model = replace(
            model, mixed_precision=next(name for name, kind in DTYPES.items() if kind == published.dtypes[0])
        )
    config = replace(config, model=model)
    state = load_transformer_state(source, ema=args.ema)
    network = empty_transformer(config)
    if problems := misfits(network.state_dict(), state):
        raise ValueError(f"the weights are not those of {config.model.model}: {'; '.join(problems)}")
    if dtype is not None:
        state = {key: value.to(dtype) for key, value in state.items()}
        if bad := [key for key, value in state.items() if not value.isfinite().all()]:
            raise ValueError(f"{bad[0]} is not finite in {args.dtype}: choose another --dtype")
    text = config_text(config)
    if target.suffix in SUFFIXES:
        write_single_file(target, state, name=config.model.model, network=network.config, config_text=text)
        return
    size, factor = config.model.image_size, config.vae.vae_downsample_rate
    transformer = diffusers_folder.build_transformer_twin(state, network.config, size, factor)
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
        # Keeps what diffusers has no place for, such as the instruction to the text encoder.
        (folder / "config.yaml").write_text(text, encoding="utf-8")


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


def config_text(config: SanaConfig) -> str:
    """The complete config as YAML."""
    from sana.config import dump_config

    with TemporaryDirectory() as folder:
        dump_config(config, Path(folder, "config.yaml"))
        return Path(folder, "config.yaml").read_text(encoding="utf-8")


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, *parser.parse_known_args())
