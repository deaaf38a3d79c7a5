"""From a checkpoint to a pipeline: formats, configs, precision, and the commands of the published README.

Nothing is downloaded: small random models lie behind the published names.
"""

import importlib.util
import json
import logging
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel
from diffusers import SanaPipeline as DiffusersPipeline
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2Model

from sana import loading
from sana.config import dump_config, load_config, transformer_overrides
from sana.models import checkpoints
from sana.models.state_dict import to_diffusers
from sana.models.transformer import TransformerConfig
from sana.models.zoo import TRANSFORMERS, build_transformer
from sana.pipeline import SanaPipeline
from sana.utils import hub, images
from tests.factories import (
    CHI_PROMPT,
    TEXT_LENGTH,
    TEXT_WIDTH,
    make_autoencoder,
    make_language_model,
    make_tokenizer,
    make_transformer,
    write_model,
)
from tests.numerics import assert_close

NORMS, GEMMA_1 = {"qk_norm": True, "cross_norm": True}, {"caption_channels": 2048}
DRAW = {"num_inference_steps": 2, "seed": 5, "output_type": "latent"}
OURS = (f"text_encoder.model_max_length={TEXT_LENGTH}", f"text_encoder.chi_prompt={json.dumps(CHI_PROMPT)}")
"""What no file of diffusers holds: the length of the caption, and the instruction."""


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(config_path):
    return SanaPipeline(config_path)


@pytest.fixture(scope="module")
def empty(config_path):
    """A pipeline that waits for its transformer."""
    return SanaPipeline(load_config(config_path, ["model.load_from="]))


@pytest.fixture(scope="module")
def state(config_path):
    return load_file(config_path.parent / "transformer.safetensors")


@pytest.fixture(scope="module")
def files(state, tmp_path_factory):
    """The small transformer in every published form, those of diffusers written by diffusers."""
    folder = tmp_path_factory.mktemp("files")
    twin = SanaTransformer2DModel(
        num_attention_heads=7,
        attention_head_dim=32,
        num_layers=8,
        num_cross_attention_heads=7,
        cross_attention_head_dim=32,
        cross_attention_dim=224,
        caption_channels=TEXT_WIDTH,
        sample_size=8,
        patch_size=1,
    )
    twin.load_state_dict(to_diffusers(state))
    whole = folder / "whole"
    tokenizer = make_tokenizer()
    DiffusersPipeline(
        tokenizer=tokenizer,
        text_encoder=make_language_model(len(tokenizer)).model,
        vae=make_autoencoder(),
        transformer=twin,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ).save_pretrained(whole)
    twin.save_pretrained(folder / "shards", max_shard_size="2MB")
    torch.save(state, folder / "bare.pth")
    torch.save({"state_dict": state, "epoch": 3}, folder / "wrapped.pth")
    save_file(state, folder / "published.safetensors")
    return {
        "bare": folder / "bare.pth",
        "wrapped": folder / "wrapped.pth",
        "safetensors": folder / "published.safetensors",
        "diffusers file": whole / "transformer" / "diffusion_pytorch_model.safetensors",
        "diffusers folder": whole / "transformer",
        "shards": folder / "shards",
        "index": folder / "shards" / "diffusion_pytorch_model.safetensors.index.json",
        "whole": whole,
    }


@pytest.fixture
def serve(monkeypatch):
    """Puts folders behind names of hub repositories; returns the list of what is asked for, (repository, patterns)."""

    def behind(repositories):
        asked = []

        def snapshot_download(repository, allow_patterns=None):
            asked.append((repository, allow_patterns))
            return str(repositories[repository])

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return asked

    return behind


# Formats


@pytest.mark.parametrize(
    "form",
    ["bare", "wrapped", "safetensors", "diffusers file", "diffusers folder", "shards", "index", "whole"],
)
def test_every_form_gives_the_same_latents(pipeline, empty, files, form):
    loaded = empty.from_pretrained(files[form])
    assert torch.equal(loaded("a red circle", **DRAW), pipeline("a red circle", **DRAW))
    assert loaded.weights.is_file()
    assert len(loaded.weights_sha256) == 64


@pytest.mark.parametrize("name", ["hf://owner/small/files/bare.pth", "owner/whole", "hf://owner/whole"])
def test_weights_from_the_hub(pipeline, empty, files, serve, name):
    folder = files["bare"].parent
    (folder / "files").mkdir(exist_ok=True)
    if not (folder / "files" / "bare.pth").exists():
        (folder / "files" / "bare.pth").symlink_to(files["bare"])
    asked = serve({"owner/small": folder, "owner/whole": files["whole"]})
    assert torch.equal(empty.from_pretrained(name)("a red circle", **DRAW), pipeline("a red circle", **DRAW))
    assert asked
    assert not [pattern for _, patterns in asked for pattern in patterns if "text_encoder" in pattern]


