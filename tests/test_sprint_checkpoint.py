"""A Sprint checkpoint as a user holds it: converted, drawn by diffusers and here, verified; with and without its config."""

import json

import pytest
import torch
import yaml
from diffusers import SanaSprintPipeline

from sana.loading import config_for
from sana.models.transformer import TransformerConfig
from sana.models.zoo import TRANSFORMERS
from sana.pipeline import SanaPipeline
from sana.utils import hub
from scripts import convert_checkpoint, inference, verify
from tests.factories import TEXT_LENGTH, TEXT_WIDTH, make_transformer, model_config, write_text_encoder
from tests.models.twin import make_generic
from tests.numerics import assert_close

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"  # diffusers' scheduler under numpy 2
)

NAME = "SanaMSCM_600M_P1_D28"
SMALL = TransformerConfig(
    depth=2, hidden_size=64, num_heads=2, qk_norm=True, cross_norm=True, cfg_embed=True,
    timestep_norm_scale_factor=1000.0,
)  # fmt: skip
SIDE = 8  # latents a side at 256 pixels
PROMPTS = ["a red circle", "three blue stars and two green squares"]


@pytest.fixture(scope="module", autouse=True)
def small():
    """The published name stands for two narrow blocks: what a config says of the network is as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRANSFORMERS, NAME, SMALL)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a .pth with all that a published one holds, its config and the other parts."""
    folder = tmp_path_factory.mktemp("sprint")
    write_text_encoder(folder / "text_encoder")
    state = make_generic(make_transformer(NAME)).state_dict()
    generator = torch.Generator().manual_seed(1)
    rest = {"pos_embed": (1, SIDE * SIDE, 64), "logvar_linear.weight": (1, 64), "logvar_linear.bias": (1,)}
    state |= {key: torch.randn(shape, generator=generator) for key, shape in rest.items()}
    torch.save({"state_dict": state}, folder / "sprint.pth")
    settings = model_config(folder)
    settings["model"] |= {"model": NAME, "qk_norm": True, "cross_norm": True}
    settings["model"] |= {"cfg_embed": True, "cfg_embed_scale": 0.1, "load_from": None}
    settings["vae"]["vae_pretrained"] = (
        "asset/sana_tiny/autoencoder"  # trained: the check of its round trip passes
    )
    settings["scheduler"] = {"vis_sampler": "scm", "timestep_norm_scale_factor": 1000.0}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def exported(model):
    """That model as a folder of diffusers, by the converter."""
    command(convert_checkpoint, model / "sprint.pth", model / "pipeline")
    return model / "pipeline"


def command(script, *words):
    parser = script.make_parser()
    script.run(*parser.parse_known_args([str(word) for word in words]))


def read(file):
    return torch.load(file, weights_only=True)["state_dict"]


