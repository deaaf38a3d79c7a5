"""The ComfyUI nodes by their contract, and their pictures by `SanaPipeline`'s. No ComfyUI is needed."""

import importlib.util
import inspect
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sana.pipeline import SanaPipeline
from sana.utils.hub import ROOT
from scripts import convert_checkpoint
from tests.factories import make_transformer, write_model
from tests.numerics import assert_close

FOLDER = ROOT / "integrations/comfyui"
NODES = ("SanaPipelineLoader", "SanaPipelineTextEncode", "SanaPipelineSampler", "SanaPipelineDecode")
# What other extensions for Sana have taken; of two nodes or wires of one name ComfyUI knows the later one only.
TAKEN = {"SanaCheckpointLoader", "SanaTextEncode", "SanaDiffusionLoader", "SANA_MODEL"}
SETTINGS = {"seed": 7, "steps": 2, "cfg": 3.0, "pag": 2.0, "width": 96, "height": 80, "batch_size": 2}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """The nodes as ComfyUI imports them: a link in its folder of nodes, under a name that is a path."""
    link = tmp_path_factory.mktemp("custom_nodes") / "sana nodes"
    link.symlink_to(FOLDER, target_is_directory=True)
    name = str(link).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, link / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(config_path):
    return SanaPipeline(config_path)


@pytest.fixture(scope="module")
def checkpoints(config_path):
    """The small model in the three forms; a .pth has its config beside it."""
    source = config_path.parent / "transformer.safetensors"
    torch.save({"state_dict": load_file(source)}, source.with_suffix(".pth"))
    for target in (config_path.parent / "single.safetensors", config_path.parent / "folder"):
        arguments = [str(source), str(target), f"--config={config_path}"]
        convert_checkpoint.run(*convert_checkpoint.make_parser().parse_known_args(arguments))
    return config_path.parent


class SaveImage:
    """By the contract of the node that ComfyUI has for it; gives back what it would write."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "save_images", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})}}

    def save_images(self, images, filename_prefix):
        return images


def execute(workflow, classes):
    """What the output nodes of a workflow give: inputs are checked as ComfyUI checks them, each node runs once."""
    results = {}

    def run(key):
        if key in results:
            return results[key]
        node = workflow[key]
        kind = classes[node["class_type"]]
        types = kind.INPUT_TYPES()
        declared = types["required"] | types.get("optional", {})
        assert types["required"].keys() <= node["inputs"].keys() <= declared.keys()
        arguments = {}
        for name, value in node["inputs"].items():
            wanted, widget = (*declared[name], {})[:2]
            if isinstance(value, list):
                source, slot = value
                assert classes[workflow[source]["class_type"]].RETURN_TYPES[slot] == wanted
                value = run(source)[slot]
            elif isinstance(wanted, list):
                assert value in wanted
            else:
                value = {"INT": int, "FLOAT": float, "STRING": str}[wanted](value)
                assert wanted == "STRING" or widget["min"] <= value <= widget["max"]
            arguments[name] = value
        results[key] = getattr(kind(), kind.FUNCTION)(**arguments)
        return results[key]

    with torch.inference_mode():  # as ComfyUI has it
        return [
            run(key) for key, node in workflow.items() if hasattr(classes[node["class_type"]], "OUTPUT_NODE")
        ]


def written(images):
    """The pictures as ComfyUI's node writes them: cut, not rounded, to 8 bits."""
    assert (
        images.dtype == torch.float32 and images.is_contiguous() and images.min() >= 0 and images.max() <= 1
    )
    return [np.clip(255.0 * image.numpy(), 0, 255).astype(np.uint8) for image in images]


def assert_same_pictures(images, pictures):
    """To the bit those of the pipeline, which are not empty."""
    assert len(images) == len(pictures) and images.std() > 0.01
    for ours, picture in zip(written(images), pictures, strict=True):
        assert np.array_equal(ours, np.asarray(picture))


def draw(nodes, model, prompt, negative_prompt="", **settings):
    """The images of the nodes behind a loader."""
    (conditioning,) = nodes.SanaPipelineTextEncode().encode(model, prompt, negative_prompt)
    (latents,) = nodes.SanaPipelineSampler().sample(
        conditioning, **(SETTINGS | {"sampler": "auto"} | settings)
    )
    return nodes.SanaPipelineDecode().decode(latents)[0]


