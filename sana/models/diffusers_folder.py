"""Write what diffusers loads: a whole pipeline folder (`SanaPipeline.from_pretrained`), or the transformer alone.

The classes of diffusers write their own files, so that names, configs and index are theirs. Such folders are read by
`load_transformer_state`, `Autoencoder.from_pretrained` and `TextEncoder.from_pretrained`.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from safetensors.torch import save_file

from sana.models.autoencoder import Autoencoder
from sana.models.key_names import NOT_IN_DIFFUSERS, State, to_diffusers
from sana.models.text_encoder import TextEncoder
from sana.models.transformer import TransformerConfig
from sana.utils import hub

SAMPLERS = ("flow_dpm-solver", "flow_euler", "scm")
"""Names of the samplers that diffusers has a scheduler for."""

_OURS = ("model_index.json", "config.json", "transformer/config.json")
"""A folder that holds one of these was written by a converter and may be replaced."""
_WEIGHTS = ("diffusion_pytorch_model", "model.", "model-")  # how the files of a part begin, sharded or not


@contextmanager
def new_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and is gone when not.

    Raises:
        ValueError: `target` exists and `overwrite` is false, or it holds what the new folder has nothing for.
    """
    check_free(target, overwrite=overwrite)
    if target.is_file() or (
        target.is_dir() and any(target.iterdir()) and not any((target / name).is_file() for name in _OURS)
    ):
        raise ValueError(f"{target} is no folder of a model that could be replaced: name another")
    target.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    fresh, old = target.parent / f".{token}.tmp", target.parent / f".{token}.old"
    fresh.mkdir()
    try:
        yield fresh
        if lost := _would_be_lost(target, fresh):
            raise ValueError(
                f"{target} also holds {', '.join(lost[:3])}, not written here: name another target"
            )
        if target.exists():
            os.replace(target, old)
        os.replace(fresh, target)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _would_be_lost(target: Path, fresh: Path) -> list[str]:
    """Files of `target` that `fresh` does not replace; weights count as replaced where their folder has new ones, and the
    side file belongs to them."""

    def files(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}

    new = files(fresh)
    weights = {path.parent for path in new if path.name.startswith(_WEIGHTS)}
    return sorted(
        str(path)
        for path in files(target) - new
        if not (path.name.startswith(_WEIGHTS) and path.parent in weights) and path != Path(hub.SIDE_FILE)
    )


def check_free(target: Path, *, overwrite: bool) -> None:
    """Refuse to write where something is: an empty folder is nothing.

    Raises:
        ValueError: `target` exists and `overwrite` is false.
    """
    taken = any(target.iterdir()) if target.is_dir() else target.exists()
    if taken and not overwrite:
        raise ValueError(f"{target} exists: name another target, or give --overwrite")


def transformer_arguments(config: TransformerConfig, image_size: int, factor: int = 32) -> dict[str, Any]:
    """The arguments of `SanaTransformer2DModel` for a network trained at `image_size` pixels, `factor` to a latent.

    Raises:
        ValueError: a setting that diffusers' network does not have.
    """
    if not config.y_norm or config.qk_norm != config.cross_norm:
        raise ValueError(
            f"diffusers has no Sana with y_norm={config.y_norm}, qk_norm={config.qk_norm}, "
            f"cross_norm={config.cross_norm}: it norms the caption, and queries and keys in both attentions or in neither"
        )
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_attention_heads": config.hidden_size // config.linear_head_dim,
        "attention_head_dim": config.linear_head_dim,
        "num_layers": config.depth,
        "num_cross_attention_heads": config.num_heads,
        "cross_attention_head_dim": config.hidden_size // config.num_heads,
        "cross_attention_dim": config.hidden_size,
        "caption_channels": config.caption_channels,
        "mlp_ratio": config.mlp_ratio,
        "sample_size": image_size // factor,
        "patch_size": config.patch_size,
        "interpolation_scale": config.pe_interpolation if config.use_pe else None,
        "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
        "guidance_embeds": config.cfg_embed,
        "guidance_embeds_scale": config.cfg_embed_scale if config.cfg_embed else 0.1,
        # diffusers' Sprint pipeline gives a guided network its time in [0, 1] already.
        "timestep_scale": 1.0 if config.cfg_embed else 1 / config.timestep_norm_scale_factor,
    }


def build_transformer_twin(
    state: State, config: TransformerConfig, image_size: int, factor: int = 32
) -> SanaTransformer2DModel:
    """diffusers' network with the weights of `state` (published names), in their dtype, without a copy of them.

    Raises:
        ValueError: as `transformer_arguments` and `to_diffusers`.
        RuntimeError: names or shapes differ from what the config says.
    """
    # Buffers are real: the position table is in no state dict.
    with init_empty_weights(include_buffers=False):
        twin = SanaTransformer2DModel(**transformer_arguments(config, image_size, factor))
    twin.load_state_dict(to_diffusers(state), assign=True)
    return twin.eval()


def write_side_files(folder: Path, state: State, *, config_text: str, published: str | None) -> None:
    """Write what diffusers has no place for: config.yaml (the complete config), and the tensors of `NOT_IN_DIFFUSERS`.

    Args:
        published: key in `sana.models.checkpoints.PUBLISHED` of the weights, kept in the metadata of those tensors.
    """
    (folder / "config.yaml").write_text(config_text, encoding="utf-8")
    rest = {key: state[key].contiguous() for key in NOT_IN_DIFFUSERS if key in state}
    if rest or published:
        save_file(
            rest, folder / hub.SIDE_FILE, {"format": "pt"} | ({"published": published} if published else {})
        )


def build_scheduler(sampler: str, flow_shift: float) -> Any:
    """diffusers' scheduler for one of `SAMPLERS`, with the settings of the published folders.

    Raises:
        ValueError: an unknown sampler.
    """
    if sampler == "flow_dpm-solver":
        return DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=flow_shift,
            lower_order_final=True,
            final_sigmas_type="zero",
        )
    if sampler == "flow_euler":
        return FlowMatchEulerDiscreteScheduler(shift=flow_shift)
    if sampler == "scm":
        return SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    raise ValueError(f"diffusers has no scheduler for {sampler!r}; choose from {', '.join(SAMPLERS)}")


def write_pipeline_folder(
    folder: Path,
    transformer: SanaTransformer2DModel,
    *,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder,
    sampler: str,
    flow_shift: float,
) -> None:
    """Write transformer/, vae/, text_encoder/, tokenizer/, scheduler/ and model_index.json, each part in its dtype.

    Raises:
        ValueError: the parts do not fit each other, or an unknown sampler.
    """
    channels, width = transformer.config.in_channels, transformer.config.caption_channels
    if (autoencoder.latent_channels, text_encoder.hidden_size) != (channels, width):
        raise ValueError(
            f"the transformer is for {channels} latent channels and captions of width {width}, but the autoencoder has "
            f"{autoencoder.latent_channels} and the text encoder {text_encoder.hidden_size}: give --vae and --text_encoder"
        )
    kind = SanaSprintPipeline if transformer.config.guidance_embeds else SanaPipeline
    kind(
        tokenizer=text_encoder.tokenizer,
        text_encoder=text_encoder.model,
        vae=autoencoder.model,
        transformer=transformer,
        scheduler=build_scheduler(sampler, flow_shift),
    ).save_pretrained(folder)
