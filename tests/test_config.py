"""Loading, merging and writing configs. Errors are in test_config_errors.py, the files of configs/ in test_configs.py."""

import ast
import dataclasses
import functools
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
    schema,
    transformer_overrides,
)
from sana.config.published import INERT, NOT_YET, RENAMED
from tests.config_helpers import PUBLISHED, PUBLISHED_KEYS, error_of, leaves_of, write_yaml


@pytest.fixture
def write(tmp_path):
    return functools.partial(write_yaml, tmp_path)


# ---- published files -------------------------------------------------------------------------------------------------


def test_published_yaml_loads_unchanged(write, caplog):
    config = load_config(write(PUBLISHED))
    assert caplog.records == []
    assert config.scheduler.predict_flow_v is True  # predict_v
    assert config.work_dir == "output/debug"  # train.work_dir
    assert config.vae.vae_type == "AutoencoderDC"
    assert config.vae.vae_pretrained == "mit-han-lab/dc-ae-f32c32-sana-1.0"  # the authors' files are read too
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
    config, default = leaves_of(load_config(path)), leaves_of(load_config(write("", "empty.yaml")))
    table = f"{path}: model.aspect_ratio_type ASPECT_RATIO_1024 is not the table of model.image_size 512"
    assert [record.getMessage() for record in caplog.records] == [table]
    assert {key: (value, default[key]) for key, value in config.items() if value != default[key]} == {
        "model.aspect_ratio_type": ("ASPECT_RATIO_1024", "ASPECT_RATIO_512"),
        "model.cfg_scale": (4.0, 4.5),
        "report_to": ("wandb", "tensorboard"),
        "tracker_project_name": ("sana-video-baseline", "sana"),
    }


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
        "scheduler.sigma_data=0.5 (cancels out in sampling)",
        "train.adv_lambda=0.5 (for training SANA-Sprint, which is not available)",
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
    assert leaves_of(load_config(write(text)))[key] == value


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
    fields = set(leaves_of(SanaConfig()))
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
            " cross_norm: false, class_dropout_prob: 0.2, fp32_attention: false, mlp_ratio: 3, linear_head_dim: 16,"
            " mixed_precision: bf16, cfg_embed_scale: 0.2}\n"
            "scheduler: {timestep_norm_scale_factor: 500}\n"
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
        "cfg_embed": False,
        "cfg_embed_scale": 0.2,
        "timestep_norm_scale_factor": 500.0,
        "use_pe": True,
        "pe_interpolation": 2.0,
        "pe_base_size": 32,
        "y_norm": False,
        "y_norm_scale_factor": 0.5,
        "class_dropout_prob": 0.2,
        "fp32_attention": False,
        "clamp_attention": False,
        "kernels": "auto",
        "gradient_checkpointing": True,
        "checkpointed_blocks": None,
    }
    for model, kernels in (
        ("attn_type: triton_linear", "triton"),
        ("kernels: triton", "triton"),
        ("attn_type: triton_linear, kernels: torch", "torch"),
    ):
        assert transformer_overrides(load_config(write(f"model: {{{model}}}")))["kernels"] == kernels
    sprint = "model: {model: SanaMSCM_600M_P1_D20, cfg_embed: true, mixed_precision: fp16}\nscheduler: {vis_sampler: scm}"
    config = load_config(write(sprint))
    assert config.model.model == "SanaMSCM_600M_P1_D28"  # the published file has a wrong depth
    assert transformer_overrides(config)["cfg_embed"] and transformer_overrides(config)["clamp_attention"]
    with pytest.raises(
        ConfigError, match=r"vis_sampler: Sprint models \(\S+D28\) are sampled by scm, got flow_euler"
    ):
        load_config(write(sprint), ["--scheduler.vis_sampler=flow_euler"])
    load_config(write(sprint), ["--scheduler.vis_sampler=flow_euler", "--model.cfg_embed=false"])  # a teacher
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
