"""The converter: every form of a checkpoint into every other, and back, bit for bit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sana.config import load_config, transformer_overrides
from sana.loading import config_for
from sana.utils import hub
from scripts.convert_checkpoint import make_parser, run
from tests.factories import make_autoencoder, make_transformer, write_model
from tests.models.native_dc_ae import LITE, build_published, native_state, small, write_native

ROOT = Path(__file__).resolve().parents[1]
NULL_CAPTION = "y_embedder.y_embedding"
WEIGHTS = "diffusion_pytorch_model.safetensors"

# The published table of names, diffusers' on the left, as substitutions; q, k, v are joined after it.
NAMES = (
    (r"^patch_embed\.", "x_embedder."),
    (r"^caption_projection\.linear_", "y_embedder.y_proj.fc"),
    (r"^caption_norm\.", "attention_y_norm."),
    (r"^time_embed\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_embed\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^time_embed\.linear", "t_block.1"),
    (r"^scale_shift_table", "final_layer.scale_shift_table"),
    (r"^proj_out", "final_layer.linear"),
    (r"^transformer_blocks", "blocks"),
    (r"attn1\.to_out\.0", "attn.proj"),
    (r"attn1\.norm_(.)", r"attn.\1_norm"),
    (r"attn2\.to_out\.0", "cross_attn.proj"),
    (r"attn2\.norm_(.)", r"cross_attn.\1_norm"),
    (r"attn2\.to_q", "cross_attn.q_linear"),
    (r"ff\.conv_inverted", "mlp.inverted_conv.conv"),
    (r"ff\.conv_depth", "mlp.depth_conv.conv"),
    (r"ff\.conv_point", "mlp.point_conv.conv"),
)


def published_names(state: dict) -> dict:
    """diffusers' tensors under the published names, by this file's own table."""
    state, renamed = dict(state), {}
    for key in [key for key in state if re.search(r"attn1\.to_q\.|attn2\.to_k\.", key)]:
        names, fused = ("qkv", "attn.qkv") if "attn1" in key else ("kv", "cross_attn.kv_linear")
        stem, leaf = re.split(r"attn.\.to_.\.", key)
        parts = [state.pop(re.sub(r"to_.\.", f"to_{name}.", key)) for name in names]
        renamed[f"{stem}{fused}.{leaf}".replace("transformer_", "")] = torch.cat(parts)
    for key, value in state.items():
        for pattern, replacement in NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def convert(*words: object) -> None:
    run(*make_parser().parse_known_args([str(word) for word in words]))


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model as published: a .pth with the position table in it, config.yaml beside it."""
    folder = tmp_path_factory.mktemp("source")
    write_model(folder, model={"load_from": None}, scheduler={"flow_shift": 2.5})
    state = make_transformer().state_dict() | {"pos_embed": torch.zeros(1, 64, 224)}
    torch.save({"state_dict": state}, folder / "model.pth")
    return folder


@pytest.fixture(scope="module")
def state(source):
    return torch.load(source / "model.pth", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def exported(source):
    """That model as a pipeline folder."""
    convert(source / "model.pth", source / "pipeline")
    return source / "pipeline"


@pytest.fixture(scope="module")
def single(source):
    """That model as one file that knows its config."""
    convert(source / "model.pth", source / "alone" / "model.safetensors")
    return source / "alone" / "model.safetensors"


def in_diffusers(state: dict) -> dict:
    """What diffusers has of a published state."""
    return {key: value for key, value in state.items() if key not in (NULL_CAPTION, "pos_embed")}


def test_the_folder_is_diffusers_own(exported, source, state):
    pipeline = SanaPipeline.from_pretrained(exported)
    assert_same(published_names(pipeline.transformer.state_dict()), in_diffusers(state))
    assert pipeline.transformer.config.sample_size == 8
    assert pipeline.scheduler.config.flow_shift == 2.5
    assert_same(pipeline.vae.state_dict(), make_autoencoder().state_dict())
    assert pipeline.vae.config.scaling_factor == 0.5
    for file in exported.rglob("*.json"):
        assert str(source) not in file.read_text(), f"{file} names a folder of this machine"


def test_pth_to_folder_to_pth(exported, state, tmp_path):
    convert(exported, tmp_path / "back.pth")
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    assert content.keys() == {"state_dict"}
    assert_same(content["state_dict"], state)  # also what diffusers has no names for
    convert(exported / "transformer", tmp_path / "part.pth")
    assert_same(torch.load(tmp_path / "part.pth", weights_only=True)["state_dict"], state)


def test_pth_to_safetensors_to_pth(single, state, tmp_path):
    assert_same(load_file(single), state)
    convert(single, tmp_path / "back.pth")
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], state)


