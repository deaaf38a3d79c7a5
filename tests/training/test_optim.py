"""Optimizers, their state and groups, rates and schedules."""

import sys
import types

import pytest
import torch
from torch import nn

from sana.config import ConfigError, TrainConfig
from sana.training.came import CAME, CAME8Bit
from sana.training.optim import (
    Schedule,
    build_optimizer,
    lr_factor,
    optimizer_state,
    restore_optimizer,
    scaled_lr,
)
from tests.factories import make_transformer

CAME_SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99, 0.999), "eps": (1e-30, 1e-16), "weight_decay": 0.1}


def train(**changes) -> TrainConfig:
    return TrainConfig(**({"auto_lr": None} | changes))


def came_reference(weights: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Algorithm 2 of arXiv 2307.02047 on one matrix, or what it is for a vector, in float64; the letters are its own."""
    (b1, b2, b3), (e1, e2), lr, decay = (CAME_SETTINGS[key] for key in ("betas", "eps", "lr", "weight_decay"))
    theta, matrix = weights.double(), weights.ndim == 2
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    shape = tuple(theta.shape) if matrix else (1, 1)
    r, c, big_r, big_c = (torch.zeros(n, dtype=torch.float64) for n in (*shape, *shape))
    for g in (gradient.double() for gradient in gradients):
        square = g**2 + e1
        if matrix:
            r = b2 * r + (1 - b2) * square.mean(1)
            c = b2 * c + (1 - b2) * square.mean(0)
            v = r[:, None] * c[None] / r.mean()
        else:
            v = b2 * v + (1 - b2) * square
        u = g / v.sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        m = b1 * m + (1 - b1) * u
        step = m
        if matrix:
            instability = (u - m) ** 2 + e2
            big_r = b3 * big_r + (1 - b3) * instability.mean(1)
            big_c = b3 * big_c + (1 - b3) * instability.mean(0)
            step = m / (big_r[:, None] * big_c[None] / big_r.mean()).sqrt()
        theta = theta - lr * decay * theta - lr * step
    return theta


def steps(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int, seed: int = 0
) -> list:
    draw, given = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draw) + 0.3
        given.append([parameter.grad.clone() for parameter in parameters])
        optimizer.step()
    return given


def test_came_is_the_paper_s():
    torch.manual_seed(0)
    start = torch.randn(12, 5)
    linear, conv = nn.Parameter(start.clone()), nn.Parameter(start.clone()[:, :, None, None])
    given = steps(CAME([linear], **CAME_SETTINGS), [linear], 20)
    expected = came_reference(start, [gradients[0] for gradients in given])
    assert torch.allclose(linear.double(), expected, rtol=1e-4, atol=1e-5)
    steps(CAME([conv], **CAME_SETTINGS), [conv], 20)  # a 1x1 convolution is a matrix
    assert torch.allclose(conv[:, :, 0, 0], linear, atol=1e-6)
    bias = nn.Parameter(start[:, 0].clone())
    given = steps(CAME([bias], **CAME_SETTINGS), [bias], 20)
    expected = came_reference(start[:, 0], [gradients[0] for gradients in given])
    assert torch.allclose(bias.double(), expected, rtol=1e-4, atol=1e-5)


def test_came_keeps_rows_and_columns_of_matrices_only():
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((6, 4), (6, 4, 1, 1), (6, 1, 3, 3), (6,))]
    optimizer = CAME(parameters, lr=1e-3)
    steps(optimizer, parameters, 1)
    matrix, conv, depthwise, bias = (optimizer.state[parameter] for parameter in parameters)
    names = {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col"}
    assert matrix.keys() == conv.keys() == names | {"step", "exp_avg"}
    assert [matrix[f"exp_avg_sq_{way}"].shape for way in ("row", "col")] == [(6,), (4,)]
    assert depthwise.keys() == bias.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert depthwise["exp_avg_sq"].shape == (6, 1, 3, 3) and conv["exp_avg"].shape == (6, 4, 1, 1)


def test_8_bits_follow_the_32():
    torch.manual_seed(0)
    start = torch.randn(100, 70)
    moved = []
    for kind in (
        lambda p: CAME(p, **CAME_SETTINGS),
        lambda p: CAME8Bit(p, block_size=512, min_8bit_size=6999, **CAME_SETTINGS),
    ):
        parameter = nn.Parameter(start.clone())
        optimizer = kind([parameter])
        steps(optimizer, [parameter], 20)
        moved.append(parameter.detach() - start)
    state = optimizer.state[parameter]
    assert state["exp_avg"].dtype == torch.uint8 and state["exp_avg"].shape == (14, 512)
    error = (moved[1] - moved[0]).square().mean().sqrt() / moved[0].square().mean().sqrt()
    assert 0 < error < 0.02  # measured 0.007
    small = nn.Parameter(torch.ones(10, 10))
    optimizer = CAME8Bit([small], lr=1e-3)
    steps(optimizer, [small], 1)
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "CAMEWrapper", "CAME8BitWrapper", "Muon"])
def test_state_comes_back_by_name(kind):
    settings = {"type": kind, "lr": 1e-2} | ({"momentum": 0.9} if kind == "SGD" else {})
    settings |= {"min_8bit_size": 100} if kind == "CAME8BitWrapper" else {}

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict(
            {"blocks": nn.Sequential(nn.Linear(20, 30), nn.Conv2d(30, 8, 1), nn.Linear(8, 4))}
        )

    one, two = model(), model()
    first, second = (build_optimizer(net, train(optimizer=settings), 1) for net in (one, two))
    steps(first, list(one.parameters()), 3)
    two.load_state_dict(one.state_dict())
    restore_optimizer(two, second, optimizer_state(one, first), kind)
    for net, optimizer in ((one, first), (two, second)):
        steps(optimizer, list(net.parameters()), 3, seed=1)
    assert all(torch.equal(two.state_dict()[name], value) for name, value in one.state_dict().items())


def come_back(state: dict, kind: str, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = build_optimizer(model, train(optimizer={"type": kind, "lr": 1e-2}), 1)
    restore_optimizer(model, optimizer, state, kind)
    return optimizer


def saved(kind: str, model: nn.Module, **more) -> dict:
    optimizer = build_optimizer(model, train(optimizer={"type": kind, "lr": 1e-2, **more}), 1)
    steps(optimizer, list(model.parameters()), 2)
    return optimizer_state(model, optimizer)


def test_a_small_model_s_8_bit_state_comes_back():
    """None of its matrices is large enough for 8 bits; so CAME's own state does, too."""
    model = nn.Linear(4, 3)
    for kind in ("CAME8BitWrapper", "CAMEWrapper"):
        optimizer = come_back(saved(kind, model), "CAME8BitWrapper", model)
        steps(optimizer, list(model.parameters()), 1)
        assert optimizer.state[model.weight]["step"] == 3


@pytest.mark.parametrize(
    "before, now, settings",
    [
        ("AdamW", "SGD", {}),
        ("AdamW", "CAMEWrapper", {}),
        ("SGD", "AdamW", {"momentum": 0.9}),
        ("CAMEWrapper", "AdamW", {}),
        ("CAME8BitWrapper", "CAMEWrapper", {"min_8bit_size": 1}),
        ("Muon", "AdamW", {}),
        ("Muon", "SGD", {}),
        ("AdamW", "Muon", {}),
        ("SGD", "Muon", {"momentum": 0.9}),
    ],
)
def test_the_state_of_another_optimizer_is_refused(before, now, settings):
    model = nn.ModuleDict({"blocks": nn.Linear(4, 3)})
    with pytest.raises(ValueError, match=f"the checkpoint's optimizer is no {now}: .*resume_optimizer=false"):
        come_back(saved(before, model, **settings), now, model)


@pytest.mark.parametrize("field, value", [("exp_avg_sq_row", torch.zeros(3, 4, 1)), ("exp_avg", [{}])])
def test_other_programs_came_is_refused_in_one_line(field, value):
    """came-pytorch keeps a row for each place of a 1x1 kernel; the reference's 8 bits are a list of blocks."""
    model = nn.Conv2d(4, 3, 1)
    state = saved("CAMEWrapper", model)
    state["weight"][field] = value
    with pytest.raises(
        ValueError, match=f"keeps {field} of weight in another form than CAMEWrapper does here"
    ):
        come_back(state, "CAMEWrapper", model)


def test_weight_decay_may_spare_biases_norms_and_tables():
    model = make_transformer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings = {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.1}
    (group,) = build_optimizer(model, train(optimizer=settings), 1).param_groups
    assert group["weight_decay"] == 0.1 and len(group["params"]) == len(names)
    matrices, spared = build_optimizer(
        model, train(optimizer=settings, weight_decay_on="matrices"), 1
    ).param_groups
    assert (matrices["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    without = {names[id(parameter)] for parameter in spared["params"]}
    assert {"blocks.0.scale_shift_table", "final_layer.linear.bias", "attention_y_norm.weight"} <= without
    assert all(name.endswith((".bias", "norm.weight", "scale_shift_table")) for name in without)
    assert len(matrices["params"]) + len(spared["params"]) == len(names)


def test_unavailable_optimizers_are_named(monkeypatch):
    model = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="Lion is not available; one of AdamW, Adam, SGD, CAMEWrapper"):
        build_optimizer(model, train(optimizer={"type": "Lion", "lr": 1e-4}), 1)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="AdamW8bit needs bitsandbytes: pip install bitsandbytes"):
        build_optimizer(model, train(optimizer={"type": "AdamW8bit", "lr": 1e-4}), 1)
    with pytest.raises(ConfigError, match="CAMEWrapper cannot be sharded; with use_fsdp: AdamW, Adam, SGD"):
        build_optimizer(model, train(optimizer={"type": "CAMEWrapper", "lr": 1e-4}, use_fsdp=True), 1)
    with pytest.raises(ConfigError, match="train.optimizer: AdamW: .*block_size"):
        build_optimizer(model, train(optimizer={"type": "AdamW", "lr": 1e-4, "block_size": 1}), 1)


def test_the_library_s_8_bit_adam_is_taken_where_there_is_one(monkeypatch):
    class AdamW8bit(torch.optim.AdamW):
        pass

    library = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    built = build_optimizer(nn.Linear(1, 1), train(optimizer={"type": "AdamW8bit", "lr": 1e-4}), 1)
    assert isinstance(built, AdamW8bit)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", {0: 0.1, 9: 1.0, 50: 1.0, 100: 1.0}),
        ("cosine", {0: 0.1, 9: 1.0, 55: 0.5, 100: 0.0}),
        ("cosine_decay_to_constant", {9: 1.0, 67: 0.1, 100: 0.1}),
    ],
)
def test_schedules(schedule, expected):
    factor = lr_factor(train(lr_schedule=schedule, lr_schedule_args={"num_warmup_steps": 10}), 100)
    for step, value in expected.items():
        assert factor(step) == pytest.approx(value, abs=1e-6), step


