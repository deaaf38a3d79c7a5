"""How much memory drawing will take, before anything is loaded, and how to make it fit.

The stages are walked through on the device "meta" (`sana.runtime.memory`): encoding the text, one step of denoising with
guidance, decoding. To what they make come the weights that are there meanwhile.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, DynamicCache, PreTrainedModel

from sana.models import dc_ae_decoder
from sana.models.autoencoder import Autoencoder
from sana.models.text_encoder import TextEncoder
from sana.models.transformer import SanaTransformer
from sana.runtime import offload
from sana.runtime.decoding import LEAST_STRIP, TILES
from sana.runtime.memory import GIB, Component, LikeAutocast, peak_of, table
from sana.runtime.quantize import weight_bytes

PROMPT_TOKENS = 75
"""Of a prompt, at most, that a plan counts with; longer ones take little more."""

READING_BYTES = 2**27
"""What reading weights takes beside them: pages of their file (`sana.models.filling.BYTES_AT_ONCE`), and as much for one layer in
another form."""

GPU_CONTEXT = 2**29
"""About what a GPU's libraries take before anything is loaded."""

STRIPS = (None, 2**30, 2**29, 2**28, 2**27, LEAST_STRIP)
"""Bytes of a strip in decoding, tried one after the other; None leaves it to the autoencoder (2 GiB on a CPU)."""

