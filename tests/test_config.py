"""Loading, merging, overriding and refusing configs. The files under configs/ are in test_configs.py."""

import ast
import dataclasses
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sana.config import (
    ConfigError,
    ResumeConfig,
    SanaConfig,
    dump_config,
    load_config,
    parse_overrides,
    schema,
    transformer_overrides,
)
from sana.config.published import INERT, NOT_YET, RENAMED

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


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="run.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def error_of(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- published files -------------------------------------------------------------------------------------------------


def test_published_yaml_loads_unchanged(write, caplog):
    config = load_config(write(PUBLISHED))
    assert caplog.records == []
    assert config.scheduler.predict_flow_v is True  # predict_v
    assert config.work_dir == "output/debug"  # train.work_dir
    assert config.vae.vae_type == "AutoencoderDC"
    assert config.vae.vae_pretrained == "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers"
    assert config.model.resume_from == ResumeConfig()
    assert config.model.mlp_acts == ("silu", "silu", None)
    assert config.data.external_caption_suffixes == ("", "_InternVL2-26B", "_VILA1-5-13B")
    assert config.text_encoder.chi_prompt[-1] == "User Prompt: "
    assert config.train.optimizer == {
        "betas": [0.9, 0.999, 0.9999],
        "eps": [1e-30, 1e-16],
        "lr": 1e-4,
        "type": "CAMEWrapper",
        "weight_decay": 0.0,
    }


def test_every_published_key_is_accepted_and_the_defaults_agree(write, caplog):
    path = write(PUBLISHED_KEYS)
    config, default = _leaves(load_config(path)), _leaves(load_config(write("", "empty.yaml")))
    table = f"{path}: model.aspect_ratio_type ASPECT_RATIO_1024 is not the table of model.image_size 512"
    assert [record.getMessage() for record in caplog.records] == [table]
    assert {key: (value, default[key]) for key, value in config.items() if value != default[key]} == {
        "model.aspect_ratio_type": ("ASPECT_RATIO_1024", "ASPECT_RATIO_512"),
        "model.cfg_scale": (4.0, 4.5),
        "report_to": ("wandb", "tensorboard"),
        "tracker_project_name": ("sana-video-baseline", "sana"),
    }


def _leaves(config, prefix=""):
    leaves = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        key = f"{prefix}{field.name}"
        leaves |= _leaves(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return leaves


def test_published_sprint_settings_load_and_are_named_in_one_warning(write, caplog):
    path = write(
        PUBLISHED.replace("SanaMS_1600M", "SanaMSCM_1600M")
        .replace("scheme: logit_normal", "scheme: logit_normal_trigflow\n  sigma_data: 0.5")
        .replace("vis_sampler: flow_dpm-solver", "vis_sampler: scm")
        .replace(
            "visualize: true",
            "visualize: true\n  adv_lambda: 0.5\n  scm_lambda: 1\n  optimizer_D: {lr: 2.0e-6}",
        )
    )
    config = load_config(path)
    assert config.scheduler.weighting_scheme == "logit_normal_trigflow"
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.WARNING
    assert str(path) in message
    for named in (
        "scheduler.sigma_data=0.5 (for SANA-Sprint)",
        "train.adv_lambda=0.5",
        "train.optimizer_D={'lr': 2e-06}",
    ):
        assert named in message
    assert "scm_lambda" not in message  # 1 is its default


def test_overrides_without_effect_are_named_too(write, caplog):
    load_config(write(""), ["--train.huber_c=0.5", "--controlnet.control_signal_type=hed"])
    (record,) = caplog.records
    assert "train.huber_c=0.5" in record.getMessage()
    assert "controlnet={'control_signal_type': 'hed'}" in record.getMessage()


def test_fields_without_effect_yet_are_named(write, caplog):
    load_config(
        write("model: {resume_from: {load_ema: true}}\nscheduler: {learn_sigma: false}"), ["--debug=true"]
    )
    (record,) = caplog.records
    named = "scheduler.learn_sigma=false (nothing here depends on it), model.resume_from.load_ema=true (not available yet)"
    assert record.getMessage().endswith(f"{named}, debug=true (not available yet)")


@pytest.mark.parametrize("key", NOT_YET)
def test_a_field_that_is_read_is_not_called_without_effect(key):
    package = Path(schema.__file__).parents[1]
    sources = [path for path in package.rglob("*.py") if path.parent.name != "config"]
    use = re.compile(rf"\b(config|train|resume|resume_from)\.{key.rpartition('.')[2]}\b")
    assert [path for path in sources if use.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("load_from: a.pth\nmodel: {load_from: b.pth}", "model.load_from", "a.pth"),
        ("load_from:\nmodel: {load_from: b.pth}", "model.load_from", "b.pth"),
        (
            "resume_from: latest\nmodel: {resume_from: {load_ema: true}}",
            "model.resume_from.checkpoint",
            "latest",
        ),
        ("resume_from: latest\nmodel: {resume_from: {load_ema: true}}", "model.resume_from.load_ema", True),
        ("model: {resume_from: a.pth}", "model.resume_from.checkpoint", "a.pth"),
        ("train: {training_hours: 3.8}", "train.early_stop_hours", 3.8),
        ("train: {training_hours: 3.8, early_stop_hours: 5}", "train.early_stop_hours", 5.0),
        ("work_dir: a\ntrain: {work_dir: b}", "work_dir", "a"),
        (
            "data: {aspect_ratio_type: ASPECT_RATIO_512_TEST}",
            "model.aspect_ratio_type",
            "ASPECT_RATIO_512_TEST",
        ),
        ("scheduler: {predict_v: true}", "scheduler.predict_flow_v", True),
    ],
)
def test_old_keys_mean_the_new_ones(write, text, key, value):
    assert _leaves(load_config(write(text)))[key] == value


