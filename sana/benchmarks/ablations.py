"""What the parts of Sana are worth: a network is trained without one of them, all else equal, and scored.

Arithmetic is replaced in the classes themselves, for the whole process, under weights of the same names and shapes: so the
trainer, the checkpoints and the pipeline are those of every other run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sana.config import load_config
from sana.evaluation import shapes_benchmark
from sana.generation import Settings, folder_name
from sana.metrics.geneval import GenEvalPrompt
from sana.models.attention import LinearSelfAttention, merge_heads, split_heads
from sana.models.mix_ffn import MixFFN
from sana.ops.mix_ffn import depthwise_glu
from sana.pipeline import SanaPipeline
from sana.training.trainer import Trainer


def softmax_attention(self: LinearSelfAttention, x: Tensor, *, perturbed: bool = False) -> Tensor:
    """`LinearSelfAttention.forward` with softmax attention instead, of the same projections."""
    q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
    mixed = v if perturbed else functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
    return self.proj(merge_heads(mixed))


def pointwise_ffn(self: MixFFN, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """`MixFFN.forward` with the centre of the 3x3 convolution alone: no token sees its neighbours."""
    depth = self.depth_conv.conv
    centre = torch.zeros_like(depth.weight)
    centre[..., 1, 1] = 1
    x = self.inverted_conv(x).unflatten(1, grid)
    x = depthwise_glu(x, depth.weight * centre, depth.bias, silu=True, backend=self.kernels)
    return self.point_conv(x.flatten(1, 2))


@dataclass(frozen=True, slots=True)
class Variant:
    """A network that lacks something: words of the config, and forward passes to replace."""

    overrides: tuple[str, ...] = ()
    forwards: tuple[tuple[type, Callable[..., Tensor]], ...] = ()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Every network of this process computes as the variant does, within."""
        before = [(owner, owner.forward) for owner, _ in self.forwards]
        try:
            for owner, forward in self.forwards:
                owner.forward = forward
            yield
        finally:
            for owner, forward in before:
                owner.forward = forward


VARIANTS: Mapping[str, Variant] = {
    "sana": Variant(),
    "no_position_embedding": Variant(("--model.use_pe=false",)),
    "no_depthwise": Variant(forwards=((MixFFN, pointwise_ffn),)),
    "no_depthwise_nor_position_embedding": Variant(
        ("--model.use_pe=false",), forwards=((MixFFN, pointwise_ffn),)
    ),
    "softmax_attention": Variant(forwards=((LinearSelfAttention, softmax_attention),)),
    "no_chi": Variant(("--text_encoder.chi_prompt=[]",)),
    "caption_norm_0.01": Variant(("--text_encoder.y_norm_scale_factor=0.01",)),
}
"""By name; `sana` is the config as it stands."""


def measure(
    name: str,
    config: str | Path,
    overrides: list[str],
    prompts: Mapping[int, GenEvalPrompt],
    work_dir: Path,
    *,
    batch_size: int,
) -> dict[str, Any] | None:
    """Train a variant in `work_dir`, or go on with it, and score its averaged weights.

    Args:
        overrides: words like --train.max_steps=3000, of all variants.
        prompts: as of `shapes_benchmark.subset`.

    Returns:
        The main process: held-out loss and scores; the others: only the loss. None where the training was stopped.
    """
    variant = VARIANTS[name]
    words = [*overrides, *variant.overrides, "--model.load_from=", f"--work_dir={work_dir}"]
    with variant.applied():
        trainer = Trainer(load_config(config, words), resume_from="latest")
        if not trainer.train():
            return None
        values: dict[str, Any] = trainer.held_out_loss(trainer.best())
        weights = work_dir / "transformer.safetensors"
        pipeline = SanaPipeline(load_config(config, [*words, f"--model.load_from={weights}"]))
        settings = Settings(seed=0, num_inference_steps=20)
        folder = work_dir / folder_name(pipeline, settings, "shapes")
        scores = shapes_benchmark.draw_and_score(pipeline, prompts, folder, settings, batch_size=batch_size)
    return values | (scores or {})