def test_a_whole_pipeline_folder_needs_no_config(pipeline, files, serve, caplog):
    serve({"owner/whole": files["whole"]})
    for name in (files["whole"], "hf://owner/whole"):
        caplog.clear()
        loaded = SanaPipeline.from_folder(name, OURS)
        assert torch.equal(loaded("a red circle", **DRAW), pipeline("a red circle", **DRAW))
        assert loaded.config.vae.vae_pretrained == f"{name}/vae"
        (line,) = [record.getMessage() for record in caplog.records if "has no config" in record.getMessage()]
        assert "its tensors are those of SanaMS_Tiny_P1_D8" in line
        assert "256 pixels, flow shift 3, flow_dpm-solver" in line


def test_weights_are_loaded_strictly(config_path, tmp_path):
    pipeline = SanaPipeline(load_config(config_path, ["model.load_from="]))
    assert {parameter.device.type for parameter in pipeline.transformer.parameters()} == {"meta"}
    assert pipeline.device.type == "cpu"
    assert pipeline.weights is None
    assert pipeline.weights_sha256 is None
    with pytest.raises(ValueError, match="no weights are loaded: call from_pretrained"):
        pipeline("a red circle")
    state = load_file(config_path.parent / "transformer.safetensors")
    save_file(
        {name: value for name, value in state.items() if "x_embedder" not in name},
        tmp_path / "part.safetensors",
    )
    with pytest.raises(ValueError, match="x_embedder"):
        pipeline.from_pretrained(tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="no weights are loaded"):
        pipeline("a red circle")
    assert pipeline.from_pretrained(config_path.parent / "transformer.safetensors") is pipeline
    assert pipeline.weights_sha256 == hub.sha256(config_path.parent / "transformer.safetensors")
    torch.save({"state_dict": {name: 2 * value for name, value in state.items()}}, tmp_path / "double.pth")
    pipeline.from_pretrained(tmp_path / "double.pth")
    assert torch.equal(pipeline.transformer.state_dict()["t_block.1.bias"], 2 * state["t_block.1.bias"])
    assert pipeline.weights_sha256 == hub.sha256(tmp_path / "double.pth")
    with pytest.raises(ValueError, match="x_embedder"):
        pipeline.from_pretrained(tmp_path / "part.safetensors")
    assert torch.equal(pipeline.transformer.state_dict()["t_block.1.bias"], 2 * state["t_block.1.bias"])
    assert pipeline.weights == tmp_path / "double.pth"


# Configs without --config


@pytest.mark.parametrize("name", checkpoints.PUBLISHED)
def test_a_published_name_decides(tmp_path, name):
    entry = checkpoints.PUBLISHED[name]
    folder = tmp_path / entry.repo
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {image_size: 256}")
    weights = folder / entry.pth.rpartition("/")[2]
    weights.touch()
    config = loading.config_for(weights, ["scheduler.inference_flow_shift=2.5"])
    assert (config.model.model, config.model.image_size) == (entry.architecture, entry.resolution)
    assert (config.scheduler.vis_sampler, config.scheduler.flow_shift) == (entry.sampler, entry.flow_shift)
    assert config.scheduler.sampling_shift == 2.5
    assert config.model.load_from == str(weights)
    network = replace(TRANSFORMERS[entry.architecture], **transformer_overrides(config))
    for field, value in entry.overrides.items():
        assert getattr(network, field) == value, field


def test_the_config_inside_a_file_comes_before_the_one_beside_it(config_path, state, tmp_path):
    dump_config(load_config(config_path, ["scheduler.flow_shift=4.5"]), tmp_path / "inside.yaml")
    text = (tmp_path / "inside.yaml").read_text(encoding="utf-8")
    dump_config(load_config(config_path, ["scheduler.flow_shift=5.5"]), tmp_path / "config.yaml")
    save_file(state, tmp_path / "one.safetensors", {"config": text, "format": "pt"})
    config = loading.config_for(tmp_path / "one.safetensors", ["model.cfg_scale=7"])
    assert (config.scheduler.flow_shift, config.model.cfg_scale) == (4.5, 7)
    assert config.model.load_from == str(tmp_path / "one.safetensors")
    save_file(state, tmp_path / "one.safetensors")
    assert loading.config_for(tmp_path / "one.safetensors").scheduler.flow_shift == 5.5
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "one.safetensors").rename(tmp_path / "checkpoints" / "one.safetensors")
    assert loading.config_for(tmp_path / "checkpoints" / "one.safetensors").scheduler.flow_shift == 5.5
    save_file(state, tmp_path / "one.safetensors", {"config": "model: [", "format": "pt"})
    with pytest.raises(ValueError, match=r"config in one\.safetensors\.yaml:1:.*not valid YAML"):
        loading.config_for(tmp_path / "one.safetensors")


