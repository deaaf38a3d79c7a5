"""Faster networks by torch.compile: one block of a transformer is compiled, and every block runs that code."""

import torch
from torch import nn

from sana.models.layers import Linear
from sana.models.mix_ffn import PointwiseConv
from sana.models.transformer import SanaTransformer
from sana.ops.linear.onednn import pack_weights

SHAPES = 64
"""How many forms of a block are kept before the compiler gives up: sizes, batches, perturbed or not, guided or not."""


def compile_networks(transformer: SanaTransformer, decoder: nn.Module, *, rows: int) -> None:
    """Compile the blocks of `transformer`, and on a GPU the autoencoder's `decoder` for whole images, in channels-last.

    On a CPU, and in strips of rows, the decoder has arithmetic of its own, `sana.models.dc_ae_decoder`.

    Args:
        rows: see `compile_blocks`.
    """
    compile_blocks(transformer, rows=rows)
    if next(decoder.parameters()).device.type == "cuda" and decoder._compiled_call_impl is None:
        compile_decoder(decoder)


def compile_decoder(decoder: nn.Module) -> None:
    """Compile a decoder as one graph, in place, with its filters in channels-last, as convolutions like them."""
    decoder.to(memory_format=torch.channels_last).compile(fullgraph=True)


def compile_blocks(transformer: SanaTransformer, *, rows: int = 512) -> None:
    """Compile the blocks of `transformer`, in place; the first call of a new form then takes seconds.

    The second size or batch is compiled for all sizes at once, so that further ones cost nothing. Compiled code is kept on
    disk (in TORCHINDUCTOR_CACHE_DIR, by default below the system's temporary folder), so that the next process starts
    quickly. On a CPU the weights of the large products are packed too, which takes their memory again, unless they are
    trained.

    Args:
        transformer: on its device, in its dtype.
        rows: tokens of a whole batch, guidance included, for which weights are packed on a CPU.
    """
    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    for block in transformer.blocks:
        block.compile(fullgraph=True)
    if next(transformer.parameters()).device.type == "cpu" and not transformer.training:
        layers = [
            module for module in transformer.blocks.modules() if isinstance(module, Linear | PointwiseConv)
        ]
        pack_weights((layer.weight for layer in layers), rows)
