"""One CUDA graph for a step: a replay costs one launch, where the network's own takes about a thousand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sana.models.caches import TextCache, TimeCache
from sana.models.transformer import SanaTransformer

FORMS = 8
"""How many graphs are kept, the latest used ones: each holds the activations of its size and batch."""
TEXT_STEP = 16
"""Texts are padded to a multiple of so many tokens: otherwise each length of a prompt would make graphs of its own. Products
of such sizes are also the ones that tensor cores take."""
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
    weights must stay where they are, and one thread at a time may call.
    """

    def __init__(self, transformer: SanaTransformer) -> None:
        self.transformer, self.encode_time = transformer, transformer.encode_time
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._recorder: Recorder | None = None

    def encode_text(self, text_embeds: torch.Tensor, text_mask: torch.Tensor | None = None) -> TextCache:
        """As `SanaTransformer.encode_text`, of the text padded to a multiple of `TEXT_STEP` tokens: the same but for rounding."""
        extra = -text_embeds.shape[1] % TEXT_STEP
        valid = text_embeds.new_ones(text_embeds.shape[:2], dtype=torch.bool)
        if text_mask is not None:
            valid = text_mask.to(text_embeds.device).bool()
            # A row without one attends to all, as it does unpadded.
            valid = valid | ~valid.any(dim=1, keepdim=True)
        return self.transformer.encode_text(F.pad(text_embeds, (0, 0, 0, extra)), F.pad(valid, (0, extra)))

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
        # Tensors of inference mode could not be written by a later call outside of it.
        with torch.inference_mode(False), torch.no_grad():
            latents = latents.clone()
            time = TimeCache(time.blocks.clone(), time.embedding.clone())
            blocks = tuple(_like(block, (x.clone() for x in block)) for block in text.blocks)
            text = TextCache(blocks, None if text.mask is None else text.mask.clone())

            def run() -> torch.Tensor:
                return self.transformer(
                    latents, time, None, text_cache=text, perturbed_blocks=perturbed_blocks
                )

            self._recorder = self._recorder or Recorder(latents.device)
            replay, output = self._recorder.capture(run)
        return _Graph(latents, time, text, replay, output)


class Recorder:
    """Captures CUDA graphs of one device that share the memory of their activations: one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Capture `run` as a graph: how to run it again, and where its result will lie."""
        # Named everywhere: the default streams, of a capture too, are those of the GPU that is current.
        stream = self._stream
        with torch.cuda.device(stream.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
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
