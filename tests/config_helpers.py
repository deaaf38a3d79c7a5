"""What the config tests share: published YAML texts, and short ways to load and look."""

import dataclasses

import pytest

from sana.config import ConfigError, load_config

# The reference's 1024ms/Sana_1600M_img1024.yaml of November 2024, every value, CHI shortened.
PUBLISHED = r"""
data:
  data_dir: [data/data_public/dir1]
  image_size: 1024
  caption_proportion:
    prompt: 1
  external_caption_suffixes: ['', _InternVL2-26B, _VILA1-5-13B]
  external_clipscore_suffixes:
    - _InternVL2-26B_clip_score
    - _VILA1-5-13B_clip_score
    - _prompt_clip_score
  clip_thr_temperature: 0.1
  clip_thr: 25.0
  load_text_feat: false
  load_vae_feat: false
  transform: default_train
  type: SanaWebDatasetMS
  sort_dataset: false
# model config
model:
  model: SanaMS_1600M_P1_D20
  image_size: 1024
  mixed_precision: fp16 # ['fp16', 'fp32', 'bf16']
  fp32_attention: true
  load_from:
  resume_from:
  aspect_ratio_type: ASPECT_RATIO_1024
  multi_scale: true
  #pe_interpolation: 1.
  attn_type: linear
  ffn_type: glumbconv
  mlp_acts:
    - silu
    - silu
    -
  mlp_ratio: 2.5
  use_pe: false
  qk_norm: false
  class_dropout_prob: 0.1
  pag_applied_layers:
    - 8
vae:
  vae_type: dc-ae
  vae_pretrained: mit-han-lab/dc-ae-f32c32-sana-1.0
  scale_factor: 0.41407
  vae_latent_dim: 32
  vae_downsample_rate: 32
  sample_posterior: true
text_encoder:
  text_encoder_name: gemma-2-2b-it
  y_norm: true
  y_norm_scale_factor: 0.01
  model_max_length: 300
  chi_prompt:
    - 'Given a user prompt, generate an "Enhanced prompt":'
    - 'User Prompt: '
scheduler:
  predict_v: true
  noise_schedule: linear_flow
  pred_sigma: false
  flow_shift: 3.0
  weighting_scheme: logit_normal
  logit_mean: 0.0
  logit_std: 1.0
  vis_sampler: flow_dpm-solver
train:
  num_workers: 10
  seed: 1
  train_batch_size: 64
  num_epochs: 100
  gradient_accumulation_steps: 1
  grad_checkpointing: true
  gradient_clip: 0.1
  optimizer:
    betas:
      - 0.9
      - 0.999
      - 0.9999
    eps:
      - 1.0e-30
      - 1.0e-16
    lr: 0.0001
    type: CAMEWrapper
    weight_decay: 0.0
  lr_schedule: constant
  lr_schedule_args:
    num_warmup_steps: 2000
  local_save_vis: true # if save log image locally
  visualize: true
  eval_sampling_steps: 500
  log_interval: 20
  save_model_epochs: 5
  save_model_steps: 500
  work_dir: output/debug
  online_metric: false
  eval_metric_step: 2000
  online_metric_dir: metric_helper
"""

