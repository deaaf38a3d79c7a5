"""Muon against singular value decomposition and AdamW; which parameters are matrices; several processes as one."""

import math
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from sana.config import TrainConfig
from sana.training.muon import Muon, count_matrices, orthogonal
from sana.training.optim import build_optimizer
from tests.factories import make_transformer
from tests.ports import free_port

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99)}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_singular_vectors_stay_and_singular_values_become_one(shape):
    matrices = draw(3, *shape)
    found = orthogonal(matrices).double()
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    inside = left.mT @ found @ right.mT
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    large = values > 0.1 * values[:, :1]  # five iterations do not bring up those that are all but zero
    assert diagonal[large].min() > 0.6 and diagonal.max() < 1.3
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 0.05  # bfloat16
    assert values.max() / values.min() > 1.5  # they were not one before


def test_a_matrix_moves_along_its_orthogonal_nesterov_momentum():
    start, gradients = draw(8, 4), [draw(8, 4, seed=seed) for seed in (1, 2, 3)]
    weight = nn.Parameter(start[:, :, None, None].clone())  # a 1x1 convolution is a matrix
    optimizer = Muon([{"params": [weight], "matrices": 1}], momentum=0.8, **SETTINGS)
    expected, momentum = start.clone(), torch.zeros_like(start)
    for gradient in gradients:
        weight.grad = gradient[:, :, None, None]
        optimizer.step()
        momentum = 0.8 * momentum + gradient
        direction = orthogonal((gradient + 0.8 * momentum)[None])[0]
        expected = expected * (1 - 1e-2 * 0.1) - 1e-2 * 0.2 * math.sqrt(8) * direction
    assert torch.allclose(weight[:, :, 0, 0], expected, atol=1e-6)


def test_everything_else_moves_as_with_adamw():
    start = draw(6, 4)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    pair = (Muon([{"params": [ours]}], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS))
    for seed in range(3):
        for parameter, optimizer in zip((ours, theirs), pair, strict=True):
            parameter.grad = draw(6, 4, seed=seed)
            optimizer.step()
    assert torch.equal(ours, theirs) and not torch.equal(ours, start)


def test_fused_matrices_move_as_separate_ones():
    parts, gradients = [draw(4, 4, seed=seed) for seed in range(3)], draw(12, 4, seed=9)
    fused = nn.Parameter(torch.cat(parts))
    separate = [nn.Parameter(part.clone()) for part in parts]
    fused.grad = gradients
    for parameter, gradient in zip(separate, gradients.chunk(3), strict=True):
        parameter.grad = gradient.clone()
    Muon([{"params": [fused], "matrices": 3}], **SETTINGS).step()
    Muon([{"params": separate, "matrices": 1}], **SETTINGS).step()
    assert torch.equal(fused, torch.cat(separate))


def test_the_matrices_are_those_of_the_blocks():
    model = make_transformer()
    counts = {name: count_matrices(name, value) for name, value in model.named_parameters()}
    block = {
        name.removeprefix("blocks.0."): n for name, n in counts.items() if name.startswith("blocks.0.") and n
    }
    assert block == {
        "attn.qkv.weight": 3,
        "attn.proj.weight": 1,
        "cross_attn.q_linear.weight": 1,
        "cross_attn.kv_linear.weight": 2,
        "cross_attn.proj.weight": 1,
        "mlp.inverted_conv.conv.weight": 1,
        "mlp.point_conv.conv.weight": 1,
    }
    assert not any(n for name, n in counts.items() if not name.startswith("blocks."))
    train = TrainConfig(auto_lr=None, optimizer={"type": "Muon", "lr": 1e-3}, weight_decay_on="matrices")
    groups = build_optimizer(model, train, 1).param_groups
    assert sum(len(group["params"]) for group in groups) == len(counts)
    for group in groups:
        names = [name for name, value in model.named_parameters() if any(value is p for p in group["params"])]
        assert {counts[name] for name in names} == {group["matrices"]}


def _steps_of(rank: int, world: int, port: int, folder: str) -> None:
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    weights = [
        nn.Parameter(draw(6, 4, seed=seed)) for seed in range(3)
    ]  # one more than two processes can halve
    optimizer = Muon([{"params": weights, "matrices": 1}], **SETTINGS)
    for seed in range(2):
        for i, weight in enumerate(weights):
            weight.grad = draw(6, 4, seed=10 * seed + i)
        optimizer.step()
    torch.save([weight.detach() for weight in weights], Path(folder) / f"{world}_{rank}.pt")
    if world > 1:
        distributed.destroy_process_group()


def test_processes_that_share_the_work_step_as_one(tmp_path):
    _steps_of(0, 1, 0, str(tmp_path))
    multiprocessing.spawn(_steps_of, (2, free_port(), str(tmp_path)), nprocs=2)
    alone, *both = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    for weights in both:
        assert all(torch.equal(one, two) for one, two in zip(alone, weights, strict=True))