@pytest.mark.parametrize(
    ("architecture", "overrides", "tokens", "dtype", "base", "expected"),
    [
        ("SanaMS_600M_P1_D28", {}, 256, "float16", "Sana_600M_img512", (512, 3.0, "fp16", False)),
        ("SanaMS_600M_P1_D28", {}, None, "float32", "Sana_600M_img1024", (1024, 4.0, "fp16", False)),
        ("SanaMS_1600M_P1_D20", {}, 1024, "float16", "Sana_1600M_img1024", (1024, 3.0, "fp16", False)),
        ("SanaMS_1600M_P1_D20", {}, 4096, "bfloat16", "img2048_bf16", (2048, 3.0, "bf16", True)),
        ("SanaMS_1600M_P1_D20", {}, 16384, "float32", "img4096_bf16", (4096, 6.0, "bf16", True)),
        ("SanaMS_1600M_P1_D20", NORMS, 1024, "bfloat16", "1024px_allqknorm", (1024, 3.0, "bf16", False)),
        ("SanaMS_4800M_P1_D60", NORMS, 1024, "float32", "Sana_4800M", (1024, 3.0, "bf16", False)),
        ("SanaMSCM_600M_P1_D28", {}, None, "bfloat16", "SanaSprint_600M", (1024, 1.0, "bf16", False)),
        ("SanaMS_3200M_P1_D40", GEMMA_1, 256, "float16", "base", (512, 3.0, "fp16", False)),
    ],
)
def test_tensors_alone_say_what_they_can(
    monkeypatch, tmp_path, caplog, architecture, overrides, tokens, dtype, base, expected
):
    with torch.device("meta"):
        found = build_transformer(architecture, **overrides).to(getattr(torch, dtype)).state_dict()
        if tokens:
            found["pos_embed"] = torch.empty(1, tokens, TRANSFORMERS[architecture].hidden_size)
    monkeypatch.setattr(loading, "load_transformer_state", lambda path: found)
    (tmp_path / "unknown.pth").touch()
    config = loading.config_for(tmp_path / "unknown.pth")
    model = config.model
    assert (model.image_size, config.scheduler.flow_shift, model.mixed_precision, model.use_pe) == expected
    assert config.text_encoder.chi_prompt == load_config(loading.BASE_CONFIG).text_encoder.chi_prompt
    with torch.device("meta"):
        built = build_transformer(model.model, **transformer_overrides(config)).state_dict()
    assert {key: value.shape for key, value in built.items()} == {
        key: value.shape for key, value in found.items() if key != "pos_embed"
    }
    assert model.cfg_embed == (config.scheduler.vis_sampler == "scm")
    (line,) = [record.getMessage() for record in caplog.records if "has no config" in record.getMessage()]
    assert f"its tensors are those of {architecture}; assumed from configs/" in line
    assert base in line.split(" assumed from ")[1].split(":")[0]
    assert f"{expected[0]} pixels, flow shift {expected[1]:g}" in line


def test_json_files_of_diffusers_say_what_tensors_cannot(files, tmp_path):
    shutil.copytree(files["whole"] / "transformer", tmp_path / "transformer")
    network = json.loads((tmp_path / "transformer" / "config.json").read_text())
    network |= {"sample_size": 16, "interpolation_scale": 2.0}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(network))
    (tmp_path / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    config = loading.config_for(tmp_path)
    assert (config.scheduler.vis_sampler, config.scheduler.flow_shift) == ("flow_euler", 5.0)
    assert (config.model.use_pe, config.model.pe_interpolation, config.model.image_size) == (True, 2.0, 512)
    assert config.scheduler.timestep_norm_scale_factor == 1.0
    network["timestep_scale"] = 0.001  # as diffusers writes a teacher of Sprint
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(network))
    assert loading.config_for(tmp_path).scheduler.timestep_norm_scale_factor == 1000.0
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="scheduler_config.json: not valid JSON"):
        loading.config_for(tmp_path)


