"""Every file under configs/: it loads, its model has the published size, and it says nothing twice."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml

from sana.config import SanaConfig, load_config, transformer_overrides
from sana.models.zoo import TRANSFORMERS, build_transformer
from tests.config_helpers import leaves_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
BASE = "sana_config/base.yaml"

PARAMETERS = {  # trainable, as published; (model, q/k norms)
    ("SanaMS_600M_P1_D28", False): 591_747_872,
    ("SanaMS_1600M_P1_D20", False): 1_604_462_752,
    ("SanaMS_1600M_P1_D20", True): 1_604_641_952,
    ("SanaMS_4800M_P1_D60", True): 4_721_825_952,
    ("SanaMSCM_600M_P1_D28", True): 593_501_216,  # without the head for the log-variance, 1153 more
    ("SanaMSCM_1600M_P1_D20", True): 1_610_237_472,
}

CAME = {
    "type": "CAMEWrapper",
    "lr": 1e-4,
    "weight_decay": 0.0,
    "betas": [0.9, 0.999, 0.9999],
    "eps": [1e-30, 1e-16],
}
CAME_8BIT = {**CAME, "type": "CAME8BitWrapper", "block_size": 2048, "min_8bit_size": 16384}
ADAMW = {"type": "AdamW", "lr": 1e-4, "weight_decay": 0.01, "betas": [0.9, 0.999], "eps": 1e-8}

SPRINT = {
    "data.external_caption_suffixes": (),
    "data.external_clipscore_suffixes": (),
    "data.del_img_clip_thr": 22.0,
    "data.load_vae_feat": True,
    "model.model": "SanaMSCM_1600M_P1_D20",
    "model.qk_norm": True,
    "model.cross_norm": True,
    "model.cfg_embed": True,
    "model.cfg_embed_scale": 0.1,
    "model.class_dropout_prob": 0.0,
    "model.cfg_scale": 5.0,
    "scheduler.flow_shift": 1.0,
    "scheduler.weighting_scheme": "logit_normal_trigflow",
    "scheduler.logit_mean": 0.2,
    "scheduler.logit_std": 1.6,
    "scheduler.vis_sampler": "scm",
    "scheduler.timestep_norm_scale_factor": 1000.0,
    "train.seed": 42,
    "train.train_batch_size": 16,
    "train.optimizer": {**CAME, "lr": 2e-6},
    "train.lr_schedule_args": {"num_warmup_steps": 5000},
}

# What each published file says other than Sana_1600M_img1024.yaml.
PUBLISHED = {
    "sana_config/1024ms/Sana_1600M_img1024.yaml": {},
    "sana_config/1024ms/Sana_1600M_img1024_AdamW.yaml": {
        "model.mixed_precision": "fp16",
        "train.optimizer": ADAMW,
    },
    "sana_config/1024ms/Sana_1600M_img1024_CAME8bit.yaml": {
        "model.mixed_precision": "fp16",
        "train.optimizer": CAME_8BIT,
    },
    "sana_config/1024ms/Sana_600M_img1024.yaml": {
        "model.model": "SanaMS_600M_P1_D28",
        "model.mixed_precision": "fp16",
        "scheduler.flow_shift": 4.0,
    },
    "sana_config/512ms/Sana_1600M_img512.yaml": {
        "data.image_size": 512,
        "model.image_size": 512,
        "model.aspect_ratio_type": "ASPECT_RATIO_512",
        "model.mixed_precision": "fp16",
    },
    "sana_config/512ms/Sana_600M_img512.yaml": {
        "data.image_size": 512,
        "model.model": "SanaMS_600M_P1_D28",
        "model.image_size": 512,
        "model.aspect_ratio_type": "ASPECT_RATIO_512",
        "model.mixed_precision": "fp16",
        "train.train_batch_size": 128,
    },
    "sana_config/512ms/ci_Sana_600M_img512.yaml": {
        "data.data_dir": ("data/data_public/vaef32c32_v2_512/dir1",),
        "data.image_size": 512,
        "model.model": "SanaMS_600M_P1_D28",
        "model.image_size": 512,
        "model.aspect_ratio_type": "ASPECT_RATIO_512",
        "model.mixed_precision": "fp16",
        "scheduler.flow_shift": 1.0,
        "train.num_epochs": 1,
    },
    "sana_config/512ms/sample_dataset.yaml": {
        "data.type": "SanaImgDataset",
        "data.data_dir": ("asset/example_data",),
        "data.image_size": 512,
        "model.model": "SanaMS_600M_P1_D28",
        "model.image_size": 512,
        "model.aspect_ratio_type": "ASPECT_RATIO_512",
        "model.multi_scale": False,
        "model.mixed_precision": "fp16",
        "scheduler.flow_shift": 1.0,
        "train.train_batch_size": 128,
    },
    "sana_config/2048ms/Sana_1600M_img2048_bf16.yaml": {
        "data.image_size": 2048,
        "model.image_size": 2048,
        "model.aspect_ratio_type": "ASPECT_RATIO_2048",
        "model.use_pe": True,
        "train.train_batch_size": 4,
    },
    "sana_config/4096ms/Sana_1600M_img4096_bf16.yaml": {
        "data.image_size": 4096,
        "model.image_size": 4096,
        "model.aspect_ratio_type": "ASPECT_RATIO_4096",
        "model.use_pe": True,
        "model.pe_interpolation": 2.0,
        "scheduler.flow_shift": 6.0,
        "train.train_batch_size": 4,
    },
    "sana_app_config/Sana_1600M_app.yaml": {
        "data.data_dir": (),
        "data.external_caption_suffixes": (),
        "data.external_clipscore_suffixes": (),
        "model.mixed_precision": "fp16",
    },
    "sana_app_config/Sana_600M_app.yaml": {
        "data.data_dir": (),
        "data.external_caption_suffixes": (),
        "data.external_clipscore_suffixes": (),
        "data.load_vae_feat": True,
        "model.model": "SanaMS_600M_P1_D28",
        "model.mixed_precision": "fp16",
        "model.pag_applied_layers": (14,),
        "scheduler.flow_shift": 4.0,
    },
    "sana1-5_config/1024ms/Sana_1600M_1024px_allqknorm_bf16_lr2e5.yaml": {
        "data.external_caption_suffixes": (),
        "data.external_clipscore_suffixes": (),
        "data.del_img_clip_thr": 22.0,
        "data.load_vae_feat": True,
        "model.qk_norm": True,
        "model.cross_norm": True,
        "model.load_from": "hf://Efficient-Large-Model/SANA1.5_1.6B_1024px/checkpoints/SANA1.5_1.6B_1024px.pth",
        "train.train_batch_size": 2,
        "train.optimizer": {**CAME, "lr": 2e-5},
        "train.resume_lr_scheduler": False,
    },
    "sana1-5_config/1024ms/Sana_4800M_1024px_came8bit_grow_constant_allqknorm_bf16_lr2e5.yaml": {
        "data.external_caption_suffixes": (),
        "data.external_clipscore_suffixes": (),
        "data.del_img_clip_thr": 22.0,
        "data.load_vae_feat": True,
        "model.model": "SanaMS_4800M_P1_D60",
        "model.qk_norm": True,
        "model.cross_norm": True,
        "train.train_batch_size": 2,
        "train.optimizer": {**CAME_8BIT, "lr": 2e-5},
        "train.resume_lr_scheduler": False,
    },
    # But for the teacher in model.load_from.
    "sana_sprint_config/1024ms/SanaSprint_1600M_1024px_allqknorm_bf16_scm_ladd.yaml": SPRINT,
    "sana_sprint_config/1024ms/SanaSprint_600M_1024px_allqknorm_bf16_scm_ladd.yaml": {
        **SPRINT,
        "model.model": "SanaMSCM_600M_P1_D28",
    },
}


def _written(name):
    """Dotted settings that a file itself writes, and its `base:`."""
    tree = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    base = tree.pop("base", None)
    keys = []
    for section, values in tree.items():
        keys += [f"{section}.{key}" for key in values] if isinstance(values, dict) else [section]
    return keys, base


def _parameters(network):
    """The published count of a block without q/k norms, and of what stands around the blocks."""
    d, h, c = network.hidden_size, int(2.5 * network.hidden_size), network.caption_channels
    attention = 6 * d + 3 * d**2 + (d**2 + d) + (d**2 + d) + (2 * d**2 + 2 * d) + (d**2 + d)
    block = attention + (2 * h * d + 2 * h) + (18 * h + 2 * h) + h * d
    time = (256 * d + d) + (d**2 + d) + (6 * d**2 + 6 * d)
    caption = (c * d + d) + (d**2 + d) + d
    return network.depth * block + time + caption + (32 * d + d) + (2 * d + 32 * d + 32)


@pytest.mark.parametrize("name", ["SanaMS_600M_P1_D28", "SanaMS_1600M_P1_D20"])
def test_formula_of_the_parameter_count(name):
    assert _parameters(TRANSFORMERS[name]) == PARAMETERS[name, False]


@pytest.mark.parametrize("name", FILES)
def test_config_loads_and_builds_its_model(name, caplog):
    config = load_config(CONFIGS / name)
    assert caplog.records == []
    with torch.device("meta"):
        model = build_transformer(config.model.model, **transformer_overrides(config))
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if config.model.model == "SanaMS_Tiny_P1_D8":
        assert count == _parameters(TRANSFORMERS[config.model.model])
    else:
        assert count == PARAMETERS[config.model.model, config.model.cross_norm]
    assert config.model.pag_applied_layers[-1] < len(model.blocks)
    assert config.model.cross_norm == config.model.qk_norm
    sprint = config.model.model.startswith("SanaMSCM")
    assert (model.config.cfg_embed, model.config.timestep_norm_scale_factor) == (
        sprint,
        1000 if sprint else 1,
    )
    assert model.config.clamp_attention == (config.model.mixed_precision == "fp16")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    base, config = leaves_of(load_config(CONFIGS / BASE)), leaves_of(load_config(CONFIGS / name))
    assert {key: value for key, value in config.items() if value != base[key]} == PUBLISHED[name]


def test_every_published_config_is_pinned():
    assert set(FILES) - set(PUBLISHED) == {BASE, "sana_config/tiny/Sana_tiny_img256.yaml"}


def test_values_of_the_base():
    config = load_config(CONFIGS / BASE)
    expected = {
        "data.type": "SanaWebDatasetMS",
        "data.data_dir": ("data/toy_data",),
        "data.clip_thr": 25.0,
        "data.clip_thr_temperature": 0.1,
        "data.external_caption_suffixes": ("", "_InternVL2-26B", "_VILA1-5-13B"),
        "data.external_clipscore_suffixes": (
            "_InternVL2-26B_clip_score",
            "_VILA1-5-13B_clip_score",
            "_prompt_clip_score",
        ),
        "model.model": "SanaMS_1600M_P1_D20",
        "model.image_size": 1024,
        "model.mixed_precision": "bf16",
        "model.aspect_ratio_type": "ASPECT_RATIO_1024",
        "model.class_dropout_prob": 0.1,
        "model.pag_applied_layers": (8,),
        "vae.vae_pretrained": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
        "text_encoder.text_encoder_name": "gemma-2-2b-it",
        "text_encoder.y_norm": True,
        "text_encoder.y_norm_scale_factor": 0.01,
        "text_encoder.model_max_length": 300,
        "scheduler.flow_shift": 3.0,
        "scheduler.weighting_scheme": "logit_normal",
        "train.seed": 1,
        "train.num_workers": 10,
        "train.train_batch_size": 64,
        "train.num_epochs": 100,
        "train.grad_checkpointing": True,
        "train.gradient_clip": 0.1,
        "train.optimizer": CAME,
        "train.lr_schedule": "constant",
        "train.lr_schedule_args": {"num_warmup_steps": 2000},
        "train.local_save_vis": True,
        "train.visualize": True,
        "train.eval_sampling_steps": 500,
        "train.log_interval": 20,
        "train.save_model_epochs": 5,
        "train.save_model_steps": 500,
        "train.eval_metric_step": 2000,
        "work_dir": "output/debug",
    }
    assert {key: leaves_of(config)[key] for key in expected} == expected


def test_base_has_every_setting():
    keys, base = _written(BASE)
    assert base is None
    settings = {key.removesuffix(".checkpoint") for key in leaves_of(SanaConfig())}
    assert set(keys) == {key for key in settings if not key.startswith("model.resume_from.")}


@pytest.mark.parametrize("name", [name for name in FILES if name != BASE])
def test_a_config_writes_only_differences(name):
    keys, base = _written(name)
    below = leaves_of(load_config((CONFIGS / name).parent / base))
    here = leaves_of(load_config(CONFIGS / name))
    assert [key for key in keys if here[key] == below[key]] == []


@pytest.mark.parametrize("name", FILES)
def test_head_comment_says_what_it_is_and_how_to_launch(name):
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    head = lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]
    assert len(head) >= 2
    launch = [line for line in head if re.match(r"# [A-Z][a-z ]+: +(bash|python) \S+\.(sh|py) ", line)]
    assert launch
    for line in launch:
        for path in re.findall(r"configs/\S+\.yaml", line):
            assert path == f"configs/{name}" or name == BASE
            assert (CONFIGS.parent / path).is_file()


def test_readme_table_agrees_with_the_files():
    rows = {}
    for line in (CONFIGS / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].endswith(".yaml`"):
            rows[cells[0].strip("`")] = cells[1:]
    assert sorted(rows) == FILES
    for name, (model, pixels, buckets, precision, shift, pag, optimizer, lr, batch) in rows.items():
        config = load_config(CONFIGS / name)
        assert (model, int(pixels)) == (config.model.model, config.model.image_size), name
        assert {"yes": True, "no": False}[buckets] == config.model.multi_scale, name
        assert (precision, float(shift)) == (config.model.mixed_precision, config.scheduler.flow_shift), name
        assert tuple(map(int, pag.split())) == config.model.pag_applied_layers, name
        assert (optimizer, float(lr)) == (config.train.optimizer["type"], config.train.optimizer["lr"]), name
        assert int(batch) == config.train.train_batch_size, name


def test_chi_is_the_published_instruction():
    """The published weights were trained with it; diffusers has it with single quotes around one phrase."""
    folder = Path(
        importlib.util.find_spec("diffusers").origin
    ).parent  # read, not imported: that takes seconds
    tree = ast.parse((folder / "pipelines/sana/pipeline_sana.py").read_text(encoding="utf-8"))
    (call,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__call__"
    ]
    names = [argument.arg for argument in call.args.args][-len(call.args.defaults) :]
    theirs = ast.literal_eval(call.args.defaults[names.index("complex_human_instruction")])

    chi = load_config(CONFIGS / BASE).text_encoder.chi_prompt
    assert list(chi) == [line.replace("'Enhanced prompt'", '"Enhanced prompt"') for line in theirs]
    assert len(chi) == 8
    assert len("\n".join(chi)) == 1057
    assert chi[-1] == "User Prompt: "


def test_tiny_is_the_embedded_model():
    config = load_config(CONFIGS / "sana_config/tiny/Sana_tiny_img256.yaml")
    assert config.data.type == "SanaShapes"
    assert config.model.load_from == "asset/sana_tiny/transformer.safetensors"
    assert config.vae.vae_pretrained == "asset/sana_tiny/autoencoder"
    assert config.text_encoder.text_encoder_name == "asset/sana_tiny/text_encoder"
    assert (config.model.image_size, config.model.aspect_ratio_type) == (256, "ASPECT_RATIO_256")
    network = TRANSFORMERS[config.model.model]
    assert config.text_encoder.model_max_length == network.model_max_length
    assert config.text_encoder.caption_channels == network.caption_channels
    assert len(config.text_encoder.chi_prompt) == 1 and config.text_encoder.chi_prompt[0].endswith(" ")
    assert config.train.auto_lr is None
