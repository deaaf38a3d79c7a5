"""From prompts to pixels: the only such code in the repository."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sana import loading
from sana.config import SanaConfig, load_config
from sana.diffusion.guidance import Guidance, guided
from sana.diffusion.noise import starting_noise
from sana.diffusion.scm import scm, scm_times
from sana.diffusion.scm import scm_schedule as scm_schedule  # for checks of the samplers
from sana.diffusion.solvers import DEFAULT_STEPS, SOLVERS, Callback
from sana.loading import DEFAULT_CONFIG
from sana.loading import DTYPES as DTYPES  # the names of dtypes, for callers
from sana.models import lora
from sana.models.autoencoder import Autoencoder
from sana.models.sprint import TrigFlow
from sana.models.state_dict import resolve_transformer
from sana.models.text_encoder import NULL_MASKS, TextEncoder, TextFeatures, trim_together, unconditional_mask
from sana.models.transformer import SanaTransformer
from sana.resolution import Table, drawn_size, generation_table, read_sizes
from sana.runtime import decoding
from sana.runtime import offload as offloading
from sana.runtime import quantize as quantizing
from sana.runtime.capture import CapturedTransformer
from sana.runtime.compile import compile_networks
from sana.runtime.heap import keep_freed_memory
from sana.runtime.stages import NonFiniteError as NonFiniteError  # for callers
from sana.runtime.stages import PromptFeatures, pair_prompts, require_finite, require_plain_guidance, stage
from sana.runtime.step_cache import StepCachedTransformer
from sana.utils import hub, images
from sana.utils.logging import get_logger
from sana.utils.seeding import image_seed as image_seed  # for callers that draw one image of many

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLERS = DEFAULT_STEPS
"""Names of the samplers -> their usual number of steps."""

OUTPUT_TYPES = ("tensor", "pil", "latent")

logger = get_logger(__name__)


class SanaPipeline:
    """Text to image with one model; calls share no state, so equal calls give equal images.

    Attributes:
        config: the model's `SanaConfig`.
        transformer, autoencoder, text_encoder: the three networks. One that `offload` has sent away, and the transformer
            before `from_pretrained`, is on the meta device: it has shapes and no memory.
        decode_bytes, decode_tile: `max_bytes` and `tile` of `sana.runtime.decoding.decode`.
        weights: file or folder of the transformer's weights; None before `from_pretrained`.
        loras: (hash of the file, weight) of each adapter that is loaded.
    """

    def __init__(
        self,
        config_path: str | Path | SanaConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        lowercase: bool = False,
        compile: bool = False,
        quantize: str | Mapping[str, str] | None = None,
        offload: str = "none",
    ) -> None:
        """Build the networks of a config and load the weights that it names.

        Args:
            config_path: a YAML file or a loaded config; None is the model shipped with the repository. If its
                `model.load_from` is empty, call `from_pretrained` before drawing.
            device: None takes the GPU where there is one, that of this process under torchrun.
            dtype: of the transformer, also by name ("bf16"); one that the weights were not made for is refused. None is
                the config's `model.mixed_precision` on a GPU, corrected where the weights need another, and float32 on
                a CPU. The autoencoder runs in the config's `vae.weight_dtype` and the text encoder in bfloat16, as the
                published ones were trained; on a CPU both in float32, or in bfloat16 where that is what you ask for.
            lowercase: lower-case and strip prompts, as diffusers does. The published models were trained without.
            compile: compile the transformer, see `compile`.
            quantize: {"transformer": kind, "text_encoder": kind} or "transformer=int8,text_encoder=nf4", with kinds of
                `sana.runtime.quantize.KINDS`.
            offload: a mode of `sana.runtime.offload.TOGETHER`: which networks are on the device at the same time.

        Raises:
            ValueError: a bad config, a part of the model that is missing or does not fit, or what this device cannot do.
        """
        config = config_path
        if not isinstance(config, SanaConfig):
            config = load_config(hub.resolve(config or DEFAULT_CONFIG))
        self.config, self._device = config, loading.find_device(device)
        self._wanted_dtype, self._lowercase = loading.find_dtype(dtype), lowercase
        self.quantize, self.offload = quantizing.parse(quantize), offload
        quantizing.check(self.quantize, self.device)
        offloading.check(offload, quantized=bool(self.quantize), compile=compile)
        path = config.model.load_from
        self._path, self.loras, self._adapters = path, (), []
        # First: what is wrong with the weights is known before gigabytes of text encoder are read.
        transformer = self._read("transformer") if path else loading.empty_transformer(config)
        offloading.make_way(self.offload, self.device, "text_encoder", {"transformer": transformer})
        self.weights = resolve_transformer(path) if path else None
        autoencoder = self._read("autoencoder")
        offloading.make_way(self.offload, self.device, "text_encoder", {"autoencoder": autoencoder})
        self._assemble(config, transformer, autoencoder, self._read("text_encoder"))
        self._ready = self.weights is not None
        if compile:
            self.compile()

    @classmethod
    def from_folder(cls, path: str | Path, overrides: Sequence[str] = (), **settings: Any) -> SanaPipeline:
        """A pipeline of a checkpoint alone, without a config: `sana.loading.config_for` finds or guesses one.

        Args:
            path: a diffusers pipeline folder, whose autoencoder and text encoder are used too; a .safetensors file with
                its config in it; or any file or folder of transformer weights. Local, `hf://owner/repo/path` or
                `owner/name`.
            overrides: words that change its config, such as "scheduler.flow_shift=4".
            settings: as in `SanaPipeline`.

        Raises:
            ValueError: nothing is there, or it is no checkpoint of a known architecture.
        """
        return cls(loading.config_for(path, overrides), **settings)

    @classmethod
    def from_components(
        cls,
        config: SanaConfig,
        transformer: SanaTransformer,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
    ) -> SanaPipeline:
        """A pipeline of networks that exist already, on one device, as they are (the trainer draws its samples so).

        The transformer must be in eval mode when the pipeline is called.
        """
        pipeline = cls.__new__(cls)
        pipeline._device, pipeline._wanted_dtype, pipeline.weights = None, transformer.dtype, None
        pipeline._path, pipeline.loras, pipeline._adapters = None, (), []
        pipeline.quantize, pipeline.offload = {}, "none"
        pipeline._assemble(config, transformer, autoencoder, text_encoder)
        return pipeline

    def _assemble(
        self,
        config: SanaConfig,
        transformer: SanaTransformer,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
    ) -> None:
        for what, has, needs in (
            ("text encoder's width", text_encoder.hidden_size, transformer.config.caption_channels),
            (
                "autoencoder's number of latent channels",
                autoencoder.latent_channels,
                transformer.config.in_channels,
            ),
        ):
            if has != needs:
                raise ValueError(
                    f"the {what} {has} is not the {needs} that the transformer reads: use its own parts"
                )
        self.config, self.transformer = config, transformer
        self._wrapped: Callable[..., Tensor] | None = None  # the transformer, captured or with a step cache
        self._compiled, self._step_threshold = False, None
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        keep_freed_memory(self.device)
        self._weights_sha256: str | None = None
        self._ready = True
        self.decode_bytes: int | None = None
        self.decode_tile: int | None = None
        # Pixels that one token covers along each side: what an image's sides must be multiples of.
        self.multiple = autoencoder.downsample * transformer.config.patch_size
        # The table of generation, as in the reference, without the extreme ratios of training.
        self.buckets: Table = generation_table(config.model.image_size, self.multiple)

    def from_pretrained(self, path: str | Path) -> SanaPipeline:
        """Load the transformer's weights, strictly, and return self. Adapters that were loaded are gone.

        Args:
            path: .pth or .safetensors file, sharded index, or a diffusers folder (of the transformer or a whole
                pipeline, of which only the transformer is read); `hf://owner/repo/path` and `owner/name` are fetched.

        Raises:
            ValueError: nothing is there, names or shapes differ from the model's, or the `dtype` that this pipeline was
                made with is not one of those weights. The pipeline is then as it was.
        """
        before = (self._path, self._adapters)
        self._path, self._adapters = path, []
        try:
            transformer = self._read("transformer")
        except ValueError:
            self._path, self._adapters = before
            raise
        self.transformer = transformer
        self.weights = resolve_transformer(path)
        self._wrap_transformer()
        self._weights_sha256, self._ready, self.loras = None, True, ()
        offloading.make_way(self.offload, self.device, "text_encoder", {"transformer": transformer})
        return self.compile() if self._compiled else self

    def compile(self) -> SanaPipeline:
        """Compile the transformer's blocks, on a GPU also the decoder, and capture steps as CUDA graphs; returns self.

        The first image of a new size or batch then takes some seconds to a minute more, and later ones less time than
        without. Weights that `from_pretrained` loads afterwards are compiled too.
        """
        self._compiled = True
        if self._ready:
            rows = 2 * (self.config.model.image_size // self.multiple) ** 2
            compile_networks(self.transformer, self.autoencoder.model.decoder, rows=rows)
        self._wrap_transformer()
        return self

    def cache_steps(self, threshold: float | None) -> SanaPipeline:
        """Run only the first block where it changes little between steps, see `StepCache`; None: never. Returns self.

        Raises:
            ValueError: it is not above 0, or the steps are captured, in which nothing can be decided.
        """
        if threshold is not None and isinstance(self._wrapped, CapturedTransformer):
            raise ValueError(
                "a step cache decides in each step, which a captured step cannot: leave out compile"
            )
        self._step_threshold = threshold
        self._wrap_transformer()
        return self

    def _wrap_transformer(self) -> None:
        """Make `_wrapped` anew."""
        self._wrapped = None
        if self._step_threshold is not None:
            self._wrapped = StepCachedTransformer(self.transformer, self._step_threshold)
        elif self._compiled and self.device.type == "cuda":
            self._wrapped = CapturedTransformer(self.transformer)

    def load_lora(self, path: str | Path, weight: float = 1.0) -> SanaPipeline:
        """Add an adapter (LoRA, with the keys of peft or diffusers) to the transformer, times `weight`; returns self.

        Raises:
            ValueError: nothing is there, it does not fit the transformer, no weights are loaded, or they are quantised.
        """
        self._require_weights()
        if "transformer" in self.quantize or self.offload == "sequential":
            raise ValueError(
                "an adapter is added into the weights, which must not be quantised or offloaded layer by layer: "
                "leave out quantize transformer and offload sequential"
            )
        lora.load_lora(self._need("transformer"), path, weight)
        self._adapters.append((path, weight))
        self.loras += ((hub.sha256(hub.resolve_model(path)), weight),)
        return self

    def unload_lora(self) -> None:
        """Take all adapters away again."""
        if not offloading.is_dropped(self.transformer):  # else they are not added when it comes back
            lora.unload_lora(self.transformer)
        self.loras, self._adapters = (), []

    @property
    def weights_sha256(self) -> str | None:
        """Hash of the transformer's weights as they lie on disk; None if they came from no file."""
        if self._weights_sha256 is None and self.weights is not None:
            self._weights_sha256 = hub.sha256(self.weights)
        return self._weights_sha256

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return self._device or next(self.autoencoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return self.transformer.dtype

    @property
    def flow_shift(self) -> float:
        """Shift of the time grid: `scheduler.inference_flow_shift`, else that of training."""
        return self.config.scheduler.sampling_shift

    @torch.no_grad()
    def __call__(  # noqa: PLR0913 the published signature
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float = 4.5,
        pag_guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        use_resolution_binning: bool = True,
        *,
        seed: int | Sequence[int] | None = None,
        sampler: str | None = None,
        interval_guidance: tuple[float, float] = (0.0, 1.0),
        null_mask: str = "prompt",
        max_timesteps: float | None = None,
        intermediate_timesteps: float | None = None,
        timesteps: Sequence[float] | None = None,
        output_type: str = "tensor",
        callback: Callback | None = None,
        features: PromptFeatures | None = None,
    ) -> Tensor | list[Image]:
        """Draw `num_images_per_prompt` images of each prompt, in one batch, in the order of the prompts.

        Args:
            prompt: one or several; may be empty. `--ar H:W` (or `--aspect_ratio`) and `--hw H:W` inside a prompt come
                before `height` and `width` and are taken out of its text; all prompts of a call need one size.
            height, width: in pixels; None is the model's own size.
            negative_prompt: what to steer away from: one for all prompts, or one for each.
            num_inference_steps: network evaluations (twice as many with guidance); None is the sampler's usual number.
            guidance_scale: of classifier-free guidance; 1 turns it off. Sprint models get it as an input.
            pag_guidance_scale: of perturbed-attention guidance; 1 turns it off.
            generator: the noise is drawn from it, prompt by prompt, on its device.
            latents: the noise itself, (n, C, H/32, W/32); what scm draws after it is that of seed 0.
            use_resolution_binning: draw at the nearest size of the model's table, then scale and crop to
                (height, width). Without it, draw at that size, whose sides must be multiples of 32.
            seed: the noise of sample j of prompt i is drawn on the CPU from (seed, i, j), so that it is the same on
                every device and does not depend on the other images; or one seed for each image. 0 if neither
                `generator` nor `latents` nor `seed` is given.
            sampler: "flow_dpm-solver" or "flow_euler", for Sprint models "scm"; None is the config's
                `scheduler.vis_sampler`.
            interval_guidance: (lo, hi); classifier-free guidance acts for lo < t < hi only.
            null_mask: the tokens of the negative or empty prompt that the network attends to: "prompt", as many as the
                prompt has, as in training and in the reference; "own", its own, as diffusers does.
            max_timesteps, intermediate_timesteps: angles of scm, as in `sana.diffusion.scm.scm_schedule`: the first, and the
                second of two steps. None: 1.5708 and 1.3.
            timesteps: or all of its angles, the last of them 0: one more than steps.
            output_type: "tensor", "pil", or "latent" for what the autoencoder would decode, at the size drawn.
            callback: called after every step as callback(step, total, x, x0), see `sana.diffusion.solvers.Callback`. An
                exception that it raises ends the call and leaves nothing behind.
            features: what `encode` made of these prompts, negative prompts and settings; then the text encoder rests.

        Returns:
            (n, 3, height, width) float32 in about [-1, 1] on `device`, or n pictures, or latents (n, C, H/32, W/32).

        Raises:
            ValueError: a setting out of range; for a size that cannot be, the message holds the nearest that can.
            NonFiniteError: the latents or pixels are not finite.
            MemoryError: memory ran out; says at which stage. `sana.runtime.decoding.DecodeError` holds the latents.
        """
        sampler = sampler or self.config.scheduler.vis_sampler
        self._check(sampler, output_type, null_mask, num_images_per_prompt)
        angles = (max_timesteps, intermediate_timesteps, timesteps)
        if sampler != "scm" and angles != (None, None, None):
            raise ValueError(
                f"max_timesteps, intermediate_timesteps and timesteps belong to sampler scm, not {sampler}"
            )
        times = scm_times(num_inference_steps, *angles) if sampler == "scm" else None
        steps = SAMPLERS[sampler] if num_inference_steps is None else num_inference_steps
        own = self.config.model.image_size
        default = (own if height is None else height, own if width is None else width)
        prompts, asked = read_sizes([prompt] if isinstance(prompt, str) else prompt, default, self.buckets)
        size, drawn_size = self.sizes(*asked, use_resolution_binning)
        prompts, negatives = pair_prompts(prompts, negative_prompt, num_images_per_prompt)
        guidance = Guidance(
            guidance_scale, interval_guidance, pag_guidance_scale, tuple(self.config.model.pag_applied_layers)
        )

        side = self.autoencoder.downsample
        shape = (self.autoencoder.latent_channels, drawn_size[0] // side, drawn_size[1] // side)
        noise, noise_like = starting_noise(
            len(prompts),
            num_images_per_prompt,
            shape,
            self.device,
            generator=generator,
            latents=latents,
            seed=seed,
        )
        if sampler == "scm":
            require_plain_guidance(negatives, uses_pag=guidance.uses_pag, interval=guidance.interval)
        if features is None:
            features = self.encode(prompts, negatives, null_mask=null_mask, sampler=sampler)
        text, null = features.text, features.null
        self._need("transformer")
        with stage("drawing {} at {} x {}".format(len(prompts), *drawn_size)):
            if null is None:  # guidance is an input of the network, so there is no unconditional branch
                network = TrigFlow(self.transformer, text.embeds, text.mask, guidance=guidance.scale)
                latents = scm(network, noise, times, noise_like, callback=callback)
            else:
                schedule, solver = SOLVERS[sampler]
                sigmas = schedule(steps, shift=self.flow_shift)
                velocity = guided(
                    self._wrapped or self.transformer, text, null, guidance, sigmas[:-1].tolist()
                )
                latents = solver(velocity, noise, sigmas, callback=callback)
        self._require_finite("latents", latents)
        return latents if output_type == "latent" else self.decode(latents, size, output_type)

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        *,
        null_mask: str = "prompt",
        sampler: str | None = None,
    ) -> PromptFeatures:
        """What `__call__` computes of prompts, without size options in them, and of as many negative prompts."""
        encoder = self._need("text_encoder")
        with stage(f"encoding the text of {len(prompts)} prompts"):
            text = encoder.encode(prompts)
            if (sampler or self.config.scheduler.vis_sampler) == "scm":
                return PromptFeatures(text.trimmed(), None)
            null = encoder.encode_unconditional(negative_prompts)
            null = TextFeatures(null.embeds, unconditional_mask(text.mask, null.mask, null_mask))
            return PromptFeatures(*trim_together(text, null))  # no work on padding

    @torch.no_grad()
    def decode(
        self, latents: Tensor, size: tuple[int, int], output_type: str = "tensor"
    ) -> Tensor | list[Image]:
        """From latents (n, C, h, w) to pixels or pictures of `size` (height, width); arguments and errors as in `__call__`."""
        autoencoder = self._need("autoencoder")
        pixels = decoding.decode(autoencoder, latents, max_bytes=self.decode_bytes, tile=self.decode_tile)
        with stage(f"making a picture of {size[0]} x {size[1]} pixels"):
            pixels = pixels.float()
            self._require_finite("pixels", pixels)
            pixels = images.cover(pixels, *size)
            return images.to_pil(pixels) if output_type == "pil" else pixels

    @stage("reading weights")
    def _read(self, name: str) -> Any:
        """One of the networks from its files, with what is to be done to its weights."""
        # What waits in the CPU's memory comes to a GPU when it is needed.
        alone = offloading.others(self.offload, name)
        device = torch.device("cpu") if alone and self.device.type != "cpu" else self.device
        # On a CPU an explicit bfloat16 is meant for all three.
        half = torch.bfloat16 if (self.device.type, self._wanted_dtype) == ("cpu", torch.bfloat16) else None
        if name == "autoencoder":
            return loading.load_autoencoder(self.config, device, half)
        layered = self.offload == "sequential"
        finish = quantizing.finisher(self.quantize[name], name) if name in self.quantize else None
        if name == "text_encoder":
            if layered:
                finish = offloading.layer_by_layer(self.device)
            return loading.load_text_encoder(
                self.config, device, lowercase=self._lowercase, dtype=half, finish=finish
            )
        if layered:
            finish = offloading.layer_by_layer(self.device, loading.load_transformer_state(self._path))
        transformer = loading.load_transformer(
            self.config, self._path, dtype=self._wanted_dtype, device=device, finish=finish
        )
        for path, weight in self._adapters:
            lora.load_lora(transformer, path, weight)
        return transformer

    def _need(self, name: str) -> Any:
        """The network `name` on the device, and those gone that cannot be there together with it."""
        if self.offload != "none" and offloading.bring(self, name, self._read) and name == "transformer":
            self.compile() if self._compiled else self._wrap_transformer()
        return getattr(self, name)

    def _require_weights(self) -> None:
        if not self._ready:
            raise ValueError(
                "no weights are loaded: call from_pretrained(path), or set model.load_from in the config"
            )

    def _check(self, sampler: str, output_type: str, null_mask: str, num_images_per_prompt: int) -> None:
        self._require_weights()
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; choose from {', '.join(SAMPLERS)}")
        if (sampler == "scm") != self.transformer.config.cfg_embed:
            raise ValueError(
                f"sampler {sampler!r} does not fit {self.config.model.model}: scm is for networks that take the guidance "
                "scale as an input (Sprint) and the only one for them"
            )
        for name, value, choices in (
            ("output_type", output_type, OUTPUT_TYPES),
            ("null_mask", null_mask, NULL_MASKS),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")

    def sizes(self, height: int, width: int, binning: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """((height, width) asked for, (height, width) to draw at); arguments and error as in `__call__`."""
        drawn = drawn_size(height, width, self.buckets, multiple=self.multiple, binning=binning)
        return (height, width), drawn

    def _require_finite(self, what: str, values: Tensor) -> None:
        hint = (
            f"with the transformer in {self.dtype} and the autoencoder in {self.autoencoder.dtype}: use the dtype that the "
            "weights were trained in, or dtype='fp32'"
        )
        require_finite(what, values, hint)