# Precision


def published_copy(state, folder, name, dtype=torch.float32):
    torch.save({key: value.to(dtype) for key, value in state.items()}, folder / f"{name}.pth")
    return folder / f"{name}.pth"


def test_on_a_cpu_weights_run_in_float32_clipped_where_they_were_trained_so(empty, state, tmp_path):
    """What overflows float16 is clipped in every dtype: the weights were trained that way."""
    half = published_copy(state, tmp_path, "Sana_1600M_1024px", torch.float16)
    assert empty.from_pretrained(half).dtype == torch.float32
    assert empty.transformer.config.clamp_attention
    brain = published_copy(state, tmp_path, "Sana_1600M_1024px_BF16")
    assert not empty.from_pretrained(brain).transformer.config.clamp_attention


def test_a_dtype_that_was_asked_for_is_refused_before_anything_is_read(config_path, state, tmp_path):
    half = tmp_path / "Sana_1600M_1024px.pth"
    half.write_bytes(b"not even a checkpoint")
    pipeline = SanaPipeline(config_path, dtype="bf16", device="cpu")
    before = pipeline.transformer
    with pytest.raises(ValueError, match="do not run in bfloat16.*use float32 or float16"):
        pipeline.from_pretrained(half)
    assert pipeline.transformer is before
    with pytest.raises(ValueError, match="do not run in bfloat16"):
        SanaPipeline(load_config(config_path, [f"model.load_from={half}"]), dtype="bf16", device="cpu")
    half = published_copy(state, tmp_path, "Sana_1600M_1024px")
    pipeline = SanaPipeline(config_path, dtype="fp16", device="cpu")
    assert pipeline.from_pretrained(half).dtype == torch.float16
    own = published_copy(state, tmp_path, "own")
    assert pipeline.from_pretrained(own).transformer.config.clamp_attention


@pytest.mark.filterwarnings("ignore:.*is a no-op")  # parameters without memory
def test_a_dtype_of_a_config_is_corrected_with_one_line(config_path, state, tmp_path, caplog):
    """As on a GPU, played on a device without memory."""
    config = load_config(config_path, ["model.mixed_precision=bf16"])
    half = published_copy(state, tmp_path, "Sana_1600M_1024px")
    model = loading.load_transformer(config, half, dtype=None, device=torch.device("meta"))
    assert (model.dtype, model.config.clamp_attention) == (torch.float16, True)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("these weights (Sana_1600M_1024px): float16 instead of the config's bfloat16: ")
    caplog.clear()
    torch.save(state, tmp_path / "own.pth")  # of no published name: the config is believed
    model = loading.load_transformer(config, tmp_path / "own.pth", dtype=None, device=torch.device("meta"))
    assert (model.dtype, model.config.clamp_attention) == (torch.bfloat16, False)
    assert not caplog.records


def test_dtypes(config_path, pipeline):
    assert pipeline.config.model.mixed_precision == "bf16"
    assert {pipeline.dtype, pipeline.autoencoder.dtype, pipeline.text_encoder.model.dtype} == {torch.float32}
    assert pipeline.transformer.config.fp32_attention
    half = SanaPipeline(config_path, dtype="bf16", device="cpu")
    assert half.dtype == torch.bfloat16
    # An explicit bfloat16 on a CPU is meant for all three: who asks for it wants the memory.
    assert half.autoencoder.dtype == half.text_encoder.model.dtype == torch.bfloat16
    assert not half.transformer.config.fp32_attention
    picture = half("a red circle", num_inference_steps=2)
    assert picture.dtype == torch.float32
    # bfloat16 has 8 bits: measured 1 % at 2 steps
    assert_close("bf16", picture, pipeline("a red circle", num_inference_steps=2), rel_rms=0.03)
    for settings, message in (
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "abacus"}, "no device 'abacus'"),
    ):
        with pytest.raises(ValueError, match=message):
            SanaPipeline(config_path, **settings)


# Adapters


def write_lora(path, seed):
    """A random adapter with diffusers' keys."""
    generator = torch.Generator().manual_seed(seed)
    module = "transformer.transformer_blocks.0.attn1.to_q"
    factors = {
        "lora_A": torch.randn(4, 224, generator=generator),
        "lora_B": torch.randn(224, 4, generator=generator),
    }
    save_file({f"{module}.{name}.weight": value for name, value in factors.items()}, path)
    return path


