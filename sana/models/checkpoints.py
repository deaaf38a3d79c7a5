"""The published checkpoints as data: where they are, what they are, and the precision that each was made for.

Hub ids, precisions and languages are those of the model zoo of NVlabs/Sana; the rest is that of the published configs.
`asset/docs/model_zoo.md` shows this table, and is tested against it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sana.utils.logging import get_logger

logger = get_logger(__name__)

_OWNER = "Efficient-Large-Model"
_CONFIGS = "configs/sana_config"
_FP16, _BF16, _FP32 = torch.float16, torch.bfloat16, torch.float32

SEE_HUB_PAGE = "see its hub page"


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedCheckpoint:
    """One set of released weights of the transformer, and what it needs to draw what it was trained for."""

    pth: str
    """Hub address of the file of the first release, as `load_transformer_state` takes it."""
    diffusers: str
    """Hub id of the same weights as a pipeline of diffusers."""
    config: str
    """The YAML file of this repository that describes it."""
    config_overrides: tuple[str, ...] = ()
    """Command-line words over `config`."""
    architecture: str
    """Name in `sana.models.zoo.TRANSFORMERS`."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its `TransformerConfig` that differ, those that shapes cannot tell too; but for `clamp`."""
    resolution: int
    """Side of the square training images, in pixels."""
    dtypes: tuple[torch.dtype, ...]
    """What the transformer may run in, the best first. On a CPU float32 always may."""
    clamp: bool = False
    """`TransformerConfig.clamp_attention`: trained where float16's range clipped the attention's output, which has to
    be clipped in every dtype then."""
    text_encoder: str = f"{_OWNER}/gemma-2-2b-it"
    """Hub id."""
    text_encoder_dtypes: tuple[torch.dtype, ...] = (_BF16, _FP32)
    autoencoder: str = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    """Hub id. Any of `AUTOENCODERS` fits: they share the latent space."""
    autoencoder_dtypes: tuple[torch.dtype, ...] = (_FP32, _BF16)
    flow_shift: float = 3.0
    sampler: str = "flow_dpm-solver"
    steps: int = 20
    cfg: float = 4.5
    """Scale of classifier-free guidance."""
    pag: float = 1.0
    """Scale of perturbed-attention guidance; 1 is off."""
    pag_layers: tuple[int, ...] = (8,)
    """Blocks that it perturbs; none where the model was not published with it."""
    languages: str = "multilingual"
    """Of prompts: "multilingual" (English, Chinese, emoji) or "English"."""
    licence: str = SEE_HUB_PAGE
    """What is known of the weights' licence here. The code's licence (Apache-2.0) does not cover them."""

    @property
    def name(self) -> str:
        """Its key in `PUBLISHED`: the name of its repository."""
        return self.repo.rpartition("/")[2]

    @property
    def repo(self) -> str:
        """Hub id of the repository that holds `pth`."""
        return "/".join(self.pth.removeprefix("hf://").split("/")[:2])


def _published(name: str, *, file: str | None = None, **settings: Any) -> tuple[str, PublishedCheckpoint]:
    """An entry whose repository is called `name` and whose file is, unless `file` says otherwise, too."""
    pth = f"hf://{_OWNER}/{name}/checkpoints/{file or name}.pth"
    return name, PublishedCheckpoint(pth=pth, diffusers=f"{_OWNER}/{name}_diffusers", **settings)


