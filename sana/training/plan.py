"""What a run will take, before anything is loaded: parameters, memory of each GPU, steps.

The networks lie on the device "meta", where one step of the run is walked through (`sana/runtime/memory.py`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sana.config import SanaConfig, transformer_overrides
from sana.data.order import Order
from sana.diffusion import flow
from sana.models.autoencoder import NATIVE_WEIGHTS, PUBLISHED, Autoencoder
from sana.models.checkpoints import AUTOENCODERS
from sana.models.transformer import SanaTransformer
from sana.models.zoo import build_transformer
from sana.runtime.memory import GIB, Allocations, Component, LikeAutocast, peak_of, table, tensor_bytes
from sana.training.features import PIXELS_AT_ONCE, encode_pictures
from sana.training.heldout import data_sets, hold_out
from sana.training.lora import LoraSettings, add_lora
from sana.training.optim import SHARDABLE, build_optimizer
from sana.utils import hub

_GEMMA_2_2B = ("gemma-2-2b", "gemma-2-2b-it")  # transformers' defaults of Gemma2Config are this model
_CHARACTERS_A_TOKEN = 4  # about, of an English instruction


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` finds, for each GPU."""

    title: str
    kept: list[Component]
    """There all the time."""
    passing: list[Component]
    """One after the other; indented names are parts of the line above."""
    steps: str
    """Steps of an epoch and of the run, or why they are not known."""

    @property
    def peak(self) -> int:
        """Most bytes at once, of what is known."""
        return sum(part.bytes or 0 for part in self.kept) + max(part.bytes or 0 for part in self.passing)

    def __str__(self) -> str:
        total = Component(name="sum", bytes=sum(part.bytes or 0 for part in self.kept))
        most = Component(name="kept and the most of these", bytes=self.peak)
        unknown = [part.name for part in self.kept if part.bytes is None]
        left_out = f" Not known here and left out: {', '.join(unknown)}." if unknown else ""
        return (
            f"{self.title}\n\n{table({'kept': [*self.kept, total], 'in passing': [*self.passing, most]})}\n\n"
            f"{self.peak / GIB:.1f} GiB on each GPU: planned, not measured.{left_out} On top come the device's context,\n"
            f"its libraries' workspaces, fragmentation, and what validation takes.\n{self.steps}"
        )


def plan(config: SanaConfig, processes: int) -> Plan:
    """The plan of a run in `processes` processes with a GPU each.

    Raises:
        ConfigError: what the networks, the LoRA or the optimizer refuse.
    """
    train = config.train
    kept, passing = _network(config, processes)
    cached = train.feature_cache_dir is not None
    uses = []
    if not cached or config.data.type == "SanaShapes":  # whose captions are new in each epoch
        part, use = _text_encoder(config)
        kept.append(part)
        uses.append(use)
    if not cached or train.visualize:
        part, use = _autoencoder(config)
        kept.append(part)
        uses.append(None if cached else use)
    passing = [*filter(None, uses), *passing]
    gpus = f"each of {processes} GPUs" if processes > 1 else "one GPU"
    title = (
        f"{config.model.model} at {config.model.image_size} pixels, {config.model.mixed_precision}, "
        f"{train.train_batch_size} pictures at once on {gpus}"
    )
    return Plan(title=title, kept=kept, passing=passing, steps=_steps(config, processes))