# Every key of the reference's dataclasses at its default, old and new spellings, as its dumped config.yaml has them.
PUBLISHED_KEYS = """
data: {data_dir: [], buckets_file: buckets.json, caption_proportion: {prompt: 1}, external_caption_suffixes: [],
  external_clipscore_suffixes: [], caption_selection_type: clipscore, clip_thr_temperature: 1.0, clip_thr: 0.0,
  del_img_clip_thr: 0.0, sort_dataset: false, load_text_feat: false, load_vae_feat: false,
  aspect_ratio_type: ASPECT_RATIO_1024, transform: default_train, type: SanaWebDatasetMS, image_size: 512,
  hq_only: false, valid_num: 0, data: null, num_frames: 81, extra: null}
model: {model: SanaMS_600M_P1_D28, teacher: null, image_size: 512, mixed_precision: fp16, fp32_attention: true,
  load_from: null, discriminator_model: null, teacher_model: null, teacher_model_weight_dtype: null,
  resume_from: {checkpoint: null, load_ema: false, resume_lr_scheduler: true, resume_optimizer: true},
  aspect_ratio_type: null, multi_scale: true, pe_interpolation: 1.0, micro_condition: false, attn_type: linear,
  autocast_linear_attn: false, ffn_type: glumbconv, mlp_acts: [silu, silu, null], mlp_ratio: 2.5, use_pe: false,
  pos_embed_type: sincos, qk_norm: false, class_dropout_prob: 0.0, linear_head_dim: 32, cross_norm: false,
  cross_attn_type: flash, logvar: false, cfg_scale: 4, cfg_embed: false, cfg_embed_scale: 1.0,
  guidance_type: classifier-free, pag_applied_layers: [8], ladd_multi_scale: true, head_block_ids: null, extra: null}
vae: {vae_type: AutoencoderDC, vae_pretrained: mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers, weight_dtype: float32,
  scale_factor: 0.41407, scaling_factor: null, vae_latent_dim: 32, vae_downsample_rate: 32, sample_posterior: true,
  vae_stride: null, use_causal_encode: false, if_cache: false, cache_dir: null, use_framewise_encoding: false,
  use_framewise_decoding: false, tile_sample_stride_num_frames: 64, tile_sample_min_num_frames: 96, extra: null}
text_encoder: {text_encoder_name: gemma-2-2b-it, caption_channels: 2304, y_norm: true, y_norm_scale_factor: 1.0,
  model_max_length: 300, chi_prompt: [], extra: null}
scheduler: {train_sampling_steps: 1000, predict_v: true, predict_flow_v: true, noise_schedule: linear_flow,
  pred_sigma: false, learn_sigma: true, vis_sampler: flow_dpm-solver, flow_shift: 1.0, inference_flow_shift: null,
  weighting_scheme: logit_normal, weighting_scheme_discriminator: logit_normal_trigflow,
  add_noise_timesteps: [1.5708], logit_mean: 0.0, logit_std: 1.0, logit_mean_discriminator: 0.0,
  logit_std_discriminator: 1.0, mode_scale: 1.29, sigma_data: 1.0, p_low: null, p_high: null,
  timestep_norm_scale_factor: 1.0, pretrain_timestep_norm_scale_factor: 1.0, discrete_norm_timestep: false,
  extra: null}
train: {num_workers: 4, seed: 42, train_batch_size: 32, train_batch_size_image: 32, early_stop_hours: 100,
  training_hours: 10000.0, num_epochs: 100, gradient_accumulation_steps: 1, grad_checkpointing: false,
  gradient_clip: 1.0, gc_step: 1, optimizer: {eps: 1.0e-10, lr: 0.0001, type: AdamW, weight_decay: 0.03},
  optimizer_D: {eps: 1.0e-10, lr: 0.0001, type: AdamW, weight_decay: 0.03}, load_from_optimizer: false,
  load_from_lr_scheduler: false, resume_lr_scheduler: true, lr_schedule: constant,
  lr_schedule_args: {num_warmup_steps: 500}, auto_lr: {rule: sqrt}, ema_rate: 0.9999, eval_batch_size: 16,
  use_fsdp: false, fsdp_version: 1, cp_size: 0, use_flash_attn: false, eval_sampling_steps: 250, lora_rank: 4,
  log_interval: 50, mask_type: 'null', mask_loss_coef: 0.0, load_mask_index: false, snr_loss: false,
  real_prompt_ratio: 1.0, save_image_epochs: 1, save_model_epochs: 1, save_model_steps: 1000000, visualize: false,
  null_embed_root: output/pretrained_models/, valid_prompt_embed_root: output/tmp_embed/,
  validation_prompts: [dog, 'portrait photo of a girl, photograph, highly detailed face, depth of field',
    'Self-portrait oil painting, a beautiful cyborg with golden hair, 8k',
    'Astronaut in a jungle, cold color palette, muted colors, detailed, 8k',
    'A photo of beautiful mountain with realistic sunset and blue lake, highly detailed, masterpiece'],
  local_save_vis: false, deterministic_validation: true, online_metric: false, eval_metric_step: 5000,
  online_metric_dir: metric_helper, work_dir: /cache/exps/, skip_step: 0, loss_type: huber, huber_c: 0.001,
  num_ddim_timesteps: 50, w_max: 15.0, w_min: 3.0, ema_decay: 0.95, debug_nan: false, ema_update: false,
  weight_loss: true, tangent_warmup_steps: 10000, scm_cfg_scale: [1.0], cfg_interval: null, scm_logvar_loss: true,
  norm_invariant_to_spatial_dim: true, norm_same_as_512_scale: false, g_norm_constant: 0.1, g_norm_r: 1.0,
  show_gradient: false, lr_scale: null, adv_lambda: 1.0, scm_loss: true, scm_lambda: 1.0, loss_scale: 1.0,
  r1_penalty: false, r1_penalty_weight: 1.0e-05, diff_timesteps_D: true, suffix_checkpoints: disc,
  misaligned_pairs_D: false, discriminator_loss: cross entropy, largest_timestep: 1.5708,
  train_largest_timestep: false, largest_timestep_prob: 0.5, extra: null}
controlnet: null
model_growth: null
work_dir: output/
resume_from: null
load_from: null
debug: false
caching: false
report_to: wandb
tracker_project_name: sana-video-baseline
name: baseline
loss_report_name: loss
"""


def write_yaml(folder, text, name="run.yaml"):
    """The path of a new YAML file below `folder`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path, overrides=()):
    """The message of the ConfigError, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def leaves_of(config, prefix=""):
    """Dotted key -> value."""
    leaves = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        key = f"{prefix}{field.name}"
        leaves |= leaves_of(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return leaves
