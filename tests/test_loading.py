"""What is read of a checkpoint and when: files of a hub repository, the config that belongs to weights, their precision.

The hub is folders, no network.
"""

import json
import logging
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from sana import loading
from sana.config import dump_config, load_config
from sana.models.autoencoder import Autoencoder
from sana.models.zoo import TRANSFORMERS
from sana.pipeline import SanaPipeline
from sana.utils import hub
from scripts.convert_checkpoint import make_parser, run
from tests.factories import CHI_PROMPT, TEXT_LENGTH, write_model

DRAW = {"num_inference_steps": 2, "seed": 5, "output_type": "latent"}
OURS = (f"text_encoder.model_max_length={TEXT_LENGTH}", f"text_encoder.chi_prompt={json.dumps(CHI_PROMPT)}")
"""What no file of diffusers holds: the length of the caption, and the instruction."""


def convert(*words):
    run(*make_parser().parse_known_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(config_path):
    return SanaPipeline(config_path, device="cpu")


@pytest.fixture(scope="module")
def state(config_path):
    return load_file(config_path.parent / "transformer.safetensors")


@pytest.fixture(scope="module")
def whole(config_path):
    """The small model as diffusers' own converter leaves it: a pipeline folder and nothing beside."""
    folder = config_path.parent / "whole"
    convert(config_path.parent / "transformer.safetensors", folder)
    (folder / "config.yaml").unlink()
    (folder / hub.SIDE_FILE).unlink()
    return folder


def saved(state, folder, name, dtype=torch.float32):
    """A .pth of that name."""
    torch.save({key: value.to(dtype) for key, value in state.items()}, folder / f"{name}.pth")
    return folder / f"{name}.pth"


# What is fetched from the hub, and when


@pytest.fixture
def real_hub(monkeypatch, tmp_path):
    """A hub of folders that gives only what matches the patterns; returns them, with what was fetched."""
    repositories, fetched = {}, []

    def snapshot_download(repository, allow_patterns=None):
        source, cache = repositories[repository], tmp_path / "hub" / repository
        cache.mkdir(parents=True, exist_ok=True)
        files = [str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            if not (cache / name).exists():
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / name, cache / name)
                fetched.append(name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return repositories, fetched


def with_variants(folder):
    """A copy of a pipeline folder as repositories have it: each network in several dtypes and formats."""
    for part in ("transformer", "vae", "text_encoder"):
        (weights,) = (folder / part).glob("*.safetensors")
        for other in (f"{weights.stem}.fp16.safetensors", f"{weights.stem}.bin", f"{weights.stem}.fp16.bin"):
            (folder / part / other).write_bytes(b"another variant")
    (folder / "demo.png").write_bytes(b"a picture")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"another network")
    return folder


def test_of_a_pipeline_on_the_hub_no_variant_is_fetched(pipeline, whole, real_hub, tmp_path):
    repositories, fetched = real_hub
    repositories["owner/whole"] = with_variants(shutil.copytree(whole, tmp_path / "whole"))
    loaded = SanaPipeline.from_folder("owner/whole", OURS, device="cpu")
    assert torch.equal(loaded("a red circle", **DRAW), pipeline("a red circle", **DRAW))
    weights = {name for name in fetched if name.endswith((".safetensors", ".bin", ".png"))}
    assert weights == {
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert {"tokenizer/tokenizer.json", "scheduler/scheduler_config.json"} <= set(fetched)


def test_the_config_of_a_folder_on_the_hub_is_read(config_path, whole, real_hub, tmp_path):
    """What our converter wrote, put on the hub."""
    repositories, _ = real_hub
    repositories["owner/whole"] = folder = shutil.copytree(whole, tmp_path / "whole")
    dump_config(load_config(config_path, ["scheduler.flow_shift=5.5"]), folder / "config.yaml")
    assert SanaPipeline.from_folder("hf://owner/whole", device="cpu").flow_shift == 5.5


@pytest.mark.parametrize("form", ["repository", "file", "diffusers", "converted"])
def test_a_refused_dtype_costs_no_download(config_path, state, whole, real_hub, tmp_path, form):
    """Not even where no config is given, and the repository is a whole pipeline."""
    repositories, fetched = real_hub
    owner, name = "Efficient-Large-Model", "Sana_1600M_1024px"
    (tmp_path / "pth" / "checkpoints").mkdir(parents=True)
    saved(state, tmp_path / "pth" / "checkpoints", name)
    converted = shutil.copytree(whole, tmp_path / "converted")
    save_file({}, converted / hub.SIDE_FILE, {"published": name})
    dump_config(load_config(config_path), converted / "config.yaml")
    repositories |= {f"{owner}/{name}": tmp_path / "pth", f"{owner}/{name}_diffusers": whole}
    repositories["owner/converted"] = converted
    path = {
        "repository": f"{owner}/{name}",
        "file": f"hf://{owner}/{name}/checkpoints/{name}.pth",
        "diffusers": f"hf://{owner}/{name}_diffusers",
        "converted": "owner/converted",
    }[form]
    with pytest.raises(ValueError, match="do not run in bfloat16"):
        SanaPipeline.from_folder(path, dtype="bf16", device="cpu")
    assert not [file for file in fetched if file.endswith((".pth", "model.safetensors"))]


# Configs beside weights


def test_a_config_of_something_else_is_passed_over(config_path, state, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    save_file(state, tmp_path / "run" / "one.safetensors")
    (tmp_path / "config.yaml").write_text("theme: jekyll")
    caplog.set_level(logging.INFO, logger="sana")
    loading.config_for(tmp_path / "run" / "one.safetensors")
    assert "has no config: its tensors are those of SanaMS_Tiny_P1_D8" in caplog.text
    caplog.clear()
    dump_config(load_config(config_path, ["scheduler.flow_shift=5.5"]), tmp_path / "config.yaml")
    assert loading.config_for(tmp_path / "run" / "one.safetensors").scheduler.flow_shift == 5.5
    assert f"one.safetensors: config {tmp_path / 'config.yaml'}" in caplog.text


# Eras


def small_published(monkeypatch):
    """The name of the published 1.6B network stands for the small one."""
    monkeypatch.setitem(TRANSFORMERS, "SanaMS_1600M_P1_D20", TRANSFORMERS["SanaMS_Tiny_P1_D8"])
    return "model.model=SanaMS_1600M_P1_D20"


def test_a_config_of_the_float16_era_is_taken_at_its_word(config_path, state, tmp_path, monkeypatch):
    """For weights of any name; a network that was never published is left to its config."""
    renamed = saved(state, tmp_path, "renamed")
    words = [small_published(monkeypatch), "model.mixed_precision=fp16"]
    config, cpu = load_config(config_path, words), torch.device("cpu")
    with pytest.raises(
        ValueError,
        match="whose config has model.mixed_precision fp16 do not run in bfloat16: .*; use float32",
    ):
        loading.load_transformer(config, renamed, dtype=torch.bfloat16, device=cpu)
    model = loading.load_transformer(config, renamed, dtype=None, device=cpu)
    assert (model.dtype, model.config.clamp_attention) == (torch.float32, True)
    own = load_config(config_path, words[1:])
    model = loading.load_transformer(own, renamed, dtype=torch.bfloat16, device=cpu)
    assert (model.dtype, model.config.clamp_attention) == (torch.bfloat16, True)
    norms = load_config(config_path, [*words, "model.qk_norm=true", "model.cross_norm=true"])
    assert loading.float16_era(norms.model.model, qk_norm=True) is None


def test_renamed_weights_that_may_be_of_either_era_are_named(
    config_path, state, tmp_path, monkeypatch, caplog
):
    """The published 1024 px config says bf16, and goes with weights of both eras; their tensors are alike."""
    config, cpu = load_config(config_path, [small_published(monkeypatch)]), torch.device("cpu")
    renamed = saved(state | {"pos_embed": torch.zeros(1, 4, 224)}, tmp_path, "renamed")
    assert not loading.load_transformer(config, renamed, dtype=None, device=cpu).config.clamp_attention
    (line,) = [record.getMessage() for record in caplog.records]
    assert "renamed.pth: of no published name" in line
    assert "if they are a renamed Sana_1600M_512px" in line and "--model.mixed_precision=fp16" in line
    caplog.clear()
    trained = saved(state, tmp_path, "epoch_1_step_2")  # here: without the table
    loading.load_transformer(config, trained, dtype=None, device=cpu)
    brain = saved(state | {"pos_embed": torch.zeros(1)}, tmp_path, "Sana_1600M_1024px_BF16")
    loading.load_transformer(config, brain, dtype=None, device=cpu)
    assert not caplog.records


@pytest.mark.parametrize(("asked", "given"), [("float16", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize(
    "name", ["mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers", "asset/sana_tiny/autoencoder"]
)
def test_no_autoencoder_runs_in_float16(config_path, monkeypatch, caplog, asked, given, name):
    """Whatever it is called: published weights may lie in any folder."""
    seen = []
    monkeypatch.setattr(
        Autoencoder, "from_pretrained", lambda name, **settings: seen.append((name, settings))
    )
    config = load_config(config_path, [f"vae.vae_pretrained={name}", f"vae.weight_dtype={asked}"])
    loading.load_autoencoder(config, torch.device("cuda"))
    assert seen == [(name, {"dtype": given, "device": torch.device("cuda")})]
    corrected = f"autoencoder {name}: float32 instead of the config's float16: " in caplog.text
    assert corrected == (asked == "float16")


# What a conversion carries


def test_the_era_outlives_conversions(config_path, state, tmp_path, caplog):
    """A published name, then files of other names, each made from the one before."""
    brain = "--model.mixed_precision=bf16"
    first = saved(state, tmp_path, "Sana_1600M_1024px", torch.float16)
    convert(first, tmp_path / "one.safetensors", f"--config={config_path}", brain)
    convert(tmp_path / "one.safetensors", tmp_path / "two", brain)
    convert(tmp_path / "two", tmp_path / "three.safetensors", brain)
    convert(tmp_path / "two", tmp_path / "four", brain, "--save_full_pipeline=false")
    for name in ("one.safetensors", "two", "two/transformer", "three.safetensors", "four"):
        assert loading.known_checkpoint(tmp_path / name).name == "Sana_1600M_1024px", name
    for name in ("one.safetensors", "two", "three.safetensors", "four"):
        with pytest.raises(ValueError, match="do not run in bfloat16"):
            convert(tmp_path / name, tmp_path / "out.pth", "--dtype=bf16", f"--config={config_path}")
    with pytest.raises(ValueError, match="do not run in bfloat16"):
        SanaPipeline.from_folder(tmp_path / "two", dtype="bf16", device="cpu")
    # A config that says otherwise, on the command line too, is corrected.
    caplog.clear()
    config = loading.config_for(tmp_path / "two", ["model.mixed_precision=bf16"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "fill", lambda model, state, **_: None)  # a GPU without memory
        model = loading.load_transformer(config, tmp_path / "two", dtype=None, device=torch.device("meta"))
    assert (model.dtype, model.config.clamp_attention) == (torch.float16, True)
    assert "float16 instead of the config's bfloat16" in caplog.text


def test_a_side_file_of_other_weights_is_noticed(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "other")
    save_file({"blocks.7.other.weight": torch.zeros(1)}, folder / hub.SIDE_FILE)
    with pytest.raises(ValueError, match="but the model has no blocks.7.other.weight"):
        SanaPipeline.from_folder(folder, OURS, device="cpu")
    (folder / hub.SIDE_FILE).write_bytes(b"cut")
    with pytest.raises(
        ValueError, match=rf"{hub.SIDE_FILE}: truncated or corrupt \(3 bytes\): fetch it again"
    ):
        SanaPipeline.from_folder(folder, OURS, device="cpu")


@pytest.mark.parametrize("word", ["--train.seed=1", "train.train_batch_size=2", "--model.cfg_scale=9"])
def test_a_key_of_training_is_no_setting_of_a_picture(word):
    with pytest.raises(ValueError, match="acts in training alone"):
        loading.find_config(None, None, [word])
