"""Planned memory against that of real computations: bytes of tensors, and the memory of a whole training process."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sana.models import attention
from sana.models.zoo import TRANSFORMERS, build_transformer
from sana.runtime.memory import GIB, Allocations, Component, LikeAutocast, peak_of, table, tensor_bytes
from sana.training.plan import plan
from tests.factories import write_model
from tests.training import micro

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
TWO_BLOCKS = "SanaMS_Two_P1_D2"


def test_a_table_is_aligned():
    parts = [
        Component(name="weights", bytes=3 * GIB, parameters=1234567),
        Component(name="something", note="not here"),
    ]
    lines = table({"kept": parts, "in passing": [Component(name="a", bytes=GIB // 2)]}).splitlines()
    assert lines == [
        "kept         parameters   GiB",
        "  weights     1,234,567  3.00",
        "  something                 ?  not here",
        "in passing",
        "  a                      0.50",
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bytes_count_while_they_live(device):
    x = torch.zeros(256, 1024, device=device)  # 1 MiB, made before
    with Allocations() as made:
        y = x + 1
        z = y.view(-1)[:10]  # shares the memory of y
        assert (made.now, made.peak) == (MIB, MIB)
        w = (x * 2) * 3  # three at once, of which one dies
        assert (made.now, made.peak) == (2 * MIB, 3 * MIB)
        x.add_(1)
        del w
        y = None
        assert made.now == MIB
        del z
    assert (made.now, made.peak) == (0, 3 * MIB)
    assert tensor_bytes([x, x.view(-1), torch.zeros(4, device=device)]) == MIB + 16
    assert peak_of(lambda: (x + 1) + 1) == 2 * MIB


def plain_attention(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def walked(device: str, dtype: torch.dtype | None, recomputed: bool) -> tuple[int, int, int]:
    """(kept for the backward pass, peak of the forward pass, peak) of a small network on one picture, so that casts of weights count."""
    settings = {"depth": 3, "caption_channels": 64, "model_max_length": 40}
    with torch.device(device):
        model = build_transformer("SanaMS_Tiny_P1_D8", gradient_checkpointing=recomputed, **settings)
        tensors = [torch.zeros(1, 32, 8, 8), torch.zeros(1), torch.zeros(1, 40, 64), torch.ones(1, 40)]
    with Allocations() as made:
        if device == "meta":
            network = LikeAutocast(model, dtype)
            prediction = model(*tensors, drop_caption=torch.zeros(1, dtype=torch.bool))
            network.forget()
        else:
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                prediction = model(*tensors, drop_caption=torch.zeros(1, dtype=torch.bool))
        loss = prediction.float().square().mean()
        saved, forward = made.now, made.peak
        loss.backward()
    return saved, forward, made.peak


@pytest.mark.parametrize("recomputed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_walk_on_meta_has_the_bytes_of_the_real_one(dtype, recomputed, monkeypatch):
    """With the attention of a GPU: for a CPU in half precision the model has one of its own."""
    monkeypatch.setattr(attention, "softmax_attention", plain_attention)
    real, planned = (walked(device, dtype, recomputed) for device in ("cpu", "meta"))
    assert planned == pytest.approx(real, rel=0.02)


def test_recomputed_blocks_are_casted_too():
    """Else their backward pass would be planned in float32."""
    seen = []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(x)
            seen.append(y.dtype)
            return self.linear(y).float()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block()])

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.blocks[0], x, use_reentrant=False)

    with torch.device("meta"):
        network, x = Network(), torch.zeros(2, 4)
    LikeAutocast(network, torch.bfloat16)
    network(x).sum().backward()
    assert seen == [torch.bfloat16] * 2


def measure(model: str, work_dir: str, words: tuple[str, ...]) -> None:
    """Train two steps in this process; write (planned, measured) bytes."""
    model, work_dir = Path(model), Path(work_dir)
    TRANSFORMERS[TWO_BLOCKS] = replace(TRANSFORMERS["SanaMS_Tiny_P1_D8"], depth=2)
    micro.trainer(model, work_dir / "warm", "--train.max_steps=1").train()  # libraries are loaded
    config = micro.config(model, work_dir, *words)
    planned = plan(config, 1).peak
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    run = micro.Trainer(config)
    stream = run._batches()
    for _ in range(2):
        run.train_step([next(stream)])
    # Of this program; ru_maxrss would be that of the process which started it, where that was larger.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    (work_dir / "memory.json").write_text(json.dumps([planned, peak - before]))


def planned_and_measured(tmp_path: Path, *words: str) -> tuple[int, int]:
    common = (
        *(f"--model.model={TWO_BLOCKS}", "--model.image_size=512"),
        # On a CPU torch steps one parameter after the other.
        "--train.optimizer={type: AdamW, lr: 1e-3, foreach: false}",
    )
    model = write_model(tmp_path / "model")
    code = f"from tests.runtime.test_memory import measure; measure({str(model)!r}, {str(tmp_path)!r}, {common + words!r})"
    # Freed tensors go back to the system at once, so that its figure is that of the live ones.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    return tuple(json.loads((tmp_path / "memory.json").read_text()))


@pytest.mark.slow
def test_a_small_run_takes_about_what_is_planned(tmp_path):
    planned, measured = planned_and_measured(tmp_path, "--train.train_batch_size=12")
    assert planned > 200 * MIB
    assert planned == pytest.approx(measured, abs=150 * MIB)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--train.train_batch_size=80",),
        ("--train.train_batch_size=120", "--train.grad_checkpointing=true"),
    ],
    ids=["stored", "recomputed"],
)
def test_a_larger_run_takes_what_is_planned(tmp_path, words):
    planned, measured = planned_and_measured(tmp_path, *words)
    assert planned > GIB
    assert planned == pytest.approx(measured, rel=0.15)