def test_old_keys_are_checked_under_their_own_name(write):
    assert "scheduler.predict_v: expected true or false, got 1 (an integer)" in error_of(
        write("scheduler: {predict_v: 1}")
    )
    assert "scheduler.predict_flow_v: expected true" in error_of(write("scheduler: {predict_v: false}"))


# ---- merging ---------------------------------------------------------------------------------------------------------


def test_base_files_merge_by_section_and_replace_values(write):
    write(
        "data: {data_dir: [x, y]}\ntrain: {seed: 1, optimizer: {type: AdamW, lr: 1.0, betas: [0.9, 0.99]}}",
        "low/a.yaml",
    )
    write("base: low/a.yaml\nmodel: {image_size: 1024}\ntrain: {seed: 2}", "b.yaml")
    config = load_config(
        write("base: b.yaml\ndata: {data_dir: [z]}\ntrain: {optimizer: {type: Lion, lr: 2}}")
    )
    assert config.data.data_dir == ("z",)
    assert config.train.seed == 2
    assert config.train.optimizer == {"type": "Lion", "lr": 2}
    assert config.model.image_size == config.data.image_size == 1024
    assert config.train.num_epochs == SanaConfig().train.num_epochs


def test_an_empty_section_or_file_changes_nothing(write):
    assert load_config(write("train:\nmodel: {}\nbase:\n")) == load_config(write("", "empty.yaml"))


def test_a_circle_of_bases_is_an_error(write):
    write("base: b.yaml", "a.yaml")
    path = write("base: a.yaml", "b.yaml")
    assert "base: files name each other in a circle" in error_of(path)
    assert "in a circle" in error_of(write("base: self.yaml", "self.yaml"))


def test_settings_that_follow_from_others(write):
    config = load_config(write("model: {image_size: 2048}"))
    assert (config.data.image_size, config.model.aspect_ratio_type) == (2048, "ASPECT_RATIO_2048")
    config = load_config(write("model: {image_size: 640, multi_scale: false}"))
    assert (config.data.image_size, config.model.aspect_ratio_type) == (640, None)


@pytest.mark.parametrize("text", ["1e-5", "1.e-5", "1.0e-5", "1E-05", ".1e-4", "0.00001", "+1e-5"])
def test_numbers_with_exponents_are_numbers(write, text):
    assert (
        load_config(write(f"train: {{optimizer: {{type: AdamW, lr: {text}}}}}")).train.optimizer["lr"] == 1e-5
    )
    assert load_config(write(""), [f"--train.optimizer.lr={text}"]).train.optimizer["lr"] == 1e-5


def test_yaml_1_1_surprises_do_not_happen(write):
    config = load_config(
        write("name: no\nwork_dir: 16:9\ntrain: {seed: 010}\ntracker_project_name: 2024-11-27")
    )
    assert (config.name, config.work_dir, config.train.seed) == ("no", "16:9", 10)
    assert config.tracker_project_name == "2024-11-27"


