"""Published keys that have no field here, those with another name and those without effect, and fields without effect yet.

They are accepted, so that every published YAML, also one that the reference dumped beside a run, loads unchanged.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rename:
    """Where the value of an old key goes."""

    new: str
    """Dotted key of the field."""
    wins: bool = False
    """Whether the old key beats the new one when a file sets both, as in the reference."""


RENAMED: dict[str, Rename] = {
    "load_from": Rename("model.load_from", wins=True),
    "resume_from": Rename("model.resume_from.checkpoint", wins=True),
    "data.aspect_ratio_type": Rename("model.aspect_ratio_type"),
    "scheduler.predict_v": Rename("scheduler.predict_flow_v"),
    "train.training_hours": Rename("train.early_stop_hours"),
    "train.work_dir": Rename("work_dir"),
}

RENAMED_VALUES: dict[str, dict[str, str]] = {
    "model.model": {"SanaMSCM_600M_P1_D20": "SanaMSCM_600M_P1_D28"},
    "vae.vae_type": {"dc-ae": "AutoencoderDC"},
}
"""Old values of a key: the first name of the kind of autoencoder; and the model of the published Sprint 0.6B file, which has
never been: that network has 28 blocks."""

_ADAMW = {"eps": 1e-10, "lr": 1e-4, "type": "AdamW", "weight_decay": 0.03}

# Why -> key -> published default, at which nothing is said.
_WITHOUT_EFFECT: dict[str, dict[str, Any]] = {
    "nothing here depends on it": {
        "data.data": None,
        "data.buckets_file": "buckets.json",
        "data.valid_num": 0,
        "data.extra": None,
        "model.autocast_linear_attn": False,
        "model.extra": None,
        "vae.sample_posterior": True,
        "vae.extra": None,
        "text_encoder.extra": None,
        "scheduler.learn_sigma": True,
        "scheduler.mode_scale": 1.29,
        "scheduler.p_low": None,
        "scheduler.p_high": None,
        "scheduler.extra": None,
        "train.use_flash_attn": False,
        "train.lora_rank": 4,
        "train.mask_type": "null",
        "train.mask_loss_coef": 0.0,
        "train.load_mask_index": False,
        "train.real_prompt_ratio": 1.0,
        "train.save_image_epochs": 1,
        "train.loss_type": "huber",
        "train.huber_c": 0.001,
        "train.num_ddim_timesteps": 50,
        "train.w_max": 15.0,
        "train.w_min": 3.0,
        "train.ema_decay": 0.95,
        "train.extra": None,
    },
    "the autoencoder's own config has the factor": {"vae.scale_factor": 0.41407, "vae.scaling_factor": None},
    "attention kernels are chosen by the model": {"model.cross_attn_type": "flash"},
    "each block is recomputed by itself": {"train.gc_step": 1},
    "prompts are encoded when a run starts": {
        "train.null_embed_root": "output/pretrained_models/",
        "train.valid_prompt_embed_root": "output/tmp_embed/",
    },
    "there is one kind of sharding": {"train.fsdp_version": 1},
    "not a velocity loss": {"train.snr_loss": False},
    "never on in a published image model": {"model.micro_condition": False, "model.pos_embed_type": "sincos"},
    "for video": {
        "data.num_frames": 81,
        "vae.vae_stride": None,
        "vae.use_causal_encode": False,
        "vae.if_cache": False,
        "vae.cache_dir": None,
        "vae.use_framewise_encoding": False,
        "vae.use_framewise_decoding": False,
        "vae.tile_sample_stride_num_frames": 64,
        "vae.tile_sample_min_num_frames": 96,
        "train.train_batch_size_image": 32,
        "train.cp_size": 0,
        "train.lr_scale": None,
    },
    "cancels out in sampling": {"scheduler.sigma_data": 1.0},
    "for training SANA-Sprint, which is not available": {
        "model.teacher": None,
        "model.teacher_model": None,
        "model.teacher_model_weight_dtype": None,
        "model.discriminator_model": None,
        "model.logvar": False,
        "model.ladd_multi_scale": True,
        "model.head_block_ids": None,
        "scheduler.weighting_scheme_discriminator": "logit_normal_trigflow",
        "scheduler.add_noise_timesteps": [1.5708],
        "scheduler.logit_mean_discriminator": 0.0,
        "scheduler.logit_std_discriminator": 1.0,
        "scheduler.pretrain_timestep_norm_scale_factor": 1.0,
        "scheduler.discrete_norm_timestep": False,
        "train.optimizer_D": _ADAMW,
        "train.weight_loss": True,
        "train.tangent_warmup_steps": 10000,
        "train.scm_cfg_scale": [1.0],
        "train.cfg_interval": None,
        "train.scm_logvar_loss": True,
        "train.norm_invariant_to_spatial_dim": True,
        "train.norm_same_as_512_scale": False,
        "train.g_norm_constant": 0.1,
        "train.g_norm_r": 1.0,
        "train.show_gradient": False,
        "train.adv_lambda": 1.0,
        "train.scm_loss": True,
        "train.scm_lambda": 1.0,
        "train.loss_scale": 1.0,
        "train.r1_penalty": False,
        "train.r1_penalty_weight": 1e-5,
        "train.diff_timesteps_D": True,
        "train.suffix_checkpoints": "disc",
        "train.misaligned_pairs_D": False,
        "train.discriminator_loss": "cross entropy",
        "train.largest_timestep": 1.5708,
        "train.train_largest_timestep": False,
        "train.largest_timestep_prob": 0.5,
    },
    "for ControlNet": {"controlnet": None},
    "for growing a model": {"model_growth": None},
}


@dataclass(frozen=True, slots=True)
class Inert:
    """A published key without effect here."""

    default: Any
    """Its published default."""
    reason: str
    """Why it has no effect."""


INERT: dict[str, Inert] = {
    key: Inert(default, reason) for reason, keys in _WITHOUT_EFFECT.items() for key, default in keys.items()
}

NOT_YET = ("model.resume_from.load_ema", "train.skip_step", "train.debug_nan", "debug")
"""Fields that nothing reads yet: one that is not at its default is named like a key without effect."""
