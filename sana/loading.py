"""From a checkpoint to networks: the config that it belongs to, the precision that it allows, and its parts."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sana.config import SanaConfig, dump_config, load_config, transformer_overrides
from sana.config.yaml_io import read as read_yaml
from sana.models.autoencoder import Autoencoder
from sana.models.checkpoints import (
    AUTOENCODER_DTYPES,
    PUBLISHED,
    PublishedCheckpoint,
    choose_dtype,
    find_published,
    float16_era,
)
from sana.models.filling import Finish, fill
from sana.models.state_dict import (
    NULL_CAPTION,
    State,
    load_transformer_state,
    read_metadata,
    require_fit,
    resolve_transformer,
)
from sana.models.text_encoder import TextEncoder
from sana.models.transformer import SanaTransformer, TransformerConfig
from sana.models.zoo import TRANSFORMERS, build_transformer, recognise
from sana.utils import distributed, hub
from sana.utils.logging import get_logger

DEFAULT_CONFIG = "configs/sana_config/tiny/Sana_tiny_img256.yaml"
"""The model that the repository trained itself and ships."""

BASE_CONFIG = "configs/sana_config/base.yaml"
"""What is taken for a checkpoint like no published one: it has the instruction that all of them were trained with."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
"""Names in configs and on the command line -> dtype."""

# Field of `TransformerConfig` that tensors can tell -> its key in a config.
_KEYS = {
    "in_channels": "vae.vae_latent_dim",
    "mlp_ratio": "model.mlp_ratio",
    "linear_head_dim": "model.linear_head_dim",
    "caption_channels": "text_encoder.caption_channels",
    "model_max_length": "text_encoder.model_max_length",
    "y_norm": "text_encoder.y_norm",
    "qk_norm": "model.qk_norm",
    "cross_norm": "model.cross_norm",
    "cfg_embed": "model.cfg_embed",
    "timestep_norm_scale_factor": "scheduler.timestep_norm_scale_factor",
}
# Scheduler class of a diffusers folder -> (our sampler, the entry that holds its flow shift).
_SCHEDULERS = {
    "DPMSolverMultistepScheduler": ("flow_dpm-solver", "flow_shift"),
    "FlowMatchEulerDiscreteScheduler": ("flow_euler", "shift"),
    "SCMScheduler": ("scm", None),
}

logger = get_logger(__name__)


OF_TRAINING = ("train.", "model.cfg_scale", "model.class_dropout_prob")
"""What the keys without effect on drawing begin with."""


def find_config(
    config: str | Path | None = None, weights: str | Path | None = None, overrides: Sequence[str] = ()
) -> SanaConfig:
    """What entry points mean by `--config` and `--model_path`: either, both, or (None) the model of the repository.

    Raises:
        ValueError: as `config_for`; or an override is of a key that acts in training alone.
    """
    for word in overrides:
        key = word.removeprefix("--").partition("=")[0]
        if key.startswith(OF_TRAINING):
            own = "; the scale of pictures is --cfg_scale" if key == "model.cfg_scale" else ""
            raise ValueError(f"--{key} acts in training alone, and would change nothing here{own}")
    if weights and not config:
        return config_for(weights, overrides)
    words = [f"--model.load_from={weights}"] if weights else []
    return load_config(config or DEFAULT_CONFIG, [*overrides, *words])


def config_for(path: str | Path, overrides: Sequence[str] = ()) -> SanaConfig:
    """The config of a checkpoint that comes without one; its `model.load_from` is `path`.

    The first of these that there is: `config.yaml` in a pipeline folder; the one in the metadata of a .safetensors file;
    the config of the published checkpoint of this name; `config.yaml` with a `model:` section in the folder of the weights
    or one above; what its tensors say, and in a diffusers folder its json files, completed by the published checkpoint most
    like it. One logged line says which, and what was assumed. The autoencoder and the text encoder of a whole pipeline
    folder are taken from there. From the hub, weights are fetched only where nothing else tells.

    Args:
        path: whatever `load_transformer_state` reads.
        overrides: command-line words that come last, as in `load_config`.

    Raises:
        ValueError: nothing is there, it is no transformer, or the config is wrong.
    """
    published, address, folder = find_published(path), hub.hub_address(path), hub.pipeline_folder(path)
    words = [f"--model.load_from={path}", *_own_parts(address, folder), *overrides]
    if folder is not None and (folder / "config.yaml").is_file():
        return _loaded(path, folder / "config.yaml", words)
    if published is not None and address is not None:  # the file there has no config in it, and can wait
        return _loaded(path, published.config, [*published.config_overrides, *words])
    weights = resolve_transformer(path)
    if embedded := read_metadata(weights).get("config"):
        logger.info("%s: the config in its metadata", path)
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary, f"config in {weights.name}.yaml")
            file.write_text(embedded, encoding="utf-8")
            return load_config(file, words)
    if published is not None:
        return _loaded(path, published.config, [*published.config_overrides, *words])
    beside = [above / "config.yaml" for above in weights.absolute().parents[:2]]
    if found := next((file for file in beside if _describes_a_model(file)), None):
        return _loaded(path, found, words)
    base, recognised = _recognised(path, weights, folder)
    return load_config(base, [*recognised, *words])


