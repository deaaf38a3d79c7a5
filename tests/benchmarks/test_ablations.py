"""scripts/ablate.py: each variant computes what its name says, and is trained, scored and gone on with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sana.benchmarks.ablations import VARIANTS
from sana.models.attention import LinearSelfAttention
from sana.models.mix_ffn import MixFFN

ROOT = Path(__file__).resolve().parents[2]
GRID = (3, 4)


def changed(module, x, *arguments):
    """(N, N) bool: whether the output at one token depends on the input at another."""
    x = x.requires_grad_()
    outputs = module(x, *arguments)[0]
    gradients = [torch.autograd.grad(token.sum(), x, retain_graph=True)[0][0] for token in outputs]
    return torch.stack([(gradient != 0).any(-1) for gradient in gradients])


@pytest.mark.parametrize("name", ["sana", "no_depthwise"])
def test_without_the_convolution_a_token_sees_itself_alone(name):
    torch.manual_seed(0)
    ffn = MixFFN(8, 12, kernels="torch")
    with VARIANTS[name].applied():
        seen = changed(ffn, torch.randn(1, 12, 8), GRID)
    alone = torch.eye(12, dtype=torch.bool)
    assert torch.equal(seen, alone) == (name == "no_depthwise") and (seen & alone).sum() == 12


def test_softmax_attention_is_its_definition():
    torch.manual_seed(0)
    attention = LinearSelfAttention(16, head_dim=8, qk_norm=False, fp32=True, kernels="torch")
    x = torch.randn(2, 5, 16)
    usual = attention(x)
    with VARIANTS["softmax_attention"].applied():
        found, perturbed = attention(x), attention(x, perturbed=True)
    q, k, v = (part.view(2, 5, 2, 8).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    mixed = (q @ k.mT / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(found, attention.proj(mixed.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(perturbed, attention(x, perturbed=True))
    assert torch.equal(usual, attention(x)) and not torch.allclose(usual, found)


def test_what_was_replaced_comes_back_after_an_error():
    with pytest.raises(RuntimeError), VARIANTS["no_depthwise"].applied():
        assert MixFFN.forward.__name__ == "pointwise_ffn"
        raise RuntimeError
    assert MixFFN.forward.__qualname__ == "MixFFN.forward"


@pytest.mark.slow
def test_every_variant_is_trained_and_scored(tmp_path):
    output = tmp_path / "ablations.json"
    command = [
        *(sys.executable, "scripts/ablate.py", "--steps=2", "--limit=1", f"--work_dir={tmp_path / 'runs'}"),
        *(f"--output={output}", "--data.num_scenes=8", "--train.train_batch_size=2"),
        *(f"--train.feature_cache_dir={tmp_path / 'features'}", "--train.heldout_samples=4"),
        *("--train.visualize=false", "--report_to=none"),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(output.read_text())["values"]
    assert list(found) == list(VARIANTS)
    losses = [values["heldout_loss"] for values in found.values()]
    assert len(set(losses)) == len(losses), losses
    assert all("two_object" in values["tags"] for values in found.values())
    history = tmp_path / "runs/sana/history.jsonl"
    first = {
        name: json.loads((tmp_path / "runs" / name / "history.jsonl").read_text().splitlines()[0])
        for name in VARIANTS
    }
    assert all(row["samples"] == first["sana"]["samples"] for row in first.values())
    written = history.read_text()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert again.returncode == 0 and history.read_text() == written
    assert json.loads(output.read_text())["values"] == found


def test_an_unknown_variant_is_one_line(tmp_path):
    command = [
        *(sys.executable, "scripts/ablate.py", "--variants=sana,no_text", "--steps=1"),
        f"--output={tmp_path}/o",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "no_text" in result.stderr and "no_chi" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
