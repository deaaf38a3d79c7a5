"""One CUDA graph for a step: a replay costs one launch, where the network's own takes about a thousand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from sana.models.caches import TextCache, TimeCache
from sana.models.transformer import SanaTransformer

FORMS = 8
"""How many graphs are kept, the latest used ones: each holds the activations of its size and batch."""
WARM_UP_CALLS = 3
"""Before a capture, as PyTorch asks for: libraries choose their algorithms and take their workspaces."""


@dataclass
class _Graph:
    """A captured call: its arguments lie at fixed addresses, into which those of the next call are copied."""

    latents: torch.Tensor
    time: TimeCache
    text: TextCache
    replay: Callable[[], None]
    output: torch.Tensor
    text_given: TextCache | None = None  # what `text` is a copy of


class CapturedTransformer:
    """A transformer as `sana.diffusion.guidance.guided` calls it, replayed as a CUDA graph for each form of its arguments.

    A form is the shapes of all arguments and the perturbed blocks. A call without both caches runs as it is. The
    weights must stay where they are.
    """

    def __init__(self, transformer: SanaTransformer) -> None:
        self.transformer = transformer
        self.encode_text, self.encode_time = transformer.encode_text, transformer.encode_time
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()

    def __call__(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor | TimeCache,
        text_embeds: torch.Tensor | None,
        text_mask: torch.Tensor | None = None,
        *,
        text_cache: TextCache | None = None,
        perturbed_blocks: Collection[int] = (),
    ) -> torch.Tensor:
        """As `SanaTransformer.forward`."""
        if text_cache is None or not isinstance(timestep, TimeCache):
            settings = {"text_cache": text_cache, "perturbed_blocks": perturbed_blocks}
            return self.transformer(latents, timestep, text_embeds, text_mask, **settings)
        given = [latents, timestep.blocks, timestep.embedding, *_tensors(text_cache)]
        form = (tuple((x.shape, x.dtype) for x in given), _kinds(text_cache), tuple(sorted(perturbed_blocks)))
        graph = self._graphs.pop(form, None) or self._capture(latents, timestep, text_cache, perturbed_blocks)
        self._graphs[form] = graph  # the latest
        if len(self._graphs) > FORMS:
            self._graphs.popitem(last=False)
        torch._foreach_copy_(
            [graph.latents, graph.time.blocks, graph.time.embedding],
            [latents, timestep.blocks, timestep.embedding],
        )
        if graph.text_given is not text_cache:  # once for all steps of an image
            torch._foreach_copy_(_tensors(graph.text), _tensors(text_cache))
            graph.text_given = text_cache
        graph.replay()
        return graph.output.clone()

    def _capture(
        self, latents: torch.Tensor, time: TimeCache, text: TextCache, perturbed_blocks: Collection[int]
    ) -> _Graph:
        latents = latents.clone()
        time = TimeCache(time.blocks.clone(), time.embedding.clone())
        blocks = tuple(_like(block, (x.clone() for x in block)) for block in text.blocks)
        text = TextCache(blocks, None if text.mask is None else text.mask.clone())

        def run() -> torch.Tensor:
            return self.transformer(latents, time, None, text_cache=text, perturbed_blocks=perturbed_blocks)

        replay, output = capture(run)
        return _Graph(latents, time, text, replay, output)


def capture(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Capture `run` as a CUDA graph: how to run it again, and where its result will lie."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output


def _tensors(text: TextCache) -> list[torch.Tensor]:
    tensors = [x for block in text.blocks for x in block]
    return tensors if text.mask is None else [*tensors, text.mask]


def _kinds(text: TextCache) -> tuple[type, ...]:
    return tuple(type(block) for block in text.blocks)


def _like(block: Any, parts: Any) -> Any:
    """Folded text or keys and values, as `block` is."""
    parts = tuple(parts)
    return type(block)(*parts) if hasattr(block, "_fields") else parts