def test_decay_ends_at_the_rate_before_auto_lr_raised_it():
    settings = train(
        lr_schedule="cosine_decay_to_constant",
        lr_schedule_args={"num_warmup_steps": 10, "num_decay": 0.5},
        auto_lr={"rule": "sqrt"},
    )
    raised, lowered = (lr_factor(settings, 100, batch_size=size) for size in (1024, 64))
    assert [raised(step) for step in (9, 30, 50, 99)] == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert lowered(60) == pytest.approx(0.1)


def test_the_rate_is_a_function_of_the_step():
    optimizer = torch.optim.SGD(
        [{"params": nn.Parameter(torch.zeros(1)), "lr": 2.0}, {"params": nn.Parameter(torch.zeros(1))}],
        lr=1.0,
    )
    schedule = Schedule(optimizer, lambda step: 0.5**step, start=3)
    assert schedule.set(5) == 0.5 and [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert schedule.set(3) == 2.0 and schedule.set(0) == 2.0


def test_rate_follows_the_batch():
    assert scaled_lr(1e-4, TrainConfig(), 512) == pytest.approx(
        1e-4 * 2**0.5
    )  # sqrt is the published default
    assert scaled_lr(1e-4, train(auto_lr={"rule": "linear"}), 512) == pytest.approx(2e-4)
    assert scaled_lr(1e-4, train(), 512) == 1e-4