@pytest.mark.parametrize("name", NODES)
def test_contract(nodes, name):
    """What ComfyUI relies on: it calls FUNCTION with the declared inputs by name, and takes a tuple."""
    kind = nodes.NODE_CLASS_MAPPINGS[name]
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.keys() == nodes.NODE_CLASS_MAPPINGS.keys() == set(NODES)
    assert kind.CATEGORY == "Sana" and kind.DESCRIPTION
    assert not {name, *kind.RETURN_TYPES} & TAKEN
    assert isinstance(kind.RETURN_TYPES, tuple) and len(kind.RETURN_NAMES) == len(kind.RETURN_TYPES)
    types = kind.INPUT_TYPES()
    inputs = types["required"] | types.get("optional", {})
    json.dumps(types)  # the interface gets them so
    parameters = dict(inspect.signature(getattr(kind, kind.FUNCTION)).parameters)
    del parameters["self"]
    assert list(parameters) == list(inputs), "the order of the widgets is that of the arguments"
    for key, (wanted, widget) in inputs.items():
        usual = wanted[0] if isinstance(wanted, list) else widget.get("default")
        left_out = parameters[key].default
        assert left_out == (usual if key in types.get("optional", {}) else inspect.Parameter.empty)
        if wanted in ("INT", "FLOAT"):
            assert widget["min"] <= usual <= widget["max"]
            assert isinstance(usual, int) == (wanted == "INT")


def test_usual_values_are_those_of_the_pipeline(nodes):
    inputs = nodes.SanaPipelineSampler.INPUT_TYPES()["required"]
    parameters = inspect.signature(SanaPipeline.__call__).parameters
    assert inputs["cfg"][1]["default"] == parameters["guidance_scale"].default
    assert inputs["pag"][1]["default"] == parameters["pag_guidance_scale"].default


def test_workflow_gives_the_image_of_the_pipeline(nodes):
    """The shipped workflow, with the shipped model; only shorter."""
    workflow = json.loads((FOLDER / "workflow.json").read_text(encoding="utf-8"))
    workflow["3"]["inputs"] |= {"steps": 3, "seed": 11}
    (images,) = execute(workflow, nodes.NODE_CLASS_MAPPINGS | {"SaveImage": SaveImage})
    assert images.shape == (1, 256, 256, 3)
    pictures = SanaPipeline()("three blue stars", num_inference_steps=3, seed=11, output_type="pil")
    assert_same_pictures(images, pictures)


@pytest.mark.parametrize("name", ["transformer.pth", "single.safetensors", "folder"])
def test_every_format_draws_the_same(nodes, checkpoints, pipeline, name):
    # The folder has a config of its own; all settings at once, and a size that is no bucket.
    (model,) = nodes.SanaPipelineLoader().load(str(checkpoints / name))
    images = draw(nodes, model, "a red circle", "a star")
    settings = {"pag_guidance_scale": 2.0, "num_images_per_prompt": 2, "seed": 7, "output_type": "pil"}
    pictures = pipeline("a red circle", 80, 96, "a star", 2, 3.0, **settings)
    assert images.shape == (2, 80, 96, 3) and not torch.equal(*images)
    assert_same_pictures(images, pictures)


def test_solver_and_size_in_the_prompt(nodes, pipeline):
    images = draw(nodes, pipeline, "a red circle --hw 64:128", sampler="flow_euler", batch_size=1)
    settings = {"pag_guidance_scale": 2.0, "seed": 7, "sampler": "flow_euler", "output_type": "pil"}
    pictures = pipeline("a red circle", 64, 128, "", 2, 3.0, **settings)
    assert images.shape == (1, 64, 128, 3)
    assert_same_pictures(images, pictures)


@pytest.fixture
def sprint(pipeline):
    """A small model that takes the guidance as an input, behind a config that names another sampler."""
    network = make_transformer(qk_norm=True, cross_norm=True, cfg_embed=True, cfg_embed_scale=0.1)
    torch.nn.init.normal_(network.cfg_embedder.mlp[2].weight, std=0.2)  # zero at first
    return SanaPipeline.from_components(pipeline.config, network, pipeline.autoencoder, pipeline.text_encoder)


def test_sprint(nodes, sprint):
    images = draw(nodes, sprint, "a red circle", sampler="scm", steps=0, pag=1.0)
    settings = {"num_images_per_prompt": 2, "seed": 7, "sampler": "scm", "output_type": "pil"}
    assert_same_pictures(images, sprint("a red circle", 80, 96, guidance_scale=3.0, **settings))
    with pytest.raises(ValueError, match="no unconditional branch"):
        draw(nodes, sprint, "a red circle", "a star", sampler="scm", pag=1.0)


