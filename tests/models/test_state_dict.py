"""Reading, renaming and loading weights: strict, in one line when it fails."""

import json
import logging
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file

from sana.models.state_dict import (
    from_diffusers,
    load_into,
    load_transformer_state,
    save_transformer,
    to_diffusers,
)
from tests.models.twin import SMALL, build, build_twin, make_generic

NORMS = {"qk_norm": True, "cross_norm": True}
NULL_CAPTION = "y_embedder.y_embedding"


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.fixture(scope="module")
def model():
    return build(**NORMS)


@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()


def test_renaming_there_and_back_is_bit_identical(model, state):
    theirs = to_diffusers(state)
    assert theirs.keys() == build_twin(model).state_dict().keys()
    assert_same(from_diffusers(theirs), {key: value for key, value in state.items() if key != NULL_CAPTION})
    assert_same(to_diffusers(from_diffusers(theirs)), theirs)


def test_rows_of_fused_matrices_keep_their_order(state):
    theirs = to_diffusers(state)
    dim = SMALL["hidden_size"]
    for row, name in enumerate(("to_q", "to_k", "to_v")):
        rows = state["blocks.1.attn.qkv.weight"][row * dim : (row + 1) * dim]
        assert torch.equal(theirs[f"transformer_blocks.1.attn1.{name}.weight"], rows)
    for row, name in enumerate(("to_k", "to_v")):
        rows = state["blocks.0.cross_attn.kv_linear.bias"][row * dim : (row + 1) * dim]
        assert torch.equal(theirs[f"transformer_blocks.0.attn2.{name}.bias"], rows)


def test_unknown_and_incomplete_names_are_refused(state):
    with pytest.raises(ValueError, match="no diffusers name for 'blocks.0.attn.rope.weight'"):
        to_diffusers({**state, "blocks.0.attn.rope.weight": torch.zeros(1)})
    theirs = to_diffusers(state)
    with pytest.raises(ValueError, match="no published name for 'time_embed.guidance.weight'"):
        from_diffusers({**theirs, "time_embed.guidance.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no diffusers name for 'cfg_embedder.mlp.0.bias'"):
        to_diffusers({**state, "cfg_embedder.mlp.0.bias": torch.zeros(1)}, sprint=False)
    del theirs["transformer_blocks.1.attn1.to_k.weight"]
    with pytest.raises(ValueError, match="blocks.1.attn.qkv.weight needs 3 tensors.*which has 2"):
        from_diffusers(theirs)


def test_names_of_sprint_are_those_of_diffusers():
    """Its time embedding has other names there than that of the other models; its own head of the loss has none."""
    model = build(cfg_embed=True, **NORMS)
    twin = SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=32, num_layers=2,
        num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64, caption_channels=24,
        sample_size=4, qk_norm="rms_norm_across_heads", guidance_embeds=True,
    )  # fmt: skip
    theirs = make_generic(twin, seed=3).state_dict()
    ours = from_diffusers(theirs)
    assert ours.keys() == model.state_dict().keys() - {NULL_CAPTION}
    assert_same(to_diffusers(ours), theirs)
    head = {"logvar_linear.weight": torch.ones(1, 64), "logvar_linear.bias": torch.ones(1)}
    assert_same(to_diffusers({**ours, **head}, sprint=True), theirs)
    assert torch.equal(ours["cfg_embedder.mlp.2.bias"], theirs["time_embed.guidance_embedder.linear_2.bias"])
    assert torch.equal(
        ours["t_embedder.mlp.0.weight"], theirs["time_embed.timestep_embedder.linear_1.weight"]
    )


def write(folder, kind, state):
    """A checkpoint of each kind that is read."""
    folder.mkdir(exist_ok=True)
    if kind == "index":
        write_shards(folder, state)
        return folder / INDEX
    if kind == "transformer-folder":
        write_shards(folder, to_diffusers(state))
        return folder
    if kind == "pipeline-folder":
        (folder / "model_index.json").write_text("{}")
        write(folder / "transformer", "diffusers", state)
        write(folder / "vae", "safetensors", {"decoder.weight": torch.ones(1)})
        return folder
    if kind in (".pt", ".bin"):
        torch.save(state, folder / f"model{kind}")
    elif kind == "wrapped":
        torch.save({"state_dict": state}, folder / "model.pth")
    elif kind == "bare":
        torch.save(state, folder / "model.pth")
    elif kind == "legacy":
        torch.save(state, folder / "model.pth", _use_new_zipfile_serialization=False)
    elif kind == "safetensors":
        save_file(dict(state), folder / "model.safetensors")
    elif kind == "diffusers":
        save_file(to_diffusers(state), folder / "diffusion_pytorch_model.safetensors")
    return next(folder.iterdir())


INDEX = "diffusion_pytorch_model.safetensors.index.json"