# Released for fp16 and fp32; in other dtypes the pictures were reported grey, noisy or black.
_HALF: dict[str, Any] = {"dtypes": (_FP16, _FP32), "clamp": True}
# Trained in bf16, whose range is float32's: their activations may pass float16's.
_BRAIN: dict[str, Any] = {"dtypes": (_BF16, _FP32)}
_600M: dict[str, Any] = {
    "architecture": "SanaMS_600M_P1_D28",
    # The published app perturbs this block; the training files name none.
    "config_overrides": ("--model.pag_applied_layers=[14]",),
    "pag_layers": (14,),
}
_1600M: dict[str, Any] = {"architecture": "SanaMS_1600M_P1_D20"}
_NORMS: dict[str, Any] = {"qk_norm": True, "cross_norm": True}
_512: dict[str, Any] = {"resolution": 512}
_1024: dict[str, Any] = {"resolution": 1024}
_ENGLISH: dict[str, Any] = {"languages": "English"}
_SPRINT: dict[str, Any] = {
    "sampler": "scm",
    "flow_shift": 1.0,
    "steps": 2,
    "pag_layers": (),
    **_1024,
    **_BRAIN,
}
_SPRINT_LICENCE = "see its hub page; whether it is for research only is an open question (NVlabs/Sana#332)"
# The teachers are flow models without an embedding of the guidance scale: sampled as the other models are.
_TEACHER: dict[str, Any] = {
    "config_overrides": (
        "--model.cfg_embed=false",
        "--scheduler.vis_sampler=flow_dpm-solver",
        "--scheduler.flow_shift=3.0",
    ),
    "overrides": {"cfg_embed": False},
    "pag_layers": (),
    "licence": _SPRINT_LICENCE,
    **_1024,
    **_BRAIN,
}
_SPRINT_CONFIGS = "configs/sana_sprint_config/1024ms/SanaSprint_{}_1024px_allqknorm_bf16_scm_ladd.yaml"
_SPRINT_600M: dict[str, Any] = {
    "config": _SPRINT_CONFIGS.format("600M"),
    "architecture": "SanaMSCM_600M_P1_D28",
}
_SPRINT_1600M: dict[str, Any] = {
    "config": _SPRINT_CONFIGS.format("1600M"),
    "architecture": "SanaMSCM_1600M_P1_D20",
}
_IMG512 = {"config": f"{_CONFIGS}/512ms/Sana_1600M_img512.yaml"}
_IMG1024 = {"config": f"{_CONFIGS}/1024ms/Sana_1600M_img1024.yaml"}

PUBLISHED: dict[str, PublishedCheckpoint] = dict(
    (
        _published(
            "Sana_600M_512px",
            file="Sana_600M_512px_MultiLing",
            config=f"{_CONFIGS}/512ms/Sana_600M_img512.yaml",
            **_600M | _512 | _HALF,
        ),
        _published(
            "Sana_600M_1024px",
            file="Sana_600M_1024px_MultiLing",
            config=f"{_CONFIGS}/1024ms/Sana_600M_img1024.yaml",
            flow_shift=4.0,
            **_600M | _1024 | _HALF,
        ),
        _published("Sana_1600M_512px", **_IMG512 | _1600M | _512 | _HALF | _ENGLISH),
        _published("Sana_1600M_512px_MultiLing", **_IMG512 | _1600M | _512 | _HALF),
        _published("Sana_1600M_1024px", **_IMG1024 | _1600M | _1024 | _HALF | _ENGLISH),
        _published("Sana_1600M_1024px_MultiLing", **_IMG1024 | _1600M | _1024 | _HALF),
        _published("Sana_1600M_1024px_BF16", **_IMG1024 | _1600M | _1024 | _BRAIN),
        _published(
            "Sana_1600M_2Kpx_BF16",
            config=f"{_CONFIGS}/2048ms/Sana_1600M_img2048_bf16.yaml",
            overrides={"use_pe": True, "pe_base_size": 64},
            resolution=2048,
            **_1600M | _BRAIN,
        ),
        _published(
            "Sana_1600M_4Kpx_BF16",
            config=f"{_CONFIGS}/4096ms/Sana_1600M_img4096_bf16.yaml",
            overrides={"use_pe": True, "pe_base_size": 128, "pe_interpolation": 2.0},
            resolution=4096,
            flow_shift=6.0,
            **_1600M | _BRAIN,
        ),
        _published(
            "SANA1.5_1.6B_1024px",
            config="configs/sana1-5_config/1024ms/Sana_1600M_1024px_allqknorm_bf16_lr2e5.yaml",
            overrides=_NORMS,
            **_1600M | _1024 | _BRAIN,
        ),
        _published(
            "SANA1.5_4.8B_1024px",
            config="configs/sana1-5_config/1024ms/"
            "Sana_4800M_1024px_came8bit_grow_constant_allqknorm_bf16_lr2e5.yaml",
            architecture="SanaMS_4800M_P1_D60",
            overrides=_NORMS,
            **_1024 | _BRAIN,
        ),
        _published("Sana_Sprint_0.6B_1024px", licence=_SPRINT_LICENCE, **_SPRINT_600M | _SPRINT),
        _published("Sana_Sprint_1.6B_1024px", licence=_SPRINT_LICENCE, **_SPRINT_1600M | _SPRINT),
        _published("Sana_Sprint_0.6B_1024px_teacher", **_SPRINT_600M | _TEACHER),
        _published("Sana_Sprint_1.6B_1024px_teacher", **_SPRINT_1600M | _TEACHER),
    )
)
"""Name (of its hub repository) -> checkpoint. ControlNets and quantised weights are not among them: not supported."""