def test_integers_are_accepted_as_numbers_and_decode_as_floats(write):
    value = load_config(write("scheduler: {flow_shift: 3}")).scheduler.flow_shift
    assert (value, type(value)) == (3.0, float)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {qknorm: true}", "unknown key model.qknorm; did you mean model.qk_norm?"),
        ("model: {flow_shift: 3.0}", "unknown key model.flow_shift; did you mean scheduler.flow_shift?"),
        ("modle: {qk_norm: true}", "unknown key modle; did you mean model?"),
        ("seed: 1", "unknown key seed; did you mean train.seed?"),
        (
            "train: {optimizer: {type: AdamW, lrr: 1.0}}",
            "unknown key train.optimizer.lrr; did you mean train.optimizer.lr?",
        ),
        ("model: {resume_from: {chekpoint: a}}", "did you mean model.resume_from.checkpoint?"),
        ("train: {num_epochs: 1.7}", "train.num_epochs: expected an integer, got 1.7 (a number)"),
        ("train: {num_epochs: 2.0}", "train.num_epochs: expected an integer, got 2.0 (a number)"),
        ("train: {num_epochs: true}", "train.num_epochs: expected an integer, got true (a boolean)"),
        ("train: {gradient_clip: true}", "train.gradient_clip: expected a number, got true (a boolean)"),
        ("train: {gradient_clip: '1'}", "train.gradient_clip: expected a number, got '1' (a text)"),
        ("model: {qk_norm: nope}", "model.qk_norm: expected true or false, got 'nope' (a text)"),
        ("model: {qk_norm: 1}", "model.qk_norm: expected true or false, got 1 (an integer)"),
        ("model: {qk_norm: yes}", "model.qk_norm: expected true or false, got 'yes' (a text)"),
        ("model: {model: }", "model.model: expected a text, got null"),
        ("model: {load_from: 3}", "model.load_from: expected a text or null, got 3 (an integer)"),
        ("train: {max_steps: 1e3}", "train.max_steps: expected an integer or null, got 1000.0 (a number)"),
        ("data: {data_dir: a}", "data.data_dir: expected a list of texts like \"[a,b]\", got 'a' (a text)"),
        ("data: {data_dir: [1]}", "data.data_dir: expected a list of texts"),
        ("data: {image_size: [512]}", "data.image_size: expected an integer or null, got [512] (a list)"),
        ("model: {pag_applied_layers: [8.5]}", "model.pag_applied_layers: expected a list of integers"),
        ("train: {optimizer: AdamW}", "train.optimizer: expected a mapping, got 'AdamW' (a text)"),
        (
            "train: {optimizer: {type: AdamW, lr: fast}}",
            "train.optimizer.lr: expected a number, got 'fast' (a text)",
        ),
        (
            "train: {optimizer: {type: AdamW, lr: 1, eps: [a]}}",
            "train.optimizer.eps: expected a number or a list of numbers",
        ),
        (
            "data: {caption_proportion: {prompt: 0.5}}",
            "data.caption_proportion: expected a mapping of integers",
        ),
        ("train: [1]", "train: expected a section of settings, got [1] (a list)"),
        ("model: {resume_from: true}", "model.resume_from.checkpoint: expected a text or null, got true"),
        ("- a", "expected a mapping of sections, got list"),
        ("base: missing.yaml", "base: no such file: "),
        ("base: [a]", "base: expected the path of a YAML file, got ['a'] (a list)"),
        ("base: .", "base: no such file: "),
        ("model: {a: [}", ":1:13: not valid YAML: expected the node content"),
        ("model:\n  qk_norm: true\n  qk_norm: false", ":2:3: not valid YAML: key 'qk_norm' stands twice"),
        ("name: !!python/object:os.system x", "not valid YAML: could not determine a constructor"),
        ("name: \x07", "not valid YAML"),
    ],
)
def test_faults_are_named_in_one_line(write, text, message):
    path = write(text)
    error = error_of(path)
    assert error.startswith(str(path))
    assert message in error


def test_a_fault_in_a_base_names_the_base(write):
    base = write("model: {qknorm: true}", "base.yaml")
    assert error_of(write("base: base.yaml")).startswith(str(base))