def test_zero_is_the_models_own(nodes, pipeline):
    steps = []
    (conditioning,) = nodes.SanaPipelineTextEncode().encode(pipeline, "a star")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "encode", None)  # the sampler has the features, and encodes nothing
        patch.setattr(nodes, "_callback", lambda: lambda step, total, x, x0: steps.append(total))
        settings = SETTINGS | {"steps": 0, "width": 0, "height": 0, "pag": 1.0, "sampler": "auto"}
        (latents,) = nodes.SanaPipelineSampler().sample(conditioning, **settings)
    assert latents.size == (256, 256) and steps == [20] * 20


def test_adapter(nodes, checkpoints, pipeline, tmp_path):
    """A LoRA of half the weight; without one the weights are those of the file."""
    generator = torch.Generator().manual_seed(0)
    name = "transformer.blocks.0.attn.proj.lora_{}.weight"
    down, up = (torch.randn(shape, generator=generator) for shape in ((4, 224), (224, 4)))
    save_file({name.format("A"): down, name.format("B"): up}, tmp_path / "lora.safetensors")
    source = str(checkpoints / "single.safetensors")
    (model,) = nodes.SanaPipelineLoader().load(
        source, lora=str(tmp_path / "lora.safetensors"), lora_weight=0.5
    )
    before, after = (each.transformer.blocks[0].attn.proj.weight for each in (pipeline, model))
    assert_close("weight", after - before, 0.5 * up @ down, rel_rms=1e-5)
    assert [weight for _, weight in model.loras] == [0.5]


def test_model_folders(nodes, checkpoints, monkeypatch, tmp_path):
    """A name is looked for in ComfyUI's folders; elsewhere it is what the library makes of it."""
    asked = []

    def get_folder_paths(kind):
        asked.append(kind)
        return [str(tmp_path), str(checkpoints)] if kind == "checkpoints" else []

    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace(get_folder_paths=get_folder_paths))
    (model,) = nodes.SanaPipelineLoader().load(" single.safetensors ")
    assert model.weights == checkpoints / "single.safetensors"
    asked.clear()
    assert nodes._find("owner/name") == "owner/name" and nodes._find("") is None
    assert asked == ["diffusion_models", "checkpoints", "diffusers", "loras"]


def test_progress_and_cancel(nodes, pipeline, monkeypatch):
    class Interrupted(Exception):
        pass

    seen, cancel_at = [], None

    class ProgressBar:
        def __init__(self, total):
            seen.append(f"bar of {total}")

        def update_absolute(self, value, total=None, preview=None):
            seen.append((value, total))

    def throw_exception_if_processing_interrupted():
        if cancel_at is not None and len(seen) > cancel_at:
            raise Interrupted

    management = SimpleNamespace(
        throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted
    )
    monkeypatch.setitem(sys.modules, "comfy.utils", SimpleNamespace(ProgressBar=ProgressBar))
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    draw(nodes, pipeline, "a star", steps=3)
    assert seen == ["bar of 3", (1, 3), (2, 3), (3, 3)]
    seen.clear()
    cancel_at = 1
    with pytest.raises(Interrupted):
        draw(nodes, pipeline, "a star", steps=3)
    assert seen == ["bar of 3", (1, 3)]


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (lambda nodes, model: nodes.SanaPipelineLoader().load("no/such.pth"), "no/such.pth"),
        (lambda nodes, model: nodes.SanaPipelineLoader().load("", quantize="transformer=int3"), "int3"),
        (
            lambda nodes, model: nodes.SanaPipelineTextEncode().encode(model, "a --ar 1:2 b --ar 2:1"),
            "one is allowed",
        ),
        (lambda nodes, model: draw(nodes, model, "a star", sampler="scm"), "scm"),
        (lambda nodes, model: draw(nodes, model, "a star", steps=1), "at least 2 steps"),
    ],
    ids=["checkpoint", "quantize", "prompt", "sampler", "steps"],
)
def test_wrong_input_is_one_line(nodes, pipeline, attempt, words):
    with pytest.raises(ValueError, match=words) as raised:
        attempt(nodes, pipeline)
    assert "\n" not in str(raised.value)


def test_import_is_light_and_needs_neither_comfyui_nor_this_folder(tmp_path):
    """In a bare process elsewhere; ComfyUI imports all nodes at its start."""
    (tmp_path / "nodes").symlink_to(FOLDER, target_is_directory=True)
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('nodes', 'nodes/__init__.py');"
        "m = sys.modules['nodes'] = u.module_from_spec(s); s.loader.exec_module(m);"
        "print(*m.NODE_CLASS_MAPPINGS, *{'comfy', 'folder_paths', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.split() == list(NODES), result.stderr