AUTOENCODER_DTYPES = PUBLISHED["Sana_1600M_1024px"].autoencoder_dtypes
"""What a DC-AE may run in. One contract for all, of whatever name: activations of the published ones overflow float16,
and so do those of Sana-tiny's."""

AUTOENCODERS: dict[str, str] = {
    "mit-han-lab/dc-ae-f32c32-sana-1.0": "native",
    "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers": "diffusers",
    "mit-han-lab/dc-ae-f32c32-sana-1.1": "native",
    "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers": "diffusers",
    "mit-han-lab/dc-ae-lite-f32c32-sana-1.1": "native",
    "mit-han-lab/dc-ae-lite-f32c32-sana-1.1-diffusers": "diffusers",
}
"""Hub id of each published DC-AE -> whose names its tensors have. 1.1 is 1.0 with a fine-tuned decoder, Lite has a
lighter one; all share the encoder."""


def find_published(name_or_path: str | Path) -> PublishedCheckpoint | None:
    """The published checkpoint that a hub id, an address on the hub or a local path names; None if it names none.

    A local path does so by its file (`Sana_1600M_1024px.pth`), by a folder called as the diffusers repository, or by
    lying in the cache of huggingface_hub.
    """
    parts = Path(str(name_or_path).removeprefix("hf://")).parts
    ids = {"/".join(pair) for pair in zip(parts, parts[1:], strict=False)}
    ids |= {part.removeprefix("models--").replace("--", "/") for part in parts if part.startswith("models--")}
    for entry in PUBLISHED.values():
        names = {entry.pth.rpartition("/")[2], entry.diffusers.rpartition("/")[2]}
        if ids & {entry.repo, entry.diffusers} or names & set(parts[-3:]):
            return entry
    return None


def float16_era(architecture: str, *, qk_norm: bool) -> PublishedCheckpoint | None:
    """The first published checkpoint of an architecture that was made for float16; None if there is none.

    Tensors do not tell its weights from those of later checkpoints of the same architecture.
    """
    return next(
        (
            entry
            for entry in PUBLISHED.values()
            if entry.dtypes[0] == _FP16
            and entry.architecture == architecture
            and entry.overrides.get("qk_norm", False) == qk_norm
        ),
        None,
    )


_WHY = {
    _FP16: "their activations may pass float16's largest number, 65504, and become infinite",
    _BF16: "they were made for float16's ten bits of precision, and bfloat16 has seven",
}


def choose_dtype(
    allowed: Sequence[torch.dtype],
    wanted: torch.dtype,
    *,
    explicit: bool,
    device: torch.device | str,
    what: str = "these weights",
) -> torch.dtype:
    """The dtype that weights run in: `wanted` where it is allowed, else what they were made for.

    Args:
        allowed: `PublishedCheckpoint.dtypes` (or those of another component), the best first.
        explicit: the user asked for `wanted`; otherwise it stands in a config, which is corrected with one logged line.
        device: on a CPU float32 is always allowed, and the choice where `wanted` is not.
        what: whose precision it is, for the message.

    Raises:
        ValueError: an explicit dtype that is not allowed.
    """
    on_cpu = torch.device(device).type == "cpu"
    allowed = tuple(dict.fromkeys((_FP32, *allowed) if on_cpu else allowed))
    if wanted in allowed:
        return wanted
    names = " or ".join(_name(dtype) for dtype in allowed)
    why = _WHY.get(wanted, "they were not made for it")
    if explicit:
        raise ValueError(f"{what} do not run in {_name(wanted)}: {why}; use {names}")
    logger.warning(
        "%s: %s instead of the config's %s: %s (allowed: %s)",
        *(what, _name(allowed[0]), _name(wanted), why, names),
    )
    return allowed[0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