def _loaded(path: str | Path, config: str | Path, words: Sequence[str]) -> SanaConfig:
    """`load_config`, and a line that says what was taken for `path`."""
    logger.info("%s: config %s", path, config)
    return load_config(config, words)


def _describes_a_model(file: Path) -> bool:
    """Whether a file that may be of any program has what a config of a model has."""
    return file.is_file() and not {"model", "base"}.isdisjoint(read_yaml(file))


def load_transformer(
    config: SanaConfig,
    path: str | Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    finish: Finish | None = None,
) -> SanaTransformer:
    """The transformer of a config with the weights of `path`, in eval mode on `device`.

    Args:
        dtype: None takes the config's `model.mixed_precision`, on a CPU float32, or what the weights need instead of it.
        finish: see `fill`; called with each module in turn, so that the whole is never held as it is in the file.

    Raises:
        ValueError: as `load_transformer_state` and `require_fit`; or the weights were not made for `dtype`.
    """
    wanted = dtype or (torch.float32 if device.type == "cpu" else DTYPES[config.model.mixed_precision])
    # Before the download: a dtype that is refused should not cost one.
    wanted, clamp = _precision(config, path, wanted, explicit=dtype is not None, device=device)
    state = dict(load_transformer_state(path))
    overrides = transformer_overrides(config) | {"clamp_attention": clamp}
    if wanted == torch.float16:
        overrides["clamp_attention"] = True  # the alternative is infinity
    if wanted == torch.bfloat16:
        overrides["fp32_attention"] = False  # bfloat16 has float32's range: only float16 sums overflow
    model = _without_memory(config, **overrides).to(wanted)
    require_fit(model.state_dict(), state, file=path, model=f"the {config.model.model} of the config")
    _warn_of_two_eras(config, path, state)
    own = model.state_dict()
    assert own.keys() >= {name for name, _ in model.named_buffers()}, "a buffer that no checkpoint fills"
    if NULL_CAPTION in own and NULL_CAPTION not in state:  # only training reads it, and sets it before
        state[NULL_CAPTION] = torch.zeros(own[NULL_CAPTION].shape)
    fill(model, state, device=device, dtype=wanted, finish=finish, files=weight_files(path))
    return model.eval().requires_grad_(False)


def weight_files(path: str | Path) -> list[Path]:
    """The files that hold a transformer's weights."""
    file = resolve_transformer(path)
    if not hub.is_index(file):
        return [file]
    return [file.parent / shard for shard in sorted(set(hub.read_index(file).values()))]


def known_checkpoint(path: str | Path) -> PublishedCheckpoint | None:
    """The published checkpoint that weights are, by their name or by what our converter wrote into them; else None.

    Raises:
        ValueError: as `resolve_transformer`.
    """
    if published := find_published(path):
        return published
    folder = hub.pipeline_folder(path) if hub.hub_address(path) else None
    file = resolve_transformer(path) if folder is None else folder / hub.SIDE_FILE
    return PUBLISHED.get(read_metadata(file).get("published")) if file.is_file() else None


def _precision(
    config: SanaConfig, path: str | Path, wanted: torch.dtype, *, explicit: bool, device: torch.device
) -> tuple[torch.dtype, bool]:
    """(dtype that weights run in, whether their attention is clipped); errors as in `choose_dtype`.

    Where nothing says which published checkpoint they are, a config of the float16 era is taken at its word.
    """
    known = known_checkpoint(path)
    what = f"these weights ({known.name})" if known else ""
    half = config.model.mixed_precision == "fp16"
    if known is None and half:
        known = float16_era(config.model.model, qk_norm=config.model.qk_norm)
        what = "weights whose config has model.mixed_precision fp16"
    if known is None:
        return wanted, half
    return choose_dtype(known.dtypes, wanted, explicit=explicit, device=device, what=what), known.clamp