def test_unreadable_files(tmp_path):
    assert "no such file" in error_of(tmp_path / "missing.yaml")
    assert "cannot read the config file" in error_of(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error_of(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mixed_precision=fp8", "model.mixed_precision: expected fp16 or bf16 or fp32, got fp8"),
        ("model.attn_type=flash", "model.attn_type: expected linear, got flash"),
        ("model.ffn_type=mlp", "model.ffn_type: expected glumbconv, got mlp"),
        (
            "model.mlp_acts=[silu, null, silu]",
            "model.mlp_acts: expected [silu, silu, null], got [silu, null, silu]",
        ),
        (
            "model.guidance_type=magic",
            "model.guidance_type: expected classifier-free or classifier-free_PAG, got magic",
        ),
        ("vae.vae_type=AutoencoderKL", "vae.vae_type: expected AutoencoderDC"),
        ("scheduler.predict_flow_v=false", "scheduler.predict_flow_v: expected true, got false"),
        ("scheduler.pred_sigma=true", "scheduler.pred_sigma: expected false, got true"),
        ("scheduler.flow_shift=0", "scheduler.flow_shift: expected a number above 0, got 0.0"),
        ("scheduler.flow_shift=.nan", "scheduler.flow_shift: expected a number above 0, got nan"),
        ("scheduler.flow_shift=.inf", "scheduler.flow_shift: expected a number above 0, got inf"),
        ("scheduler.inference_flow_shift=-1", "scheduler.inference_flow_shift: expected a number above 0"),
        (
            "scheduler.weighting_scheme=logit",
            "scheduler.weighting_scheme: expected logit_normal or uniform or null",
        ),
        (
            "scheduler.weighting_scheme=logit_normal_trigflow",
            "scheduler.weighting_scheme: logit_normal_trigflow belongs to",
        ),
        (
            "scheduler.vis_sampler=scm",
            "scheduler.vis_sampler: scm belongs to Sprint models (SanaMSCM_...), model.model is",
        ),
        ("model.class_dropout_prob=1.5", "model.class_dropout_prob: expected a number from 0 to 1, got 1.5"),
        ("train.seed=-1", "train.seed: expected a number of at least 0, got -1"),
        ("train.max_steps=0", "train.max_steps: expected a number above 0, got 0"),
        ("data.image_size=1024", "data.image_size: 1024 differs from model.image_size, 512"),
        ("model.image_size=500", "model.image_size: 500 is not a multiple of vae.vae_downsample_rate, 32"),
        (
            "model.image_size=640",
            "model.multi_scale: no bucket table for image_size 640, only for 256, 512, 1024, 2048",
        ),
        ("model.aspect_ratio_type=ASPECT", "model.aspect_ratio_type: expected one of ASPECT_RATIO_256, "),
        ("model.pag_applied_layers=[-1]", "model.pag_applied_layers: block indices start at 0, got [-1]"),
        ("text_encoder.model_max_length=1", "text_encoder.model_max_length: expected at least 2"),
        ("train.optimizer={type: AdamW}", "train.optimizer.lr: is missing"),
        ("train.optimizer={lr: 1}", "train.optimizer.type: is missing"),
        ("train.optimizer.lr=0", "train.optimizer.lr: expected a number above 0, got 0"),
        ("train.optimizer.type=CAMEWrapper", "train.optimizer.eps: CAMEWrapper takes two numbers, got 1e-10"),
        (
            "train.optimizer.betas=[0.9,0.9,0.9]",
            "train.optimizer.betas: AdamW takes two numbers, got [0.9, 0.9, 0.9]",
        ),
        ("train.auto_lr.rule=cube", "train.auto_lr.rule: expected sqrt or linear"),
        (
            "train.auto_lr={}",
            "train.auto_lr.rule: expected sqrt or linear (or train.auto_lr: null), got null",
        ),
        ("train.lr_schedule_args.num_warmup_steps=-1", "train.lr_schedule_args.num_warmup_steps: expected"),
        (
            "train.lr_schedule=warp",
            "train.lr_schedule: expected constant or cosine or cosine_decay_to_constant, got warp",
        ),
    ],
)
def test_runs_that_cannot_be_are_refused(write, override, message):
    path = write("")
    assert error_of(path, [override]).startswith(f"{path}: ")
    assert message in error_of(path, [override])


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_override_words():
    words = ["--a.b=c", "d=e=f", "--g", "h", "--i", "-1", "--j=", "--k=--l", "--m.n-o=p q"]
    pairs = [("a.b", "c"), ("d", "e=f"), ("g", "h"), ("i", "-1"), ("j", ""), ("k", "--l"), ("m.n-o", "p q")]
    assert parse_overrides(words) == pairs
    assert parse_overrides([]) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.b"], "command line: expected --key=value, got 'a.b'"),
        (["-a=b"], "expected --key=value, got '-a=b'"),
        (["--=b"], "expected --key=value, got '--=b'"),
        (["--a..b=c"], "expected --key=value"),
        (["--a.b"], "command line: --a.b has no value; write --a.b=VALUE"),
        (["--debug", "--name=x"], "--debug has no value"),
    ],
)
def test_words_that_are_no_overrides(words, message):
    with pytest.raises(ConfigError) as error:
        parse_overrides(words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--model.multi_scale=false"], "model.multi_scale", False),
        (["model.qk_norm=true"], "model.qk_norm", True),
        (["--train.seed", "7"], "train.seed", 7),
        (["--scheduler.flow_shift", "3"], "scheduler.flow_shift", 3.0),
        (["--scheduler.logit_mean", "-0.5"], "scheduler.logit_mean", -0.5),
        (["--data.data_dir=[a,b/c]"], "data.data_dir", ("a", "b/c")),
        (["--data.data_dir=[asset/example_data]"], "data.data_dir", ("asset/example_data",)),
        (["--data.data_dir=[]"], "data.data_dir", ()),
        (["--work_dir=output/x y"], "work_dir", "output/x y"),
        (["--train.work_dir=output/x"], "work_dir", "output/x"),
        (["--name=1e-5"], "name", "1e-5"),
        (["--name=2: 3 # [x"], "name", "2: 3 # [x"),
        (["--name='null'"], "name", "null"),
        (["--name="], "name", ""),
        (["--model.load_from=hf://a/b/c.pth"], "model.load_from", "hf://a/b/c.pth"),
        (["--model.load_from=a", "--model.load_from="], "model.load_from", None),
        (["--model.load_from=a", "--model.load_from=null"], "model.load_from", None),
        (["--load_from=a"], "model.load_from", "a"),
        (["--load_from=a", "--load_from="], "model.load_from", None),
        (["--resume_from=latest"], "model.resume_from.checkpoint", "latest"),
        (["--model.resume_from=latest"], "model.resume_from.checkpoint", "latest"),
        (["--model.resume_from.checkpoint=latest"], "model.resume_from.checkpoint", "latest"),
        (["--train.auto_lr=null"], "train.auto_lr", None),
        (["--train.auto_lr=", "--train.auto_lr.rule=linear"], "train.auto_lr", {"rule": "linear"}),
        (["--train.max_steps=10", "--train.max_steps=20"], "train.max_steps", 20),
        (["--data.caption_proportion.VILA1.5-x=2"], "data.caption_proportion", {"prompt": 1, "VILA1.5-x": 2}),
        (["--train.gradient_clip=.inf"], "train.gradient_clip", float("inf")),
        (["--train={seed: 5}"], "train.seed", 5),
    ],
)
def test_overrides(write, words, key, value):
    found = _leaves(load_config(write(""), words))[key]
    assert found == value
    assert type(found) is type(value)


