"""The linear diffusion transformer of Sana (arXiv 2410.10629), under the published parameter names.

Shapes: B batch, c latent channels, N = h * w image tokens of p x p latent values each, L text tokens,
D hidden size, C caption channels.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sana.models.attention import CrossAttention, FoldedText, LinearSelfAttention
from sana.models.caches import KeysValues, StepCache, TextCache, TimeCache
from sana.models.layers import (
    NORM_EPS,
    CaptionEmbedder,
    FinalLayer,
    PatchEmbed,
    RMSNorm,
    TimestepEmbedder,
    position_embedding,
    unpatchify,
)
from sana.models.mix_ffn import MixFFN
from sana.ops.gate_residual import gate_residual
from sana.ops.norm_modulate import norm_modulate

CAPTION_NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Everything that decides the network's shape and arithmetic."""

    depth: int
    """Number of blocks."""
    hidden_size: int
    """D, the width of a token."""
    num_heads: int
    """Heads of the cross attention."""
    patch_size: int = 1
    """p: latent values a token covers along each side."""
    in_channels: int = 32
    """Latent channels."""
    out_channels: int = 32
    """Channels of the predicted velocity."""
    mlp_ratio: float = 2.5
    """Inner width of the Mix-FFN over D (each of value and gate)."""
    linear_head_dim: int = 32
    """Channels a head of the linear attention."""
    caption_channels: int = 2304
    """C: the text encoder's hidden size."""
    model_max_length: int = 300
    """Text tokens of the null caption."""
    qk_norm: bool = False
    """RMS norm of queries and keys in the linear attention (SANA-1.5, Sprint)."""
    cross_norm: bool = False
    """The same in the cross attention."""
    use_pe: bool = False
    """Add the sine-cosine position embedding (the 2K and 4K models)."""
    pe_interpolation: float = 1.0
    """Divides the positions."""
    pe_base_size: int | None = None
    """Tokens a side at the training size: latent side / patch_size. None takes the grid's own."""
    y_norm: bool = True
    """RMS norm of the projected caption."""
    y_norm_scale_factor: float = 0.01
    """Initial weight of that norm; no multiplier at run time."""
    class_dropout_prob: float = 0.1
    """Probability, in training, that a sample's caption is replaced by the null caption."""
    fp32_attention: bool = True
    """Compute the linear attention in float32; False keeps half types in its two products."""
    clamp_attention: bool = False
    """Clip the output of the linear attention to +-65504, the range of float16, in every dtype: weights that
    were trained so (the first releases) need it. The reference and diffusers clip when they compute in float16."""
    cfg_embed: bool = False
    """Take the guidance scale as an input, embedded like the timestep (Sprint)."""
    cfg_embed_scale: float = 0.1
    """Multiplies the guidance scale before it is embedded."""
    timestep_norm_scale_factor: float = 1.0
    """Divides the timestep before it is embedded; 1000 in Sprint."""
    kernels: str = "auto"
    """Implementation of the fused operations, `backend` of `sana.ops`: auto, torch or triton."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of storing their activations."""
    checkpointed_blocks: int | None = None
    """With `gradient_checkpointing`: how many blocks, the first ones; None: all."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "linear_head_dim"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of {name} {getattr(self, name)}"
                )
        if self.use_pe and self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4, as use_pe needs")
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob {self.class_dropout_prob} is not in [0, 1]")
        if not self.timestep_norm_scale_factor > 0:
            raise ValueError(
                f"timestep_norm_scale_factor must be above 0, got {self.timestep_norm_scale_factor}"
            )


class SanaBlock(nn.Module):
    """Linear attention, cross attention and Mix-FFN, each with a residual.

    The first and the last are modulated by the timestep through a table of the block's own (adaLN-single).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.attn = LinearSelfAttention(
            dim,
            head_dim=config.linear_head_dim,
            qk_norm=config.qk_norm,
            fp32=config.fp32_attention,
            clamp=config.clamp_attention,
            kernels=config.kernels,
        )
        self.cross_attn = CrossAttention(
            dim, num_heads=config.num_heads, qk_norm=config.cross_norm, kernels=config.kernels
        )
        self.mlp = MixFFN(dim, int(config.mlp_ratio * dim), kernels=config.kernels)
        self.kernels = config.kernels
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def forward(
        self,
        x: torch.Tensor,
        t0: torch.Tensor,
        grid: tuple[int, int],
        text: torch.Tensor | KeysValues | FoldedText,
        mask: torch.Tensor | None,
        *,
        modulated: bool = False,
        perturbed: bool = False,
    ) -> torch.Tensor:
        """x: (B, N, D) -> (B, N, D).

        t0: (B or 1, 6, D), with the block's table in it if `modulated`; text: tokens (B, L, D), or what is cached of
        them; mask: (B, 1, 1, L) bool.
        """
        modulation = t0 if modulated else self.scale_shift_table[None] + t0
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        normed = norm_modulate(x, shift_attn, scale_attn, eps=NORM_EPS, backend=self.kernels)
        x = gate_residual(x, gate_attn, self.attn(normed, perturbed=perturbed), backend=self.kernels)
        x = x + self._read_text(x, text, mask)  # no norm before it and no gate: as published
        normed = norm_modulate(x, shift_mlp, scale_mlp, eps=NORM_EPS, backend=self.kernels)
        return gate_residual(x, gate_mlp, self.mlp(normed, grid), backend=self.kernels)

    def _read_text(
        self, x: torch.Tensor, text: torch.Tensor | KeysValues | FoldedText, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if isinstance(text, FoldedText):
            return self.cross_attn.read(x, text)
        keys, values = self.cross_attn.keys_values(text) if isinstance(text, torch.Tensor) else text
        return self.cross_attn(x, keys, values, mask)


class SanaTransformer(nn.Module):
    """Text-conditional velocity network: v(x_t, t, text).

    Its state dict is that of the published `.pth` files, but for their `pos_embed`, which is recomputed from
    the grid. It works in float32, bfloat16, float16 and under autocast: inputs are cast to the parameters'
    dtype; the timestep's features, RMS norms and (with `fp32_attention`) the linear attention are float32.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        recomputed = config.depth if config.checkpointed_blocks is None else config.checkpointed_blocks
        self.checkpointed = range(recomputed if config.gradient_checkpointing else 0)
        self._axes: dict[tuple, torch.Tensor] = {}  # of the position embedding: in no checkpoint
        dim = config.hidden_size
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        if config.cfg_embed:
            self.cfg_embedder = TimestepEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(config.caption_channels, dim, max_length=config.model_max_length)
        self.attention_y_norm = (
            RMSNorm(dim, eps=CAPTION_NORM_EPS, kernels=config.kernels) if config.y_norm else nn.Identity()
        )
        self.blocks = nn.ModuleList(SanaBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(dim, config.patch_size, config.out_channels, kernels=config.kernels)
        self.initialize_weights()

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, to which inputs are cast."""
        return self.x_embedder.proj.weight.dtype

    def initialize_weights(self) -> None:
        """Initialise for training from scratch, as the reference does; unlike in DiT, no weight is zero."""
        # Every linear layer: Xavier uniform, zero bias.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Convolutions: PyTorch's default, of their constructors; q/k norms likewise stay at one.
        # Patch embedding: Xavier uniform, as a linear layer on the flattened patch; default bias.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        # Embedders of the timestep and the caption: small normal weights.
        caption = self.y_embedder.y_proj
        for linear in (
            self.t_embedder.mlp[0],
            self.t_embedder.mlp[2],
            self.t_block[1],
            caption.fc1,
            caption.fc2,
        ):
            nn.init.normal_(linear.weight, std=0.02)
        # Embedder of the guidance scale: without effect at first.
        if self.config.cfg_embed:
            nn.init.normal_(self.cfg_embedder.mlp[0].weight, std=0.02)
            nn.init.zeros_(self.cfg_embedder.mlp[2].weight)
        # Modulation tables: normal, unit length in expectation.
        for module in (*self.blocks, self.final_layer):
            nn.init.normal_(module.scale_shift_table, std=self.config.hidden_size**-0.5)
        # Null caption: normal, until training sets it to the text encoder's features of the empty prompt.
        nn.init.normal_(self.y_embedder.y_embedding, std=self.config.caption_channels**-0.5)
        # Caption norm: small, so that the text enters the network gently.
        if self.config.y_norm:
            nn.init.constant_(self.attention_y_norm.weight, self.config.y_norm_scale_factor)

    def encode_text(self, text_embeds: torch.Tensor, text_mask: torch.Tensor | None = None) -> TextCache:
        """All that the forward pass computes from the text alone, to pass back as `text_cache`.

        Arguments as in `forward`; no caption is dropped.
        """
        self._check_text(text_embeds)
        text = self._text_tokens(text_embeds)
        mask = self._attention_mask(text_mask, text)
        if mask is not None and mask.all():
            mask = None  # attention without a mask is faster; asking costs a synchronisation, once per prompt
        blocks = []
        for block in self.blocks:
            keys, values = block.cross_attn.keys_values(text)
            folds = block.cross_attn.can_fold(keys)
            blocks.append(block.cross_attn.fold(keys, values, mask) if folds else (keys, values))
        return TextCache(tuple(blocks), mask)

    def encode_time(self, timesteps: torch.Tensor, guidance: float | None = None) -> tuple[TimeCache, ...]:
        """All that the forward pass computes from the time alone, of every step at once: each to pass as `timestep`.

        Args:
            timesteps: (S,) in [0, 1000], one for each step.
            guidance: as in `forward`, for all steps.
        """
        guidances = None if guidance is None else torch.full_like(timesteps, guidance)
        embedding = self._embed_time(timesteps, guidances)  # (S, D)
        tables = torch.stack([block.scale_shift_table for block in self.blocks])
        modulation = tables[:, None] + self.t_block(embedding).unflatten(-1, (6, -1))  # (depth, S, 6, D)
        return tuple(map(TimeCache, modulation.split(1, dim=1), embedding.split(1)))

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor | TimeCache,
        text_embeds: torch.Tensor | None,
        text_mask: torch.Tensor | None = None,
        *,
        text_cache: TextCache | None = None,
        perturbed_blocks: Collection[int] = (),
        drop_caption: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        step_cache: StepCache | None = None,
    ) -> torch.Tensor:
        """Predict the velocity noise - image at noise level `timestep`.

        Args:
            latents: (B, c, h p, w p), scaled.
            timestep: (B,) in [0, 1000], used as given, but for `timestep_norm_scale_factor`; or one of the results of
                `encode_time`, for the whole batch (which then holds the guidance too).
            text_embeds: (B, L, C); unused, and may be None, with `text_cache`.
            text_mask: (B, L), bool or integer, non-zero = valid; None: every token is valid. Where a row has
                no valid token, the image attends to all, as with the reference's additive bias.
            text_cache: result of `encode_text` for the same batch; the output is the same but for rounding.
            perturbed_blocks: blocks whose self-attention becomes proj(V x), for the whole batch.
            drop_caption: (B,) bool, the captions to replace by the null caption. None draws them with
                `class_dropout_prob` in training mode and drops none otherwise.
            guidance: (B,), the guidance scale that the velocity is to have; with `cfg_embed`, and only then.
            step_cache: decides after the first block whether the others run, or what they added in an earlier step is
                added again: an approximation.

        Returns:
            (B, c_out, h p, w p).

        Raises:
            ValueError: sizes that do not fit each other, a block index out of range, or a guidance scale that is
                missing or that the network does not take.
        """
        grid = self._grid(latents)
        perturbed = self._check_blocks(perturbed_blocks)
        if text_cache is not None:
            self._check_cache(text_cache, drop_caption)
            texts, mask, text_batch = text_cache.blocks, text_cache.mask, text_cache.batch
        else:
            text, mask = self._embed_text(text_embeds, text_mask, drop_caption)
            texts, text_batch = [text] * len(self.blocks), len(text)
        times = (len(latents),) if isinstance(timestep, TimeCache) else tuple(timestep.shape)
        if not (len(latents),) == (text_batch,) == times:
            raise ValueError(
                f"one batch is needed, but there are {len(latents)} latents, {text_batch} texts "
                f"and timesteps of shape {times}"
            )

        x = self._embed_latents(latents, grid)
        if modulated := isinstance(timestep, TimeCache):
            t, modulations = timestep.embedding, timestep.blocks
        else:
            t = self._embed_time(timestep, guidance)
            modulations = [self.t_block(t).unflatten(-1, (6, -1))] * len(self.blocks)

        def run(index: int, x: torch.Tensor) -> torch.Tensor:
            block = partial(self.blocks[index], modulated=modulated, perturbed=index in perturbed)
            if index in self.checkpointed and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            return block(x, modulations[index], grid, texts[index], mask)

        entered, x = x, run(0, x)
        if step_cache is not None and step_cache.reuses(x - entered):
            x = x + step_cache.rest
        else:
            first = x
            for index in range(1, len(self.blocks)):
                x = run(index, x)
            if step_cache is not None:
                step_cache.keep(first - entered, x - first)
        return unpatchify(self.final_layer(x, t), grid, self.config.patch_size)

    def _grid(self, latents: torch.Tensor) -> tuple[int, int]:
        """Tokens down and across."""
        p, channels = self.config.patch_size, self.config.in_channels
        if latents.ndim != 4 or latents.shape[1] != channels or latents.shape[2] % p or latents.shape[3] % p:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; "
                f"expected (B, {channels}, H, W) with H and W multiples of {p}"
            )
        return latents.shape[2] // p, latents.shape[3] // p

    def _check_blocks(self, indices: Collection[int]) -> frozenset[int]:
        wrong = sorted(index for index in indices if not 0 <= index < len(self.blocks))
        if wrong:
            raise ValueError(
                f"perturbed_blocks {wrong} out of range: the model has blocks 0 to {len(self.blocks) - 1}"
            )
        return frozenset(indices)

    def _check_cache(self, cache: TextCache, drop_caption: torch.Tensor | None) -> None:
        if drop_caption is not None or (self.training and self.config.class_dropout_prob > 0):
            raise ValueError(
                "captions cannot be dropped with text_cache: call eval(), or pass text_embeds instead"
            )
        if len(cache.blocks) != len(self.blocks):
            raise ValueError(
                f"text_cache is of {len(cache.blocks)} blocks, but the model has {len(self.blocks)}"
            )

    def _embed_time(self, timestep: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor:
        """(B,) and (B,) -> (B, D)."""
        if self.config.cfg_embed != (guidance is not None):
            needed, given = ("a", "none") if guidance is None else ("no", "one")
            raise ValueError(
                f"this network takes {needed} guidance scale as its input (cfg_embed), got {given}"
            )
        t = self.t_embedder(timestep.float() / self.config.timestep_norm_scale_factor)
        if guidance is None:
            return t
        if guidance.shape != timestep.shape:
            raise ValueError(
                f"guidance has shape {tuple(guidance.shape)}, but timesteps have {tuple(timestep.shape)}"
            )
        return t + self.cfg_embedder(guidance.float() * self.config.cfg_embed_scale)

    def _embed_latents(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        x = self.x_embedder(latents.to(self.dtype))
        if not self.config.use_pe:
            return x
        table = position_embedding(
            self.config.hidden_size,
            grid,
            base_size=self.config.pe_base_size,
            interpolation=self.config.pe_interpolation,
            device=x.device,
            dtype=self.dtype,
            # Inside a compiled graph, what is kept outside would make it compile again for each size.
            known=None if torch.compiler.is_compiling() else self._axes,
        )
        return x + table

    def _embed_text(
        self,
        text_embeds: torch.Tensor | None,
        text_mask: torch.Tensor | None,
        drop_caption: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if text_embeds is None:
            raise ValueError("text_embeds is None: pass it, or text_cache")
        self._check_text(text_embeds)
        if drop_caption is None and self.training and self.config.class_dropout_prob > 0:
            drop_caption = (
                torch.rand(len(text_embeds), device=text_embeds.device) < self.config.class_dropout_prob
            )
        if drop_caption is not None:
            text_embeds = self.y_embedder.drop(text_embeds, drop_caption)
        text = self._text_tokens(text_embeds)
        return text, self._attention_mask(text_mask, text)

    def _check_text(self, text_embeds: torch.Tensor) -> None:
        if text_embeds.ndim != 3 or text_embeds.shape[-1] != self.config.caption_channels:
            raise ValueError(
                f"text_embeds has shape {tuple(text_embeds.shape)}; "
                f"expected (B, L, {self.config.caption_channels})"
            )

    def _text_tokens(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """(B, L, C) -> (B, L, D), normalised."""
        return self.attention_y_norm(self.y_embedder(text_embeds.to(self.dtype)))

    @staticmethod
    def _attention_mask(text_mask: torch.Tensor | None, text: torch.Tensor) -> torch.Tensor | None:
        """(B, L) -> (B, 1, 1, L) bool."""
        if text_mask is None:
            return None
        if text_mask.shape != text.shape[:2]:
            raise ValueError(
                f"text_mask has shape {tuple(text_mask.shape)}, but text_embeds is {tuple(text.shape[:2])}"
            )
        valid = text_mask.to(text.device).bool()
        # A row of False would give a softmax over nothing. (No host synchronisation, unlike an error.)
        return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]