def test_folder_to_safetensors_to_folder(exported, source, tmp_path):
    convert(exported, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "again")
    files = sorted(path.relative_to(exported) for path in exported.rglob("*.safetensors"))
    parts = [str(file.parent) for file in files if file != Path(hub.SIDE_FILE)]
    assert parts == ["text_encoder", "transformer", "vae"]
    for file in files:
        assert_same(load_file(tmp_path / "again" / file), load_file(exported / file))
    for name in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "again" / name).read_text() == (exported / name).read_text(), name
    kept, first = (load_config(folder / "config.yaml") for folder in (tmp_path / "again", source))
    assert kept.text_encoder.chi_prompt == first.text_encoder.chi_prompt
    assert kept.text_encoder.model_max_length == first.text_encoder.model_max_length == 24


def test_the_file_alone_says_what_it_is(single, source, tmp_path):
    with safe_open(single, "pt") as content:
        metadata = content.metadata()
    assert metadata["architecture"] == "SanaMS_Tiny_P1_D8"
    overrides = json.loads(metadata["overrides"])
    assert {
        "caption_channels": 32,
        "model_max_length": 24,
        "y_norm_scale_factor": 1.0,
    }.items() <= overrides.items()
    model = make_transformer(**overrides)
    assert model.state_dict().keys() == load_file(single).keys() - {"pos_embed"}
    (tmp_path / "config.yaml").write_text(metadata["config"], encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == load_config(source / "config.yaml")


def test_a_folder_that_diffusers_saved(state, tmp_path, capsys):
    """No config.yaml: the architecture is read off the tensors, image size and flow shift off diffusers' files."""
    theirs = SanaTransformer2DModel(
        num_attention_heads=7,
        num_layers=8,
        num_cross_attention_heads=7,
        cross_attention_head_dim=32,
        cross_attention_dim=224,
        caption_channels=32,
        sample_size=16,
    )
    theirs.save_pretrained(tmp_path / "theirs" / "transformer")
    convert(tmp_path / "theirs", tmp_path / "model.safetensors")
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "model.safetensors")]
    assert_same(load_file(tmp_path / "model.safetensors"), published_names(theirs.state_dict()))
    convert(tmp_path / "model.safetensors", tmp_path / "again", "--save_full_pipeline=false")
    again = SanaTransformer2DModel.from_pretrained(tmp_path / "again" / "transformer")
    assert_same(again.state_dict(), theirs.state_dict())
    assert again.config.sample_size == 16


def test_published_flags(source, tmp_path, capsys):
    flags = f"--orig_ckpt_path={source / 'model.pth'} --dump_path={tmp_path / 'out'} --dtype=bf16 --image_size=512"
    flags += " --model_type=SanaMS_Tiny_P1_D8 --scheduler_type=flow-euler --save_full_pipeline"
    convert(*flags.split(), "--scheduler.flow_shift=6.0")
    printed = capsys.readouterr().out.splitlines()
    assert printed == sorted(str(path) for path in (tmp_path / "out").rglob("*") if path.is_file())
    stored = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    scheduler = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["shift"]) == ("FlowMatchEulerDiscreteScheduler", 6.0)
    assert json.loads((tmp_path / "out/transformer/config.json").read_text())["sample_size"] == 16
    # The other parts keep their dtype.
    assert {value.dtype for value in load_file(tmp_path / "out" / "vae" / WEIGHTS).values()} == {
        torch.float32
    }


def test_other_parts_for_the_folder(source, tmp_path):
    twin = build_published(small(LITE) | {"latent_channels": 32}).half()
    native = write_native(tmp_path / "native", native_state(twin))
    parts = (f"--vae={native}", f"--text_encoder={source / 'text_encoder'}")
    convert(source / "model.pth", tmp_path / "out", *parts)
    stored = load_file(tmp_path / "out" / "vae" / WEIGHTS)
    assert_same(stored, twin.state_dict())


def test_native_autoencoder_to_diffusers(tmp_path, capsys):
    twin = build_published(small(LITE))
    convert(write_native(tmp_path / "native", native_state(twin)), tmp_path / "out")
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == ["config.json", WEIGHTS]
    assert_same(AutoencoderDC.from_pretrained(tmp_path / "out").state_dict(), twin.state_dict())
    convert(tmp_path / "out", tmp_path / "half", "--dtype=fp16")
    half = {name: value.half() for name, value in twin.state_dict().items()}
    assert_same(load_file(tmp_path / "half" / WEIGHTS), half)


def test_averaged_weights(source, state, tmp_path):
    averaged = {name: value / 2 for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averaged}, tmp_path / "run.pth")
    convert(tmp_path / "run.pth", tmp_path / "ema.pth", "--ema", f"--config={source / 'config.yaml'}")
    assert_same(torch.load(tmp_path / "ema.pth", weights_only=True)["state_dict"], averaged)


# Refusals