def test_an_override_into_a_mapping_keeps_its_other_entries(write):
    path = write("train: {optimizer: {type: Lion, lr: 1.0, betas: [0.9, 0.99]}}")
    optimizer = load_config(
        path, ["--train.optimizer.lr=1e-5", "--train.optimizer.betas=[0.8,0.9]"]
    ).train.optimizer
    assert optimizer == {"type": "Lion", "lr": 1e-5, "betas": [0.8, 0.9]}
    assert SanaConfig().train.optimizer["lr"] == 1e-4


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--model.qknorm=true", "command line: unknown key model.qknorm; did you mean model.qk_norm?"),
        (
            "--train.optimizer.lrr=1",
            "command line: unknown key train.optimizer.lrr; did you mean train.optimizer.lr?",
        ),
        ("--train.seed.x=1", "command line: unknown key train.seed.x; did you mean train.seed?"),
        ("--train.seed=x", "command line: train.seed: expected an integer, got 'x' (a text)"),
        ("--train.seed=", "command line: train.seed: expected an integer, got null"),
        (
            "--data.data_dir=a",
            "command line: data.data_dir: expected a list of texts like \"[a,b]\", got 'a' (a text)",
        ),
        (
            "--train.optimizer.betas=0.9",
            "command line: train.optimizer.betas: expected a list of numbers, got 0.9",
        ),
        ("--train.optimizer.lr={", "command line: train.optimizer.lr:1:2: not valid YAML"),
        ("--base=x.yaml", "command line: unknown key base"),
    ],
)
def test_faulty_overrides(write, word, message):
    assert message in error_of(write(""), [word])


