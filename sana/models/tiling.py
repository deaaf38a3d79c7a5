"""Images and latents in overlapping tiles that are blended: for less memory than strips of rows take, and for encoding.

Not exact: a tile does not see what lies beyond it, where its convolutions find zeros and attention fewer pixels. Tiles are of
one size and evenly spread, so that none is a narrow rest; where they overlap, they are mixed with weights that rise
linearly from the edge.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def in_tiles(
    function: Callable[[Tensor], Tensor], x: Tensor, *, tile: int, overlap: int, cell: tuple[int, int]
) -> Tensor:
    """`function(x)` of (B, C, H, W), tile by tile, blended where they overlap; at once if one tile covers it.

    Args:
        function: decodes or encodes; may change the number of channels.
        tile, overlap: in cells; neighbours overlap by at least that much.
        cell: the sides of a cell in `x` and in the output: (1, 32) to decode, (32, 1) to encode.

    Raises:
        ValueError: the overlap is as long as a tile, or negative.
    """
    before, after = cell
    height, width = (side // before for side in x.shape[-2:])
    rows, columns = _starts(height, tile, overlap), _starts(width, tile, overlap)
    if len(rows) == len(columns) == 1:
        return function(x)
    output = total = None
    for top in rows:
        for left in columns:
            part = x[..., before * top : before * (top + tile), before * left : before * (left + tile)]
            part = function(part).float()
            ramp = overlap * after
            down = _weights(part.shape[-2], ramp, top > 0, top + tile < height)
            across = _weights(part.shape[-1], ramp, left > 0, left + tile < width)
            weight = (down[:, None] * across).to(part.device)
            if output is None:
                output = part.new_zeros(*part.shape[:2], after * height, after * width)
                total = part.new_zeros(output.shape[-2:])
            y, z = after * top, after * left
            output[..., y : y + part.shape[-2], z : z + part.shape[-1]] += part.mul_(weight)
            total[y : y + part.shape[-2], z : z + part.shape[-1]] += weight
    return output.div_(total)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin."""
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} cannot overlap by {overlap}: from 0 to {tile - 1}")
    if tile >= length:
        return [0]
    steps = -(-(length - tile) // (tile - overlap))
    return [(2 * index * (length - tile) + steps) // (2 * steps) for index in range(steps + 1)]


def _weights(length: int, overlap: int, starts_inside: bool, ends_inside: bool) -> Tensor:
    """Along one side of a tile: 1, but rising over `overlap` from an edge inside the picture."""
    distance = torch.arange(length) + 0.5
    weights = torch.ones(length)
    if overlap and starts_inside:
        weights = weights.minimum(distance / overlap)
    if overlap and ends_inside:
        weights = weights.minimum(distance.flip(0) / overlap)
    return weights