def write_shards(folder, state):
    """As diffusers saves a large model: shards of at most some size, and an index of what is where."""
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::3], names[1::3], names[2::3]), start=1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00003.safetensors"
        save_file({name: state[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content))


KINDS = ["wrapped", "bare", "legacy", ".pt", ".bin", "safetensors", "index"]
DIFFUSERS_KINDS = ["diffusers", "transformer-folder", "pipeline-folder"]


@pytest.mark.parametrize("kind", [*KINDS, *DIFFUSERS_KINDS])
def test_every_kind_of_file_loads_into_a_model(kind, state, tmp_path):
    loaded = load_transformer_state(write(tmp_path, kind, state))
    lost = {NULL_CAPTION} if kind in DIFFUSERS_KINDS else set()
    expected = {key: value for key, value in state.items() if key not in lost}
    assert_same(loaded, expected)
    fresh = build(seed=5, **NORMS)
    own = fresh.state_dict()[NULL_CAPTION].clone()
    load_into(fresh, loaded)
    assert_same(fresh.state_dict(), {NULL_CAPTION: own, **expected})


@pytest.mark.parametrize("kind", ["wrapped", "legacy", "safetensors"])
def test_truncated_files_are_one_line(kind, tmp_path):
    """Wherever the file ends: the readers raise nine kinds of errors between them."""
    state = {f"blocks.{i}.weight": torch.full((2, 3), float(i)) for i in range(3)}
    file = write(tmp_path, kind, state)
    content = file.read_bytes()
    for length in range(0, len(content), 11):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError) as caught:
            load_transformer_state(file)
        # Nothing of what the readers say: it tells a user nothing.
        expected = f"{file}: truncated or corrupt ({length:,} bytes): fetch it again"
        cut_name = kind == "legacy" and "refused" in str(
            caught.value
        )  # the name of a class, cut, is of another
        assert str(caught.value) == expected or cut_name


def test_saved_weights_load_back(state, tmp_path):
    file = save_transformer(state, tmp_path / "model.safetensors", name="SanaMS_X", dtype=torch.float16)
    assert_same(load_transformer_state(file), {key: value.half() for key, value in state.items()})
    with safe_open(file, "pt") as handle:
        assert handle.metadata() == {"architecture": "SanaMS_X", "format": "pt"}


class Payload:
    """A class of ours: reading it would run code of the file's choice."""


class Bomb:
    """Unpickled, it makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_does_not_run(zipped, tmp_path):
    file, trace = tmp_path / "model.pth", tmp_path / "trace"
    content = {"state_dict": {"a": torch.zeros(2)}, "extra": Bomb(trace)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="refused, nothing of it was run: beside tensors it holds") as caught:
        load_transformer_state(file)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the trap works
    assert trace.exists()


def test_averaged_weights_of_a_training_checkpoint(tmp_path):
    """As the reference writes it, with the states of all its random generators."""
    checkpoint = {
        "state_dict": {"a": torch.zeros(2)},
        "state_dict_ema": {"a": torch.ones(2)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 3,
        "rng_state": {
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
        },
    }
    torch.save(checkpoint, tmp_path / "a.pth")
    assert torch.equal(load_transformer_state(tmp_path / "a.pth")["a"], torch.zeros(2))
    assert torch.equal(load_transformer_state(tmp_path / "a.pth", ema=True)["a"], torch.ones(2))
    torch.save({"state_dict": checkpoint["state_dict"]}, tmp_path / "b.pth")
    save_file(checkpoint["state_dict"], tmp_path / "c.safetensors")
    for name in ("b.pth", "c.safetensors"):
        with pytest.raises(ValueError, match=f"{name}: holds no averaged weights"):
            load_transformer_state(tmp_path / name, ema=True)
    folder = tmp_path / "epoch_1_step_300"  # as a training writes it today
    folder.mkdir()
    save_file(checkpoint["state_dict"], folder / "model.safetensors")
    save_file(checkpoint["state_dict_ema"], folder / "ema.safetensors")
    for path in (folder, folder / "model.safetensors"):
        assert torch.equal(load_transformer_state(path)["a"], torch.zeros(2))
        assert torch.equal(load_transformer_state(path, ema=True)["a"], torch.ones(2))


def test_broken_shards_are_one_line(state, tmp_path):
    index = write(tmp_path, "index", state)
    second = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    content = second.read_bytes()

    def fails(message):
        for path in (index, tmp_path):
            with pytest.raises(ValueError, match=message) as caught:
                load_transformer_state(path)
            assert "\n" not in str(caught.value)

    save_file({"other": torch.zeros(1)}, second)
    fails("its shards lack .* more")
    second.write_bytes(content[:-10])
    fails("00002-of-00003.safetensors: truncated or corrupt")
    second.unlink()
    fails(f"1 of its 3 shards missing: {re.escape(second.name)}")


def test_what_is_not_supported_or_not_needed(state, tmp_path):
    save_file({**state, "controlnet.0.before_proj.weight": torch.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(
        ValueError, match="c.safetensors: a ControlNet checkpoint; ControlNet is not supported"
    ):
        load_transformer_state(tmp_path / "c.safetensors")
    head = {"logvar_linear.weight": torch.zeros(1, 64), "logvar_linear.bias": torch.zeros(1)}
    save_file({**state, **head}, tmp_path / "sprint.safetensors")
    loaded = load_transformer_state(tmp_path / "sprint.safetensors")  # for conversions; no model has it
    assert_same(loaded, state | head)
    fresh = build(seed=5, **NORMS)
    load_into(fresh, loaded)
    assert_same(fresh.state_dict(), state)


def own_memory() -> int:
    """Bytes of this process that are no view of a file."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("kind", ["wrapped", "index"])