def test_there_and_back_nothing_is_lost(model, exported, tmp_path):
    command(convert_checkpoint, exported, tmp_path / "back.pth")
    before, after = read(model / "sprint.pth"), read(tmp_path / "back.pth")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    command(convert_checkpoint, exported, tmp_path / "one.safetensors")
    command(convert_checkpoint, tmp_path / "one.safetensors", tmp_path / "again.pth")
    assert all(torch.equal(value, before[key]) for key, value in read(tmp_path / "again.pth").items())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_diffusers_ends_in_our_latents(exported, steps):
    """Our export, as it is, in diffusers' pipeline. Its eps of the cross-attention's norms is another: measured 3e-6."""
    theirs = SanaSprintPipeline.from_pretrained(exported)
    theirs.set_progress_bar_config(disable=True)
    ours = SanaPipeline.from_folder(exported, device="cpu")
    text = ours.text_encoder.encode(PROMPTS)
    noise = torch.randn(len(PROMPTS), 32, 3, 2, generator=torch.Generator().manual_seed(7))
    reference = theirs(
        prompt=None,
        prompt_embeds=text.embeds,
        prompt_attention_mask=text.mask.float(),
        latents=noise,
        # What scm draws after given latents is that of seed 0.
        generator=_generators(len(PROMPTS), noise.shape),
        height=96,
        width=64,
        num_inference_steps=steps,
        intermediate_timesteps=1.2 if steps == 2 else None,
        max_timesteps=1.5,
        guidance_scale=4.5,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    settings = {"use_resolution_binning": False, "latents": noise, "output_type": "latent"}
    settings |= {"max_timesteps": 1.5, "intermediate_timesteps": 1.2 if steps == 2 else None}
    latents = ours(PROMPTS, 96, 64, num_inference_steps=steps, **settings)
    assert_close("latents", latents, reference, rel_rms=1e-5)
    other = ours(PROMPTS, 96, 64, num_inference_steps=steps, **settings | {"max_timesteps": 1.55})
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close("another angle", other, reference, rel_rms=1e-3)


def _generators(count, shape):
    """The generators of seed 0 after each has given the first noise."""
    from sana.pipeline import image_seed

    generators = [torch.Generator().manual_seed(image_seed(0, index, 0)) for index in range(count)]
    for generator in generators:
        torch.randn(1, *shape[1:], generator=generator)
    return generators


def test_angles_of_the_sampler(exported):
    pipeline = SanaPipeline.from_folder(exported, device="cpu")
    settings = {
        "height": 64,
        "width": 64,
        "use_resolution_binning": False,
        "output_type": "latent",
        "seed": 1,
    }
    usual = pipeline("a red circle", **settings)
    assert torch.equal(pipeline("a red circle", timesteps=[1.5708, 1.3, 0], **settings), usual)
    assert not torch.equal(pipeline("a red circle", intermediate_timesteps=1.0, **settings), usual)
    three = pipeline("a red circle", num_inference_steps=3, **settings)
    assert torch.equal(pipeline("a red circle", timesteps=[1.5708, 1.0472, 0.5236, 0.0], **settings), three)
    for wrong, message in (
        (
            {"timesteps": [1.5, 0], "num_inference_steps": 2},
            "all 2 angles of 1 steps: leave out num_inference",
        ),
        ({"timesteps": [1.5, 0], "max_timesteps": 1.5}, "leave out"),
        ({"timesteps": [1.0, 1.2, 0.0]}, "must decrease strictly"),
        ({"timesteps": []}, "must decrease strictly"),
        ({"max_timesteps": 2.0}, "at most 1.5708"),
        ({"intermediate_timesteps": 1.0, "num_inference_steps": 3}, "needs two steps, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline("a red circle", **wrong, **settings)


def test_angles_on_the_command_line(exported, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = (f"--model_path={exported}", "--prompt=a", "--height=64", "--width=64", "--device=cpu")
    seen = {}
    for name, flags in {
        "usual": (),
        "middle": ("--max_timesteps=1.57", "--intermediate_timesteps=1.0"),
        "all": ("--timesteps=[1.5708,1.0,0.5,0]",),
    }.items():
        command(inference, *common, *flags)
        seen[name] = capsys.readouterr().out.strip()
    assert "maxT1.57_midT1.0" in seen["middle"] and "_step3_" in seen["all"]
    contents = {name: (tmp_path / path).read_bytes() for name, path in seen.items()}
    assert len(set(contents.values())) == 3


@pytest.mark.parametrize("form", ["pth", "folder"])
def test_verify_without_a_config(model, exported, form, tmp_path, capsys):
    """The .pth finds config.yaml beside it; the folder has its own."""
    weights = exported if form == "folder" else model / "sprint.pth"
    command(verify, "--model_path", weights, "--device=cpu", "--dtype=fp32", "--goldens", tmp_path)
    shown = capsys.readouterr().out
    assert "10 PASS, 0 FAIL, 4 SKIP" in shown, shown
    assert "transformer   diffusers     float32 cpu       PASS" in shown


def test_verify_a_folder_of_diffusers_alone(exported, tmp_path, capsys):
    """Without config.yaml and the side file: what json files and tensors say; the length of captions they do not."""
    (folder := tmp_path / "plain").mkdir()
    for part in exported.iterdir():
        if part.name not in ("config.yaml", hub.SIDE_FILE):
            (folder / part.name).symlink_to(part)
    words = (f"--text_encoder.model_max_length={TEXT_LENGTH}", "--text_encoder.chi_prompt=[]")
    command(verify, "--model_path", folder, "--device=cpu", "--dtype=fp32", "--goldens", tmp_path, *words)
    assert " 0 FAIL" in capsys.readouterr().out
    config = config_for(folder, words)
    assert (config.model.model, config.scheduler.vis_sampler, config.model.cfg_embed) == (NAME, "scm", True)
    assert (config.model.cfg_embed_scale, config.scheduler.timestep_norm_scale_factor) == (0.1, 1000.0)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "SanaSprintPipeline"
    assert config.text_encoder.caption_channels == TEXT_WIDTH
