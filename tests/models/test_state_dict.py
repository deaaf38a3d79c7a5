"""Reading, renaming and loading weights: strict, in one line when it fails."""

import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sana.models.state_dict import (
    from_diffusers,
    load_into,
    load_transformer_state,
    save_transformer,
    to_diffusers,
)
from tests.models.twin import SMALL, build, build_twin

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
    del theirs["transformer_blocks.1.attn1.to_k.weight"]
    with pytest.raises(ValueError, match="blocks.1.attn.qkv.weight needs 3 tensors.*which has 2"):
        from_diffusers(theirs)


def write(folder, kind, state):
    """A checkpoint file of each kind that is read."""
    if kind == "wrapped":
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


@pytest.mark.parametrize("kind", ["wrapped", "bare", "legacy", "safetensors", "diffusers"])
def test_every_kind_of_file_loads_into_a_model(kind, state, tmp_path):
    loaded = load_transformer_state(write(tmp_path, kind, state))
    expected = {key: value for key, value in state.items() if kind != "diffusers" or key != NULL_CAPTION}
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
    for length in range(0, len(content), 3):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated") as caught:
            load_transformer_state(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_saved_weights_load_back(state, tmp_path):
    file = save_transformer(state, tmp_path / "model.safetensors", name="SanaMS_X", dtype=torch.float16)
    assert_same(load_transformer_state(file), {key: value.half() for key, value in state.items()})
    with safe_open(file, "pt") as handle:
        assert handle.metadata() == {"architecture": "SanaMS_X", "format": "pt"}


class Payload:
    """A class of ours: reading it would run code of the file's choice."""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.pth", {"state_dict": Payload()}, "corrupt, or not only tensors"),
        ("model.pth", [torch.zeros(1)], "holds a list, not a state dict"),
        ("model.pth", {"state_dict": [1]}, "holds a dict, not a state dict"),
        ("model.pth", {"epoch": 3, "weight": torch.zeros(1)}, "not a state dict: epoch no tensor"),
        ("model.pth", {}, "it is empty"),
        ("model.ckpt", {}, "not a checkpoint file; expected one that ends in .pth or .safetensors"),
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
    with pytest.raises(ValueError, match="not a checkpoint file"):
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
        "logvar_linear.weight": torch.zeros(1, 64),
        NULL_CAPTION: torch.zeros(300, 2304),
    }
    with pytest.raises(ValueError) as caught:
        load_into(fresh, wrong)
    message = str(caught.value)
    assert "lacks t_block.1.bias" in message
    assert "model has no logvar_linear.weight" in message
    assert f"{NULL_CAPTION} is (300, 2304) in the checkpoint, (9, 24) in the model" in message
    assert_same(fresh.state_dict(), before)


def test_many_problems_stay_one_readable_line(state):
    with pytest.raises(ValueError, match=r"the model has no blocks.0.attn.k_norm.weight, .* and 3 more$"):
        load_into(build(), state)