def test_nothing_is_overwritten_unasked(source, exported, single, tmp_path):
    for target in (source / "model.pth", single, exported):
        before = {file: file.stat().st_mtime_ns for file in source.rglob("*")}
        with pytest.raises(ValueError, match="exists: name another target, or give --overwrite"):
            convert(single, target)
        assert {file: file.stat().st_mtime_ns for file in source.rglob("*")} == before
    save_file(load_file(single), tmp_path / "model.safetensors")
    convert(single, tmp_path / "model.safetensors", "--overwrite", "--dtype=fp16")
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    # In place.
    convert(tmp_path / "model.safetensors", tmp_path / "model.safetensors", "--overwrite", "--dtype=fp32")
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--text_encoder.caption_channels=48"],
            "model.pth fits SanaMS_Tiny_P1_D8 with .*, not the SanaMS_Tiny_P1_D8 of the config: .*y_proj.fc1",
        ),
        (
            ["--model_type=SanaMS1.5_1600M_P1_D20"],
            "fits SanaMS_Tiny_.*, not the SanaMS_1600M_P1_D20 of the config: it lacks blocks.10",
        ),
        (["--model.qk_norm=true"], "lacks blocks.0.attn.k_norm.weight"),
        (["--dtype=int8"], "unknown dtype 'int8'"),
        (["--scheduler_type=ddim"], "vis_sampler"),
        (["--vae=asset/nowhere"], "no such file or folder"),
        (["--no_such_flag=1"], "no_such_flag"),
        (["--ema"], "holds no averaged weights"),
    ],
)
def test_wrong_input_leaves_nothing_behind(words, message, source, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        convert(source / "model.pth", tmp_path / "out", *words)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_dtype_that_published_weights_do_not_stand(tmp_path):
    """Refused before the file is read, which is none here."""
    torch.save({}, tmp_path / "Sana_1600M_1024px.pth")
    with pytest.raises(ValueError, match="do not run in bfloat16"):
        convert(tmp_path / "Sana_1600M_1024px.pth", tmp_path / "out.pth", "--dtype=bf16")


def test_errors_are_one_line_and_status_2(source, tmp_path):
    script = ROOT / "scripts" / "convert_checkpoint.py"
    broken = tmp_path / "broken.pth"
    broken.write_bytes((source / "model.pth").read_bytes()[:1000])
    answer = subprocess.run(
        [sys.executable, script, broken, tmp_path / "out", f"--config={source / 'config.yaml'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 2
    assert answer.stdout == ""
    lines = [line for line in answer.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and "truncated" in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stray", ["notes.txt", "src.pth", "transformer/notes.txt"])
def test_overwrite_never_takes_what_it_does_not_replace(source, tmp_path, stray):
    convert(source / "model.pth", tmp_path / "pipeline")
    convert(source / "model.pth", tmp_path / "pipeline", "--overwrite")
    (tmp_path / "pipeline" / stray).write_text("mine")
    with pytest.raises(ValueError, match=f"also holds {stray}, not written here: name another target"):
        convert(source / "model.pth", tmp_path / "pipeline", "--overwrite")
    assert (tmp_path / "pipeline" / stray).read_text() == "mine"


def test_a_stale_side_file_goes_with_the_weights(source, state, tmp_path):
    """Weights that lack what diffusers lacks replace some that had it: nothing of those may stay behind."""
    convert(source / "model.pth", tmp_path / "pipeline")
    torch.save(in_diffusers(state), tmp_path / "plain.pth")
    config = f"--config={source / 'config.yaml'}"
    convert(tmp_path / "plain.pth", tmp_path / "pipeline", "--overwrite", config)
    assert not (tmp_path / "pipeline" / hub.SIDE_FILE).exists()
    convert(tmp_path / "pipeline", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert_same(back, in_diffusers(state))


def test_a_part_does_not_replace_the_whole(source, tmp_path):
    convert(source / "model.pth", tmp_path / "pipeline")
    with pytest.raises(ValueError, match="also holds model_index.json, "):
        convert(source / "model.pth", tmp_path / "pipeline", "--overwrite", "--save_full_pipeline=false")
    assert (tmp_path / "pipeline" / "vae").is_dir()


def test_the_precision_of_a_published_name_outlives_the_name(source, tmp_path):
    folder = tmp_path / "Sana_1600M_1024px"
    folder.mkdir()
    (folder / "Sana_1600M_1024px.pth").write_bytes((source / "model.pth").read_bytes())
    convert(
        folder / "Sana_1600M_1024px.pth",
        tmp_path / "mine.safetensors",
        f"--config={source / 'config.yaml'}",
        "--model.mixed_precision=bf16",
    )
    config = config_for(tmp_path / "mine.safetensors")
    assert config.model.mixed_precision == "fp16" and transformer_overrides(config)["clamp_attention"]


def test_other_suffixes_and_overflow_are_refused(source, state, tmp_path):
    with pytest.raises(ValueError, match="o.bin: write a "):
        convert(source / "model.pth", tmp_path / "o.bin")
    big = dict(state)
    big["final_layer.linear.bias"] = torch.full_like(big["final_layer.linear.bias"], 1e6)
    torch.save(big, tmp_path / "big.pth")
    with pytest.raises(ValueError, match="final_layer.linear.bias is not finite in float16"):
        convert(
            tmp_path / "big.pth", tmp_path / "o.pth", "--dtype=fp16", f"--config={source / 'config.yaml'}"
        )
    torch.save({1: torch.zeros(2)}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="its keys are no names"):
        convert(tmp_path / "numbers.pth", tmp_path / "o.pth", f"--config={source / 'config.yaml'}")