_MEMINFO, _STATM, _CGROUP = Path("/proc/meminfo"), Path("/proc/self/statm"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The networks without weights, in the dtypes that they compute in."""

    transformer: SanaTransformer
    autoencoder: Autoencoder
    text_encoder: PreTrainedModel
    stored: torch.dtype
    """Of the text encoder's files."""
    instruction: int
    """Tokens before each prompt."""
    max_length: int
    """Tokens of text that the transformer reads at most."""

    def parts(self) -> dict[str, nn.Module]:
        """Name -> network."""
        return {
            "text_encoder": self.text_encoder,
            "transformer": self.transformer,
            "autoencoder": self.autoencoder,
        }

    @classmethod
    def of(cls, transformer: SanaTransformer, autoencoder: Autoencoder, text_encoder: TextEncoder) -> Outline:
        """That of networks that are there, in whatever form."""
        with torch.device("meta"):
            empty = type(transformer)(transformer.config).to(transformer.dtype).eval()
            decoder = Autoencoder(type(autoencoder.model).from_config(autoencoder.model.config))
            language = AutoModel.from_config(text_encoder.model.config).to(text_encoder.model.dtype).eval()
        return cls(
            transformer=for_counting(empty),
            autoencoder=decoder.to(autoencoder.dtype),
            text_encoder=language,
            stored=text_encoder.model.dtype,
            instruction=len(text_encoder.tokenizer(text_encoder.chi).input_ids) if text_encoder.chi else 0,
            max_length=text_encoder.max_length,
        )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides how much memory drawing takes, beside the networks."""

    size: tuple[int, int]
    """(height, width) that is drawn."""
    enlarged: tuple[int, int] | None = None
    """(height, width) of the picture, if it is larger."""
    batch: int = 1
    """Images at once."""
    device: str = "cpu"
    """Its type."""
    quantize: Mapping[str, str] = field(default_factory=dict)
    offload: str = "none"
    max_bytes: int | None = None
    """Of a strip in decoding."""
    tile: int | None = None

    def __str__(self) -> str:
        words = [f"{self.size[0]} x {self.size[1]}", f"{self.batch} at once", f"offload {self.offload}"]
        if self.enlarged is not None:
            words.insert(1, f"enlarged to {self.enlarged[0]} x {self.enlarged[1]}")
        words += [f"{part} {kind}" for part, kind in self.quantize.items()]
        if self.max_bytes is not None:
            words.append(f"decoding in strips of {self.max_bytes / 2**20:.0f} MiB")
        if self.tile is not None:
            words.append(f"decoding in tiles of {self.tile}")
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a setting takes."""

    setting: Setting
    stages: dict[str, tuple[int, int]]
    """Stage -> (bytes of weights there, bytes in passing)."""

    @property
    def peak(self) -> int:
        """Most bytes at once, over what the process takes before it loads anything."""
        return max(sum(parts) for parts in self.stages.values())

    def __str__(self) -> str:
        sections = {
            stage: [
                Component(name="weights", bytes=weights),
                Component(name="in passing", bytes=passing),
                Component(name="sum", bytes=weights + passing),
            ]
            for stage, (weights, passing) in self.stages.items()
        }
        return (
            f"{self.setting}\n\n{table(sections)}\n\n{self.peak / GIB:.2f} GiB at most: planned, not measured. "
            "On top comes what the process or the GPU takes before anything is loaded."
        )


def make_plan(outline: Outline, setting: Setting, *, reading: int = READING_BYTES) -> Plan:
    """What drawing with these networks and this setting takes; `reading` is 0 where they were read before."""
    return Plan(setting=setting, stages=dict(_stages(outline, setting, reading)))


def _stages(outline: Outline, setting: Setting, reading: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Title, and bytes of weights and in passing, of one stage after the other; the last takes longest to find."""
    weights = {name: _weights(name, outline, setting) for name in offload.PARTS}
    stages = (
        ("text_encoder", "encoding the text", _encoding),
        ("transformer", "denoising", _denoising),
        ("autoencoder", "decoding", _decoding),
    )
    for name, title, passing in stages:
        gone = offload.others(setting.offload, name)
        there = sum(size for other, size in weights.items() if other not in gone)
        if setting.offload == "sequential" and name in offload.LAYERED:
            there = _layer_bytes(outline.parts()[name], setting.device)
        yield title, (there, max(passing(outline, setting), reading))


def _fits(outline: Outline, setting: Setting, limit: int) -> bool:
    return all(sum(parts) <= limit for _, parts in _stages(outline, setting, READING_BYTES))


def fit(outline: Outline, setting: Setting, limit: int, *, modes: tuple[str, ...] = ()) -> Plan:
    """The plan nearest to `setting` that takes at most `limit` bytes.

    It gives up, one after the other: decoding in one piece (strips are exact), the text encoder's place, images at once,
    the place of all networks but one, then exactness of decoding, then all weights but those of one layer.

    Args:
        modes: of offload that may be chosen; empty: any.

    Raises:
        ValueError: none does; the message has the numbers, and the nearest setting that fits.
    """
    for candidate in _candidates(setting, modes):
        if _fits(outline, candidate, limit):
            return make_plan(outline, candidate)
    smallest = make_plan(outline, candidate)  # the last gives up all that can be
    advice = _nearest(outline, setting, limit, modes)
    raise ValueError(
        f"{setting} does not fit into {limit / GIB:.2f} GiB: with {smallest.setting} it takes {smallest.peak / GIB:.2f} GiB; "
        + (f"what fits: {advice}" if advice else "nothing does, down to 256 pixels with int8")
    )


def _candidates(setting: Setting, modes: tuple[str, ...]) -> Iterator[Setting]:
    """From the least loss of time to the most."""
    batches = [setting.batch]
    while batches[-1] > 1:
        batches.append(batches[-1] // 2)
    strips = STRIPS if setting.max_bytes is None else (setting.max_bytes,)
    exact = [replace(setting, max_bytes=max_bytes) for max_bytes in strips]
    sides = [tile for tile in TILES if tile < max(setting.size)] if setting.tile is None else []
    tiled = [replace(setting, batch=1, max_bytes=LEAST_STRIP, tile=tile) for tile in sides]
    for group in (("none", "text", "model"), () if setting.quantize else ("sequential",)):
        allowed = [mode for mode in group if not modes or mode in modes]
        for mode in allowed:
            # Without the text encoder, which rests meanwhile in the other modes, images at once cost nothing.
            whole = mode == "none" and "text" in allowed
            for batch in batches[:1] if whole else batches:
                yield from (replace(way, offload=mode, batch=batch) for way in exact)
        yield from (replace(way, offload=allowed[-1]) for way in tiled if allowed)


def _nearest(outline: Outline, setting: Setting, limit: int, modes: tuple[str, ...]) -> Setting | None:
    """The same size with int8, or the largest of smaller sizes."""
    int8 = {"transformer": "int8", "text_encoder": "int8"}
    step = outline.autoencoder.downsample * outline.transformer.config.patch_size
    for scale in (1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0625):
        size = tuple(max(step, round(side * scale / step) * step) for side in setting.size)
        if max(size) < 256 and scale < 1:
            return None
        for kinds in (setting.quantize, int8):
            for candidate in _candidates(replace(setting, size=size, enlarged=None, quantize=kinds), modes):
                if _fits(outline, candidate, limit):
                    return candidate
    return None


def _weights(name: str, outline: Outline, setting: Setting) -> int:
    module = outline.parts()[name]
    total = weight_bytes(module, setting.quantize.get(name))
    if name == "text_encoder" and setting.device == "cpu":
        views = name in setting.quantize or module.dtype == outline.stored
        embedding = module.get_input_embeddings().weight
        if views:  # of the file: only the rows of a prompt's tokens are read
            return total - embedding.nbytes
        return total + total * outline.stored.itemsize // module.dtype.itemsize  # its pages, while it is read
    return total


def _layer_bytes(module: nn.Module, device: str) -> int:
    """All but the layers that come and go, and the largest of these."""
    kinds = (
        (nn.Embedding,) if device == "cpu" else ()
    )  # of which only the rows of a prompt's tokens are read there
    sizes = [
        (weight.ndim > 1, weight.nbytes)
        for part in module.modules()
        if not isinstance(part, kinds)
        for weight in part.parameters(recurse=False)
    ]
    return sum(size for is_layer, size in sizes if not is_layer) + max(size for _, size in sizes)


@functools.lru_cache(maxsize=64)
def _text_peak(model: PreTrainedModel, instruction: int, length: int, batch: int, prompt: int) -> int:
    def prompts() -> None:
        ids = torch.zeros(batch, prompt, dtype=torch.long, device="meta")
        if not instruction:
            model(input_ids=ids)
            return
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.zeros(1, instruction, dtype=torch.long, device="meta"), past_key_values=cache)
        cache.batch_repeat_interleave(batch)
        model(
            input_ids=ids,
            attention_mask=torch.ones(batch, instruction + prompt, device="meta"),
            past_key_values=cache,
        )

    def empty() -> None:
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    return max(peak_of(prompts), peak_of(empty))


def _encoding(outline: Outline, setting: Setting) -> int:
    prompt = min(PROMPT_TOKENS, outline.max_length)
    peak = _text_peak(outline.text_encoder, outline.instruction, outline.max_length, setting.batch, prompt)
    if "text_encoder" in setting.quantize:  # a layer's weights are unpacked while it computes
        peak += max(
            layer.weight.nbytes for layer in outline.text_encoder.modules() if isinstance(layer, nn.Linear)
        )
    return peak


@functools.lru_cache(maxsize=64)
def _step_peak(model: SanaTransformer, latent: tuple[int, int], batch: int, tokens: int) -> int:
    """One step; as the sampler does it, with the text encoded once and, where there is no embedding of it, guidance."""
    config, rows = model.config, batch if model.config.cfg_embed else 2 * batch
    with torch.device("meta"):
        latents = torch.empty(batch, config.in_channels, *latent)
        text = torch.empty(rows, tokens, config.caption_channels)
        time = torch.empty(1)

    def step() -> None:
        cache = model.encode_text(text)
        moment = model.encode_time(time, 1.0 if config.cfg_embed else None)[0]
        pair = latents if rows == batch else torch.cat([latents, latents])
        velocity = model(pair, moment, None, text_cache=cache)
        latents + latents + velocity[:batch]  # what the solver keeps

    return peak_of(step)


def _denoising(outline: Outline, setting: Setting) -> int:
    latent = tuple(side // outline.autoencoder.downsample for side in setting.size)
    tokens = min(PROMPT_TOKENS, outline.max_length)
    peak = _step_peak(outline.transformer, latent, setting.batch, tokens)
    if "transformer" in setting.quantize:
        peak += max(weight.nbytes for weight in outline.transformer.blocks.parameters())
    return peak


@functools.lru_cache(maxsize=256)
def _decode_peak(
    autoencoder: Autoencoder,
    latent: tuple[int, int],
    batch: int,
    device: str,
    max_bytes: int | None,
    tile: int | None,
) -> int:
    if tile is not None:
        side = autoencoder.downsample
        whole = batch * 3 * 4 * 2 * latent[0] * latent[1] * side**2
        inner = (min(latent[0], tile // side), min(latent[1], tile // side))
        return whole + _decode_peak(autoencoder, inner, 1, device, max_bytes, None)
    latents = torch.empty(batch, autoencoder.latent_channels, *latent, dtype=autoencoder.dtype, device="meta")

    def run() -> None:
        if max_bytes is None and device != "cpu":
            pixels = autoencoder.model.decode(latents).sample
        else:
            strip = max_bytes or dc_ae_decoder.WORKING_BYTES
            pixels = dc_ae_decoder.decode(autoencoder.model.decoder, latents, max_bytes=strip)
        pixels = pixels.float()
        ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    return peak_of(run)


def _decoding(outline: Outline, setting: Setting) -> int:
    latent = tuple(side // outline.autoencoder.downsample for side in setting.size)
    peak = _decode_peak(
        outline.autoencoder, latent, setting.batch, setting.device, setting.max_bytes, setting.tile
    )
    if setting.enlarged is None:
        return peak
    height, width = setting.enlarged  # in float32, and two more such on the way to 8 bits
    return max(peak, setting.batch * 3 * (3 * 4 + 1) * height * width)


def available(device: torch.device) -> int:
    """Bytes that can still be had on a device, the limit of a container included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMINFO.is_file():  # no Linux: all that the machine has
        return os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    info = dict(line.split(":") for line in _MEMINFO.read_text(encoding="ascii").splitlines())
    free = int(info["MemAvailable"].split()[0]) * 1024
    for most, used, below in (
        ("memory.max", "memory.current", ""),  # version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),  # version 1
    ):
        limit = _CGROUP / most
        if not limit.is_file() or (text := limit.read_text(encoding="ascii").strip()) == "max":
            continue
        parts = limit.with_name("memory.stat").read_text(encoding="ascii")
        kept = dict(line.split() for line in parts.splitlines())
        # What was read of files counts as used, but is given up when memory is wanted.
        cache = int(kept[f"{below}active_file"]) + int(kept[f"{below}inactive_file"])
        free = min(free, int(text) - int((_CGROUP / used).read_text(encoding="ascii")) + cache)
    return free


def held() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    return int(_STATM.read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE if _STATM.is_file() else 0


def for_counting(transformer: SanaTransformer) -> SanaTransformer:
    """On "meta": with attention over text counted as the fused kernel, which keeps no scores."""
    LikeAutocast(transformer, None)
    return transformer