def _warn_of_two_eras(config: SanaConfig, path: str | Path, state: State) -> None:
    """Published weights under a name of their own may be those that need float16's clipping; only the user knows.

    Weights that were trained here have no `pos_embed`.
    """
    older = float16_era(config.model.model, qk_norm=config.model.qk_norm)
    if "pos_embed" not in state or older is None or config.model.mixed_precision == "fp16":
        return
    if not config.model.use_pe and known_checkpoint(path) is None:
        logger.warning(
            "%s: of no published name, so taken for %s weights as the config says; if they are a renamed %s, which was made "
            "for fp16, pictures will be wrong: give --model.mixed_precision=fp16",
            *(path, config.model.mixed_precision, older.name),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A transformer's weights with all that has to go with them into another file."""

    config: SanaConfig
    """Of the model; its `model.load_from` is empty, and its `model.mixed_precision` what the weights were made for."""
    network: TransformerConfig
    state: State
    """Under the published names, as stored or in the dtype that was asked for."""
    published: str | None
    """Key in `PUBLISHED`, where it is one of them."""

    @property
    def config_text(self) -> str:
        """The complete config as YAML."""
        with tempfile.TemporaryDirectory() as folder:
            dump_config(self.config, Path(folder, "config.yaml"))
            return Path(folder, "config.yaml").read_text(encoding="utf-8")


def read_checkpoint(
    config: SanaConfig, path: str | Path, *, dtype: torch.dtype | None = None, ema: bool = False
) -> Checkpoint:
    """The weights in `path`, of a model with this config.

    Args:
        dtype: what they are converted to; None leaves them as they are.
        ema: take the averaged weights of a training checkpoint.

    Raises:
        ValueError: as `load_transformer_state` and `require_fit`; or the weights do not stand `dtype`.
    """
    known = known_checkpoint(path)
    if dtype is not None:
        _precision(config, path, dtype, explicit=True, device=torch.device("cpu"))
    state = load_transformer_state(path, ema=ema)
    network = empty_transformer(config)
    require_fit(network.state_dict(), state, file=path, model=f"the {config.model.model} of the config")
    if dtype is not None:
        state = {key: value.to(dtype) for key, value in state.items()}
        if bad := [key for key, value in state.items() if not value.isfinite().all()]:
            raise ValueError(
                f"{bad[0]} is not finite in {str(dtype).removeprefix('torch.')}: choose another --dtype"
            )
    model = replace(config.model, load_from=None)  # the weights come with it
    if known is not None:  # the name that told the precision is lost: the config says it from now on
        precision = next(name for name, kind in DTYPES.items() if kind == known.dtypes[0])
        model = replace(model, mixed_precision=precision)
    config = replace(config, model=model)
    network = replace(network.config, clamp_attention=transformer_overrides(config)["clamp_attention"])
    return Checkpoint(config=config, network=network, state=state, published=known and known.name)


def empty_transformer(config: SanaConfig) -> SanaTransformer:
    """The transformer of a config on the meta device: its parameters have shapes, and no memory."""
    return _without_memory(config, **transformer_overrides(config)).eval().requires_grad_(False)


def load_autoencoder(
    config: SanaConfig, device: torch.device, dtype: torch.dtype | None = None
) -> Autoencoder:
    """The autoencoder of a config in `dtype`; None is its `vae.weight_dtype`, float32 in place of float16, on a CPU float32."""
    name = config.vae.vae_pretrained
    usual = torch.float32 if device.type == "cpu" else DTYPES[config.vae.weight_dtype]
    what = f"autoencoder {name}"
    dtype = choose_dtype(AUTOENCODER_DTYPES, dtype or usual, explicit=False, device=device, what=what)
    return Autoencoder.from_pretrained(name, dtype=dtype, device=device)


def load_text_encoder(
    config: SanaConfig,
    device: torch.device,
    *,
    lowercase: bool = False,
    dtype: torch.dtype | None = None,
    finish: Finish | None = None,
) -> TextEncoder:
    """The text encoder of a config in `dtype`; None is bfloat16 as the published models were trained, on a CPU float32.

    Args:
        finish: see `fill`. Weights are then read layer by layer, and on a CPU None is the dtype that they are stored in.
    """
    usual = torch.float32 if device.type == "cpu" else torch.bfloat16
    encoder = TextEncoder.from_pretrained(
        config.text_encoder.text_encoder_name,
        max_length=config.text_encoder.model_max_length,
        chi_prompt=config.text_encoder.chi_prompt,
        dtype=(dtype or usual)
        if finish is None
        else "auto",  # as stored: views of the file, which take no memory
        device=device if finish is None else "cpu",
        lowercase=lowercase,
    )
    if finish is not None:
        files = Path(encoder.model.name_or_path).glob("*.safetensors")
        wanted = dtype or (None if device.type == "cpu" else torch.bfloat16)
        fill(encoder.model, None, device=device, dtype=wanted, finish=finish, files=list(files))
    return encoder


def find_device(name: torch.device | str | None) -> torch.device:
    """The device of a name; None is the GPU of this process where there is one.

    Raises:
        ValueError: this machine or this build of torch has no such device.
    """
    if name is None:
        return (
            torch.device("cuda", distributed.local_rank())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise ValueError(f"no device {str(name)!r} here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def find_dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of a name; None stays None.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose from {', '.join(DTYPES)}")
    return DTYPES[name]


def _without_memory(config: SanaConfig, **overrides: Any) -> SanaTransformer:
    with torch.device("meta"):
        return build_transformer(config.model.model, **overrides)


def _own_parts(address: str | None, folder: Path | None) -> list[str]:
    """Overrides that name the autoencoder and the text encoder of a pipeline, on the hub (`address`) or in `folder`."""
    if folder is None:
        return []
    if address is not None:  # nothing is fetched for it here
        parts = _json(folder / "model_index.json")
    else:
        parts = [part for part in ("vae", "text_encoder") if (folder / part).is_dir()]
    keys = {"vae": "vae.vae_pretrained", "text_encoder": "text_encoder.text_encoder_name"}
    return [f"--{key}={address or folder}/{part}" for part, key in keys.items() if part in parts]


def _recognised(path: str | Path, weights: Path, folder: Path | None) -> tuple[str, list[str]]:
    """(base config, overrides) of a checkpoint from its tensors and, in a diffusers folder, its json files."""
    state = load_transformer_state(path)
    try:
        name, overrides = recognise(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    shape = _shape(name, overrides)
    network = _json(weights.parent / "config.json")
    side = _image_side(state, network, TRANSFORMERS[name].patch_size)
    like = _most_like(name, shape, side or 1024)
    own = load_config(DEFAULT_CONFIG).model.model
    base = like.config if like else DEFAULT_CONFIG if name == own else BASE_CONFIG
    words = [*(like.config_overrides if like else ()), f"--model.model={name}"]
    words += [f"--{key}={json.dumps(shape[field])}" for field, key in _KEYS.items()]
    words += [f"--model.image_size={side}"] if side else []
    words += _precision_words(state) + _network_words(network)
    words += _scheduler_words(_json(folder / "scheduler" / "scheduler_config.json")) if folder else []
    config = load_config(base, words)
    logger.warning(
        "%s has no config: its tensors are those of %s; assumed from %s: %d pixels, flow shift %g, %s, %s; "
        "give --config if that is wrong",
        *(path, name, base, config.model.image_size, config.scheduler.sampling_shift),
        *(config.scheduler.vis_sampler, config.model.mixed_precision),
    )
    return base, words


def _shape(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `_KEYS` of an architecture with overrides."""
    return {field: overrides.get(field, getattr(TRANSFORMERS[name], field)) for field in _KEYS}


def _most_like(name: str, shape: dict[str, Any], side: int) -> PublishedCheckpoint | None:
    """The published checkpoint of an architecture that differs in the fewest fields, then least in its resolution."""

    def distance(entry: PublishedCheckpoint) -> tuple[int, float]:
        theirs = _shape(name, entry.overrides)
        different = sum(theirs[field] != value for field, value in shape.items())
        return different, abs(math.log(entry.resolution / side))

    return min(
        (entry for entry in PUBLISHED.values() if entry.architecture == name), key=distance, default=None
    )


def _image_side(state: State, network: dict[str, Any], patch_size: int) -> int | None:
    """Side in pixels of the images that a model was trained on, None if nothing tells: 32 pixels to a latent."""
    if "pos_embed" in state:
        return 32 * patch_size * math.isqrt(state["pos_embed"].shape[1])
    return 32 * network.get("sample_size", 0) or None


def _precision_words(state: State) -> list[str]:
    """Weights in a half type were made for it; what is stored in float32 may be of any kind."""
    stored = state["x_embedder.proj.weight"].dtype
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    return [f"--model.mixed_precision={names[stored]}"] if stored in names else []


def _network_words(network: dict[str, Any]) -> list[str]:
    """Overrides for position embedding and time scale, which tensors do not tell, from diffusers' network config."""
    words = []
    if network.get("guidance_embeds"):
        words.append(f"--model.cfg_embed_scale={network.get('guidance_embeds_scale', 0.1)}")
    elif network.get("timestep_scale", 1.0) != 1.0:
        words.append(f"--scheduler.timestep_norm_scale_factor={round(1 / network['timestep_scale'], 6)}")
    if "interpolation_scale" not in network:
        return words
    scale = network["interpolation_scale"]
    words.append(f"--model.use_pe={json.dumps(scale is not None)}")
    return words + ([f"--model.pe_interpolation={scale}"] if scale is not None else [])


def _scheduler_words(scheduler: dict[str, Any]) -> list[str]:
    """Overrides for sampler and flow shift from the config of a diffusers scheduler; none from an empty one."""
    sampler, shift = _SCHEDULERS.get(scheduler.get("_class_name"), (None, None))
    words = [f"--scheduler.vis_sampler={sampler}"] if sampler else []
    return words + ([f"--scheduler.flow_shift={scheduler[shift]}"] if shift in scheduler else [])


def _json(file: Path) -> dict[str, Any]:
    """The object in a json file; an empty one where there is no such file."""
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