# ---- the config object -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", PUBLISHED, "model: {image_size: 1280, multi_scale: false}\ntrain: {auto_lr: }"]
)
def test_dump_loads_back_equal(write, tmp_path, text):
    config = load_config(write(text))
    dump_config(config, tmp_path / "deep" / "config.yaml")
    assert load_config(tmp_path / "deep" / "config.yaml") == config
    dumped = (tmp_path / "deep" / "config.yaml").read_text(encoding="utf-8")
    assert "!!" not in dumped and "&id" not in dumped


@pytest.mark.parametrize(
    "text",
    [
        "1e-5",
        "yes",
        "null",
        "~",
        "",
        " x ",
        "a: b #c",
        "16:9",
        "2024-01-01",
        "010",
        "'",
        "été 🎨",
        "a\nb",
        "<<",
        "1_0",
        "-",
    ],
)
def test_texts_survive_a_dump(write, tmp_path, text):
    config = dataclasses.replace(load_config(write("")), name=text)
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").name == text


@pytest.mark.parametrize("number", [1e-5, 1e-30, 1e22, 0.1 + 0.2, 3.0, float("inf")])
def test_numbers_survive_a_dump(write, tmp_path, number):
    config = load_config(write(""))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_clip=number))
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").train.gradient_clip == number


def test_config_is_frozen(write):
    config = load_config(write(""))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.seed = 2
    with pytest.raises(TypeError):
        schema.TrainConfig(1)


def test_every_field_has_a_docstring():
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert {node.name for node in classes} >= {"DataConfig", "ModelConfig", "TrainConfig", "SanaConfig"}
    for node in classes:
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented and len(after.value.value) > 10, (
                    f"{node.name}.{field.target.id} has no docstring"
                )


def test_a_key_is_in_one_table_only():
    fields = set(_leaves(SanaConfig()))
    assert not fields & INERT.keys() and not fields & RENAMED.keys() and not INERT.keys() & RENAMED.keys()
    assert {rename.new for rename in RENAMED.values()} | set(NOT_YET) <= fields


def test_sampling_shift(write):
    assert load_config(write("scheduler: {flow_shift: 3.0}")).scheduler.sampling_shift == 3.0
    both = write("scheduler: {flow_shift: 3.0, inference_flow_shift: 5}")
    assert load_config(both).scheduler.sampling_shift == 5.0


def test_transformer_overrides(write):
    config = load_config(
        write(
            "model: {model: SanaMS_1600M_P2_D20, image_size: 2048, use_pe: true, pe_interpolation: 2., qk_norm: true,"
            " cross_norm: false, class_dropout_prob: 0.2, fp32_attention: false, mlp_ratio: 3, linear_head_dim: 16}\n"
            "vae: {vae_latent_dim: 16}\ntrain: {grad_checkpointing: true}\n"
            "text_encoder: {caption_channels: 1536, model_max_length: 100, y_norm: false, y_norm_scale_factor: 0.5}"
        )
    )
    assert transformer_overrides(config) == {
        "in_channels": 16,
        "out_channels": 16,
        "mlp_ratio": 3.0,
        "linear_head_dim": 16,
        "caption_channels": 1536,
        "model_max_length": 100,
        "qk_norm": True,
        "cross_norm": False,
        "use_pe": True,
        "pe_interpolation": 2.0,
        "pe_base_size": 32,
        "y_norm": False,
        "y_norm_scale_factor": 0.5,
        "class_dropout_prob": 0.2,
        "fp32_attention": False,
        "gradient_checkpointing": True,
    }
    assert transformer_overrides(load_config(write("")))["pe_base_size"] is None
    unnamed = load_config(write("model: {model: custom, use_pe: true}"))
    with pytest.raises(
        ConfigError, match=r"model.use_pe: cannot read the patch size from model.model 'custom'"
    ):
        transformer_overrides(unnamed)


def test_import_needs_no_torch():
    code = "import sys, sana.config; print(sorted({'torch', 'numpy', 'diffusers', 'transformers'} & sys.modules.keys()))"
    finished = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (finished.stdout.strip(), finished.stderr) == ("[]", "")
