"""What a config may say: values of each setting, and settings that must agree with each other."""

import math
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import Any

from sana.config.schema import SanaConfig, TrainConfig
from sana.config.yaml_io import ConfigError
from sana.resolution import TABLES

Faults = Iterator[tuple[str, str]]  # dotted key, what is wrong with its value

_CHOICES: dict[str, tuple[Any, ...]] = {
    "data.transform": ("default_train",),
    "data.caption_selection_type": ("clipscore", "softmax", "proportion"),
    "model.mixed_precision": ("fp16", "bf16", "fp32"),
    "model.attn_type": ("linear", "triton_linear"),
    "model.kernels": (None, "auto", "torch", "triton"),
    "model.ffn_type": ("glumbconv",),
    "model.mlp_acts": (("silu", "silu", None),),
    "model.guidance_type": ("classifier-free", "classifier-free_PAG"),
    "vae.vae_type": ("AutoencoderDC",),
    "vae.weight_dtype": ("float32", "bfloat16", "float16"),
    "scheduler.train_sampling_steps": (1000,),
    "scheduler.predict_flow_v": (True,),
    "scheduler.noise_schedule": ("linear_flow",),
    "scheduler.pred_sigma": (False,),
    "scheduler.weighting_scheme": ("logit_normal", "uniform", None, "logit_normal_trigflow"),
    "scheduler.vis_sampler": ("flow_dpm-solver", "flow_euler", "scm"),
    "train.weight_decay_on": ("all", "matrices"),
    "train.lr_schedule": ("constant", "cosine", "cosine_decay_to_constant"),
    "report_to": ("tensorboard", "wandb", "none"),
}
_REFUSED = {
    ("model.ffn_type", "triton_mbconvpreglu"): (
        "is another architecture, with the gate before the depthwise convolution: no released weights fit it; use "
        "glumbconv, whose kernels model.kernels chooses"
    )
}
"""Published values that cannot work, and why."""
_ABOVE_ZERO = (
    "data.num_scenes",
    "data.clip_thr_temperature",
    "model.image_size",
    "model.linear_head_dim",
    "model.mlp_ratio",
    "model.pe_interpolation",
    "model.cfg_embed_scale",
    "vae.vae_latent_dim",
    "vae.vae_downsample_rate",
    "text_encoder.caption_channels",
    "scheduler.flow_shift",
    "scheduler.inference_flow_shift",
    "scheduler.logit_std",
    "scheduler.timestep_norm_scale_factor",
    "train.train_batch_size",
    "train.gradient_accumulation_steps",
    "train.grad_checkpointing_blocks",
    "train.num_epochs",
    "train.max_steps",
    "train.early_stop_hours",
    "train.gradient_clip",
    "train.log_interval",
    "train.eval_sampling_steps",
    "train.eval_batch_size",
    "train.save_model_steps",
    "train.save_model_epochs",
    "train.eval_metric_step",
    "train.online_metric_prompts",
    "train.keep_checkpoints",
    "train.hang_minutes",
)
_AT_LEAST_ZERO = (
    "train.seed",
    "train.num_workers",
    "train.skip_step",
    "train.nonfinite_limit",
    "train.heldout_samples",
    "model.cfg_scale",
    "text_encoder.y_norm_scale_factor",
)
_PROBABILITIES = ("data.bad_sample_limit", "model.class_dropout_prob", "train.ema_rate")
_MAY_BE_INFINITE = ("train.gradient_clip", "train.early_stop_hours", "train.hang_minutes")


def check(config: SanaConfig, source: str) -> None:
    """Refuse a config that cannot run.

    Raises:
        ConfigError: the first fault; `source` is the file it names.
    """
    for key, problem in chain(
        _value_faults(config), _agreement_faults(config), _optimizer_faults(config.train)
    ):
        raise ConfigError(f"{source}: {key}: {problem}")