def _network(config: SanaConfig, processes: int) -> tuple[list[Component], list[Component]]:
    """What the transformer and its training keep, and take in passing."""
    train = config.train
    model = _transformer(config)
    weights = list(model.parameters())
    trained = [value for value in weights if value.requires_grad]
    shards = processes if train.use_fsdp else 1
    part = sum(_shard(value, shards) for value in weights)
    gradients = sum(_shard(value, shards) for value in trained)
    state, update = _update(config, model)

    share = f"1/{shards} of each" if shards > 1 else ""
    averaged = (gradients if train.lora else part) if train.ema_update else 0
    note = f"{_count(trained):,} of them a LoRA" if train.lora else share
    kept = [
        Component(name="transformer, float32", bytes=part, parameters=_count(weights), note=note),
        Component(name="its average", bytes=averaged, note=share if averaged else "train.ema_update is off"),
        Component(name=f"state of {train.optimizer['type']}", bytes=-(-state // shards), note=share),
    ]
    if processes > 1 and shards == 1:
        kept.append(Component(name="gradients in DDP's buckets", bytes=gradients))

    computing, other = (
        _Computing.of(each, keep_gradients=shards == 1) for each in (config, _other_checkpointing(config))
    )
    gathered = Component(name="  gathered blocks", bytes=_gathered(model), note="at most")
    beside = gradients + gathered.bytes if shards > 1 else 0
    switched = "without" if train.grad_checkpointing else "with"
    note = f"{switched} train.grad_checkpointing: {(other.peak + beside) / GIB:.2f}"
    passing = [
        Component(name="forward and backward pass", bytes=computing.peak + beside, note=note),
        Component(name="  kept for the backward pass", bytes=computing.saved, note=_load(config, model)),
        Component(name="  gradients", bytes=gradients, parameters=_count(trained), note=share),
        *([gathered] if shards > 1 else []),
        Component(name="optimizer's step", bytes=gradients + -(-update // shards)),
    ]
    return kept, passing


@dataclass(frozen=True)
class _Computing:
    """Bytes of a forward and a backward pass beside the weights."""

    saved: int
    """Kept from the forward for the backward pass, casts of weights among it."""
    peak: int
    """Most at once, gradients included where they are kept."""

    @classmethod
    def of(cls, config: SanaConfig, *, keep_gradients: bool) -> _Computing:
        model, train = _transformer(config), config.train
        if not keep_gradients:  # sharded at once, and counted elsewhere
            for value in model.parameters():
                if value.requires_grad:
                    value.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}[config.model.mixed_precision]
        # No bucket has more pixels than the square.
        side = config.model.image_size // config.vae.vae_downsample_rate
        batch, length = train.train_batch_size, config.text_encoder.model_max_length
        saved = 0
        with Allocations() as made, torch.device("meta"):
            for _ in range(min(2, train.gradient_accumulation_steps)):  # the second finds gradients
                network = LikeAutocast(model, dtype)
                latents, noise = (torch.empty(batch, config.vae.vae_latent_dim, side, side) for _ in range(2))
                t, drop = torch.empty(batch), torch.empty(batch, dtype=torch.bool)
                embeds = torch.empty(
                    batch, length, config.text_encoder.caption_channels, dtype=torch.bfloat16
                )
                mask = torch.empty(batch, length, dtype=torch.long)
                prediction = model(flow.interpolate(latents, noise, t), t, embeds, mask, drop_caption=drop)
                network.forget()
                loss = flow.loss(prediction, flow.velocity_target(latents, noise))
                gradients = tensor_bytes(v.grad for v in model.parameters() if v.grad is not None)
                saved = max(saved, made.now - gradients)
                loss.backward()
        return cls(saved, made.peak)


def _transformer(config: SanaConfig) -> SanaTransformer:
    """The network of the run on "meta", with its LoRA."""
    with torch.device("meta"):
        model = build_transformer(config.model.model, **transformer_overrides(config))
        if config.train.lora:
            add_lora(model, LoraSettings.of(config.train.lora))
    return model


def _other_checkpointing(config: SanaConfig) -> SanaConfig:
    train = dataclasses.replace(config.train, grad_checkpointing=not config.train.grad_checkpointing)
    return dataclasses.replace(config, train=train)


def _update(config: SanaConfig, model: nn.Module) -> tuple[int, int]:
    """Bytes of the optimizer's state, and of what its step has in passing beside gradients."""
    settings = dict(config.train.optimizer)
    trained = [value for value in model.parameters() if value.requires_grad]
    if settings["type"] == "AdamW8bit":
        return sum(_eight_bits(value.numel()) for value in trained), 0
    if settings["type"] in SHARDABLE and not settings.pop("fused", False):
        settings.setdefault("foreach", True)  # what torch does on a GPU: all parameters at once
    for value in trained:
        value.grad = torch.empty_like(value)
    optimizer = build_optimizer(model, dataclasses.replace(config.train, optimizer=settings), 256)
    with Allocations() as made:
        optimizer.step()
    for value in trained:
        value.grad = None
    return made.now, made.peak - made.now


def _eight_bits(count: int) -> int:
    """Both moments in bitsandbytes: a byte each and a scale for every 256, float32 below 4096 values."""
    return 2 * (count + 4 * -(-count // 256)) if count >= 4096 else 8 * count


def _gathered(model: SanaTransformer) -> int:
    """Most that FSDP2 has whole: parameters and gradients outside the blocks, and of two blocks each."""
    block = tensor_bytes(model.blocks[0].parameters())
    return 2 * (tensor_bytes(model.parameters()) - len(model.blocks) * block) + 4 * block


def _shard(value: Tensor, shards: int) -> int:
    """Bytes of the largest part of a tensor whose rows are dealt out."""
    rows = len(value)
    return -(-rows // shards) * (value.nbytes // rows)


def _count(tensors: list[Tensor]) -> int:
    return sum(value.numel() for value in tensors)


def _load(config: SanaConfig, model: SanaTransformer) -> str:
    tokens = (config.model.image_size // config.vae.vae_downsample_rate // model.config.patch_size) ** 2
    return (
        f"{config.train.train_batch_size} x {tokens} tokens, {config.text_encoder.model_max_length} of text"
    )


Part = tuple[Component, Component | None]
"""A network that is only used, and its use."""


def _autoencoder(config: SanaConfig) -> Part:
    from diffusers import AutoencoderDC

    name, side = config.vae.vae_pretrained, config.model.image_size
    folder = _local(name)
    with torch.device("meta"):
        if folder is not None and not (folder / NATIVE_WEIGHTS).is_file():
            encoder = Autoencoder(AutoencoderDC.from_config(AutoencoderDC.load_config(folder)))
        elif name in AUTOENCODERS and "lite" not in name:
            encoder = Autoencoder.from_config(PUBLISHED)
        else:
            return Component(name=f"autoencoder {name}"), None
    count = config.train.train_batch_size
    peak = peak_of(lambda: encode_pictures(encoder, torch.empty(count, 3, side, side, device="meta")))
    note = f"{count} x {side} x {side} pixels, {max(1, PIXELS_AT_ONCE // side**2)} pictures at a time"
    return _weights("autoencoder", encoder), Component(name="pictures to latents", bytes=peak, note=note)


def _text_encoder(config: SanaConfig) -> Part:
    from transformers import AutoConfig, AutoModel, DynamicCache, Gemma2Config

    settings = config.text_encoder
    name, folder = settings.text_encoder_name, _local(settings.text_encoder_name)
    if folder is not None:
        inner = folder / "text_encoder"
        architecture = AutoConfig.from_pretrained(inner if inner.is_dir() else folder)
    elif name in _GEMMA_2_2B or Path(name).name in _GEMMA_2_2B:
        architecture = Gemma2Config()
    else:
        return Component(name=f"text encoder {name}"), None
    with torch.device("meta"):
        model = AutoModel.from_config(architecture, dtype=torch.bfloat16)
    count, length = config.train.train_batch_size, settings.model_max_length
    before = len("\n".join(settings.chi_prompt)) // _CHARACTERS_A_TOKEN
    ids = torch.zeros(count, before + length, dtype=torch.long, device="meta")

    def read() -> None:
        """As `TextEncoder` does: the instruction once, then the captions behind its keys and values."""
        cache = DynamicCache(config=architecture)
        if before:
            model(input_ids=ids[:1, :before], past_key_values=cache)
            cache.batch_repeat_interleave(count)
        model(input_ids=ids[:, before:], attention_mask=torch.ones_like(ids), past_key_values=cache)

    note = f"{count} x {length} tokens behind about {before}"
    return _weights("text encoder", model), Component(
        name="captions to features", bytes=peak_of(read), note=note
    )


def _weights(name: str, model: nn.Module) -> Component:
    weights = list(model.parameters())
    dtype = str(weights[0].dtype).removeprefix("torch.")
    return Component(name=f"{name}, {dtype}", bytes=tensor_bytes(weights), parameters=_count(weights))


def _local(name: str) -> Path | None:
    """The folder that a config names, if it is on this machine; nothing is downloaded."""
    if name.startswith("hf://") or hub.hub_address(name) is not None:
        return None
    try:
        return hub.resolve(name)
    except ValueError:
        return None


def _steps(config: SanaConfig, processes: int) -> str:
    train = config.train
    batch = train.train_batch_size * train.gradient_accumulation_steps * processes
    try:
        samples, _ = hold_out(config, *data_sets(config).values())
        order = Order.of(samples, batch_size=batch, seed=train.seed)
    except (ValueError, OSError) as error:
        return f"Steps of {batch} pictures; how many an epoch has is not known: {error}"
    total = min(train.max_steps or 10**12, train.num_epochs * order.steps_per_epoch)
    return f"{len(samples):,} pictures in steps of {batch}: {order.steps_per_epoch:,} an epoch, {total:,} in all."