def test_a_file_is_mapped_not_copied(kind, tmp_path):
    """Loading needs the memory of the model, not that of the file beside it."""
    size = 2**24  # 64 MiB in float32
    file = write(tmp_path, kind, {name: torch.ones(size // 4) for name in "abcd"})
    before = own_memory()
    state = load_transformer_state(file)
    total = sum(float(tensor.sum()) for tensor in state.values())  # touch every page
    assert total == size
    assert own_memory() - before < size  # a quarter of the file's bytes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.pth", {"state_dict": Payload()}, r"refused, nothing of it was run: .* holds [\w.]*Payload"),
        ("model.pth", [torch.zeros(1)], "holds a list, not a state dict"),
        ("model.pth", {"state_dict": [1]}, "holds a dict, not a state dict"),
        ("model.pth", {"epoch": 3, "weight": torch.zeros(1)}, "not a state dict: epoch no tensor"),
        ("model.pth", {}, "it is empty"),
        (
            "model.ckpt",
            {},
            "not a checkpoint file; expected one that ends in .pth, .pt, .bin, .safetensors, or",
        ),
    ],
)
def test_other_content_is_refused(name, content, message, tmp_path):
    torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        load_transformer_state(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_garbage_folders_and_absent_files_are_refused(tmp_path):
    for name in ("model.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456789\n"
        )
        with pytest.raises(ValueError, match="corrupt"):
            load_transformer_state(tmp_path / name)
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ValueError, match="no weights in it"):
        load_transformer_state(tmp_path / "folder.pth")
    with pytest.raises(ValueError, match="absent.pth"):
        load_transformer_state(tmp_path / "absent.pth")


def test_published_position_table_is_ignored(model, state):
    fresh = build(seed=5, **NORMS)
    load_into(fresh, {**state, "pos_embed": torch.zeros(1, 1024, 64)})
    assert_same(fresh.state_dict(), state)


def test_absent_null_caption_is_kept_and_logged(state, caplog):
    fresh = build(seed=5, **NORMS)
    own = fresh.state_dict()[NULL_CAPTION].clone()
    with caplog.at_level(logging.INFO, logger="sana"):
        load_into(fresh, {key: value for key, value in state.items() if key != NULL_CAPTION})
    assert torch.equal(fresh.state_dict()[NULL_CAPTION], own)
    assert f"no {NULL_CAPTION}" in caplog.text


def test_half_precision_files_load_into_float32(state):
    fresh = build(seed=5, **NORMS)
    load_into(fresh, {key: value.half() for key, value in state.items()})
    assert_same(fresh.state_dict(), {key: value.half().float() for key, value in state.items()})


def test_load_is_strict_and_leaves_the_model_alone(state):
    fresh = build(seed=5, **NORMS)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    wrong = {
        **{key: value for key, value in state.items() if key != "t_block.1.bias"},
        "other_head.weight": torch.zeros(1, 64),
        NULL_CAPTION: torch.zeros(300, 2304),
    }
    with pytest.raises(ValueError) as caught:
        load_into(fresh, wrong)
    message = str(caught.value)
    assert "lacks t_block.1.bias" in message
    assert "model has no other_head.weight" in message
    assert f"{NULL_CAPTION} is (300, 2304), in the model (9, 24)" in message
    assert_same(fresh.state_dict(), before)


def test_many_problems_stay_one_readable_line(state):
    with pytest.raises(
        ValueError, match=r"the model has no blocks.0.attn.k_norm.weight, .* and 5 more$"
    ) as caught:
        load_into(build(), state)
    assert len(str(caught.value)) < 200
    wrong = {f"a.{'x' * 30}.{i}": torch.zeros(1) for i in range(40)}  # every kind of mistake at once
    wrong |= {key: torch.zeros(9, 9, 9) for key in state if "norm" in key}
    with pytest.raises(
        ValueError, match=r"it lacks \S+ and \d+ more; the model has no \S+ and 39 more; "
    ) as caught:
        load_into(build(**NORMS), wrong)
    assert len(str(caught.value)) < 300