def _value_faults(config: SanaConfig) -> Faults:
    for key, choices in _CHOICES.items():
        value = attrgetter(key)(config)
        if (key, value) in _REFUSED:
            yield key, f"{value} {_REFUSED[key, value]}"
        elif value not in choices:
            yield key, f"expected {' or '.join(_yaml(choice) for choice in choices)}, got {_yaml(value)}"
    for keys, fits, expected in (
        (_ABOVE_ZERO, lambda value: value > 0, "a number above 0"),
        (_AT_LEAST_ZERO, lambda value: value >= 0, "a number of at least 0"),
        (_PROBABILITIES, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    ):
        for key in keys:
            value = attrgetter(key)(config)
            if value is not None and not (fits(value) and (value < math.inf or key in _MAY_BE_INFINITE)):
                yield key, f"expected {expected}, got {_yaml(value)}"


def _agreement_faults(config: SanaConfig) -> Faults:
    model, text = config.model, config.text_encoder
    size, table, rate = model.image_size, model.aspect_ratio_type, config.vae.vae_downsample_rate
    if config.data.image_size != size:
        yield "data.image_size", f"{config.data.image_size} differs from model.image_size, {size}"
    if size % rate:
        yield "model.image_size", f"{size} is not a multiple of vae.vae_downsample_rate, {rate}"
    if table is None and model.multi_scale:
        sizes = ", ".join(name.rpartition("_")[2] for name in TABLES if not name.endswith("_TEST"))
        yield (
            "model.multi_scale",
            f"no bucket table for image_size {size}, only for {sizes}; set multi_scale: false",
        )
    if table is not None and table not in TABLES:
        yield "model.aspect_ratio_type", f"expected one of {', '.join(TABLES)}, got {table}"
    if any(block < 0 for block in model.pag_applied_layers):
        yield "model.pag_applied_layers", f"block indices start at 0, got {_yaml(model.pag_applied_layers)}"
    if text.model_max_length < 2:
        yield (
            "text_encoder.model_max_length",
            f"expected at least 2 (start token and prompt), got {text.model_max_length}",
        )
    yield from _sprint_faults(config)
    yield from _lora_faults(config)


def _sprint_faults(config: SanaConfig) -> Faults:
    name, sampler = config.model.model, config.scheduler.vis_sampler
    if name.startswith("SanaMSCM"):
        if config.model.cfg_embed and sampler != "scm":  # without it: a teacher, which is a flow model
            yield "scheduler.vis_sampler", f"Sprint models ({name}) are sampled by scm, got {sampler}"
        return
    for key, value in (
        ("model.cfg_embed", True),
        ("scheduler.weighting_scheme", "logit_normal_trigflow"),
        ("scheduler.vis_sampler", "scm"),
    ):
        if attrgetter(key)(config) == value:
            yield (
                key,
                f"{_yaml(value)} belongs to Sprint models (SanaMSCM_...), model.model is {name}",
            )


def _lora_faults(config: SanaConfig) -> Faults:
    lora = config.train.lora
    if lora is None:
        return
    if lora.get("rank", 0) < 1:
        yield "train.lora.rank", f"expected a number of at least 1, got {_yaml(lora.get('rank'))}"
    if not 0 < lora.get("alpha", 1) < math.inf:
        yield "train.lora.alpha", f"expected a number above 0, got {_yaml(lora['alpha'])}"
    if lora.get("target_modules") == []:
        yield "train.lora.target_modules", "is empty; leave it out to change both attentions"
    if not config.model.load_from:
        yield "train.lora", "needs the weights that it changes: set model.load_from"
    if config.train.use_fsdp:
        yield "train.use_fsdp", "a LoRA is too small to shard: leave use_fsdp out with train.lora"


def _optimizer_faults(train: TrainConfig) -> Faults:
    for name in ("type", "lr"):
        if name not in train.optimizer:
            yield f"train.optimizer.{name}", "is missing"
    kind, lr = train.optimizer["type"], train.optimizer["lr"]
    betas, eps = train.optimizer.get("betas"), train.optimizer.get("eps")
    came = kind.startswith("CAME")
    if not 0 < lr < math.inf:
        yield "train.optimizer.lr", f"expected a number above 0, got {_yaml(lr)}"
    if betas is not None and len(betas) != (3 if came else 2):
        yield (
            "train.optimizer.betas",
            f"{kind} takes {'three' if came else 'two'} numbers, got {_yaml(betas)}",
        )
    if eps is not None and (len(eps) if isinstance(eps, list) else 1) != (2 if came else 1):
        yield (
            "train.optimizer.eps",
            f"{kind} takes {'two numbers' if came else 'one number'}, got {_yaml(eps)}",
        )
    if train.auto_lr is not None and train.auto_lr.get("rule") not in ("sqrt", "linear"):
        rule = _yaml(train.auto_lr.get("rule"))
        yield "train.auto_lr.rule", f"expected sqrt or linear (or train.auto_lr: null), got {rule}"
    warmup = train.lr_schedule_args.get("num_warmup_steps", 0)
    if warmup < 0:
        yield "train.lr_schedule_args.num_warmup_steps", f"expected a number of at least 0, got {warmup}"


def _yaml(value: Any) -> str:
    """A value as a YAML file writes it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