def test_adapters_come_and_go(config_path, tmp_path):
    pipeline = SanaPipeline(config_path)
    one, two = (write_lora(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    plain = pipeline("a red circle", **DRAW)
    first = pipeline.load_lora(one, 0.5)("a red circle", **DRAW)
    both = pipeline.load_lora(two)("a red circle", **DRAW)
    assert pipeline.loras == ((hub.sha256(one), 0.5), (hub.sha256(two), 1.0))
    for picture, other in ((plain, first), (first, both), (plain, both)):
        assert (picture - other).std() > 1e-3
    pipeline.unload_lora()
    assert torch.equal(pipeline("a red circle", **DRAW), plain)
    assert not torch.equal(pipeline.load_lora(one)("a red circle", **DRAW), first)
    pipeline.unload_lora()
    assert torch.equal(pipeline.load_lora(one, 0.5)("a red circle", **DRAW), first)
    pipeline.from_pretrained(config_path.parent / "transformer.safetensors")
    assert pipeline.loras == ()
    assert torch.equal(pipeline("a red circle", **DRAW), plain)
    with pytest.raises(ValueError, match="no such file"):
        pipeline.load_lora(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="no weights are loaded"):
        SanaPipeline(load_config(config_path, ["model.load_from="])).load_lora(one)


# The published README


@pytest.fixture
def released(tmp_path, serve, monkeypatch):
    """A model that differs from Sana-1.6B in depth and width only, behind the names of the README."""
    small = TransformerConfig(depth=9, hidden_size=32, num_heads=1)
    monkeypatch.setitem(TRANSFORMERS, "SanaMS_1600M_P1_D20", small)
    weights = tmp_path / "transformer" / "checkpoints" / "Sana_1600M_1024px.pth"
    weights.parent.mkdir(parents=True)
    network = make_transformer("SanaMS_1600M_P1_D20", caption_channels=2304, model_max_length=300)
    torch.save({"state_dict": network.half().state_dict()}, weights)
    make_autoencoder().save_pretrained(tmp_path / "autoencoder")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "text")
    shape = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=2304,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        pad_token_id=0,
    )
    Gemma2Model(shape).save_pretrained(tmp_path / "text")
    (tmp_path / "output").mkdir()
    monkeypatch.chdir(tmp_path)
    return serve(
        {
            "Efficient-Large-Model/Sana_1600M_1024px": tmp_path / "transformer",
            "Efficient-Large-Model/gemma-2-2b-it": tmp_path / "text",
            "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers": tmp_path / "autoencoder",
        }
    )


def documented(start):
    """The example in asset/docs/inference.md that begins so."""
    blocks = re.findall(r"```\w+\n(.*?)```", (hub.ROOT / "asset/docs/inference.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if block.startswith(start)]
    return example


def test_the_published_snippet(released, tmp_path):
    example = documented("import torch\nfrom app.sana_pipeline")
    names = {}
    exec(compile(example, "snippet", "exec"), names)  # noqa: S102 our own documentation
    assert names["image"].shape == (1, 3, 1024, 1024)
    assert names["image"].isfinite().all()
    assert images.load(tmp_path / "output" / "sana.png").size == (1024, 1024)
    assert names["sana"].transformer.config.clamp_attention
    assert {repository for repository, _ in released} == {
        "Efficient-Large-Model/Sana_1600M_1024px",
        "Efficient-Large-Model/gemma-2-2b-it",
        "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
    }


@pytest.mark.parametrize(
    "source", ["--txt_file=asset/samples_mini.txt", "--json_file=asset/samples_mini.json"]
)
def test_the_published_commands(released, tmp_path, monkeypatch, capsys, source):
    example = documented(
        "python scripts/inference.py --config=configs/sana_config/1024ms/Sana_1600M_img1024.yaml \\\n"
    )
    words = shlex.split(example.replace("\\\n", " "))
    assert words.pop(-1) == "--txt_file=asset/samples_mini.txt"
    spec = importlib.util.spec_from_file_location("inference_script", hub.ROOT / words[1])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(logging.getLogger("sana"), "handlers", [])
    parser = script.make_parser()
    few = ["--sample_nums=1", "--step=2", "--device=cpu", "--work_dir=out"]
    parser.run(script.run, *parser.parse_known_args([*words[2:], source, *few]))
    (path,) = capsys.readouterr().out.splitlines()
    assert images.load(path).size == (1024, 1024)


def test_every_mended_defect_has_its_test():
    text = (hub.ROOT / "asset/docs/inference.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) == 12
    code = "".join(path.read_text(encoding="utf-8") for path in (hub.ROOT / "tests").glob("test_*.py"))
    assert named == {name for name in named if f"def {name}(" in code}
