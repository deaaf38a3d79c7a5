"""From prompts to pixels: the only such code in the repository."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sana import loading
from sana.config import SanaConfig, load_config
from sana.diffusion.guidance import Guidance, guided
from sana.diffusion.scm import FreshNoise, scm, scm_times
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
from sana.resolution import TABLES, Table, nearest_bucket, parse_prompt_size
from sana.runtime.capture import CapturedTransformer
from sana.runtime.compile import compile_blocks
from sana.runtime.step_cache import StepCachedTransformer
from sana.utils import hub, images, seeding
from sana.utils.logging import get_logger
from sana.utils.seeding import image_seed as image_seed  # for callers that draw one image of many

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLERS = DEFAULT_STEPS
"""Names of the samplers -> their usual number of steps."""

OUTPUT_TYPES = ("tensor", "pil", "latent")

logger = get_logger(__name__)


class NonFiniteError(ArithmeticError):
    """Latents or pixels hold NaN or infinity: nothing that could be shown."""


class SanaPipeline:
    """Text to image with one model; calls share no state, so equal calls give equal images.

    Attributes:
        config: the model's `SanaConfig`.
        transformer, autoencoder, text_encoder: the three networks. Before `from_pretrained` the transformer is on the
            meta device: it has shapes and no memory.
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
    ) -> None:
        """Build the networks of a config and load the weights that it names.

        Args:
            config_path: a YAML file or a loaded config; None is the model shipped with the repository. If its
                `model.load_from` is empty, call `from_pretrained` before drawing.
            device: None takes the GPU where there is one, that of this process under torchrun.
            dtype: of the transformer, also by name ("bf16"); one that the weights were not made for is refused. None is
                the config's `model.mixed_precision` on a GPU, corrected where the weights need another, and float32 on
                a CPU. The autoencoder runs in the config's `vae.weight_dtype` and the text encoder in bfloat16, as the
                published ones were trained, both in float32 on a CPU.
            lowercase: lower-case and strip prompts, as diffusers does. The published models were trained without.
            compile: compile the transformer, see `compile`.

        Raises:
            ValueError: a bad config, or a part of the model that is missing or does not fit.
        """
        config = config_path
        if not isinstance(config, SanaConfig):
            config = load_config(hub.resolve(config or DEFAULT_CONFIG))
        device, dtype = loading.find_device(device), loading.find_dtype(dtype)
        path, weights = config.model.load_from, None
        if path:  # first: what is wrong with the weights is known before gigabytes of text encoder are read
            transformer = loading.load_transformer(config, path, dtype=dtype, device=device)
            weights = resolve_transformer(path)
        else:
            transformer = loading.empty_transformer(config)
        autoencoder = loading.load_autoencoder(config, device)
        text_encoder = loading.load_text_encoder(config, device, lowercase=lowercase)
        self._assemble(config, transformer, autoencoder, text_encoder)
        self.weights, self._ready, self._wanted_dtype = weights, weights is not None, dtype
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
        self._network: Callable[..., Tensor] = transformer  # as the sampler calls it
        self._compiled, self._step_threshold = False, None
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.weights: Path | None = None
        self.loras: tuple[tuple[str, float], ...] = ()
        self._weights_sha256: str | None = None
        self._wanted_dtype: torch.dtype | None = transformer.dtype
        self._ready = True
        # Pixels that one token covers along each side: what an image's sides must be multiples of.
        self.multiple = autoencoder.downsample * transformer.config.patch_size
        own = config.model.image_size
        # The table of generation, as in the reference, without the extreme ratios of training.
        table = TABLES.get(f"ASPECT_RATIO_{own}_TEST", {"1.0": (own, own)})
        self.buckets: Table = {  # some sides at 256 pixels are multiples of 16 only
            key: size for key, size in table.items() if not any(side % self.multiple for side in size)
        }

    def from_pretrained(self, path: str | Path) -> SanaPipeline:
        """Load the transformer's weights, strictly, and return self. Adapters that were loaded are gone.

        Args:
            path: .pth or .safetensors file, sharded index, or a diffusers folder (of the transformer or a whole
                pipeline, of which only the transformer is read); `hf://owner/repo/path` and `owner/name` are fetched.

        Raises:
            ValueError: nothing is there, names or shapes differ from the model's, or the `dtype` that this pipeline was
                made with is not one of those weights. The pipeline is then as it was.
        """
        self.transformer = loading.load_transformer(
            self.config, path, dtype=self._wanted_dtype, device=self.device
        )
        self.weights = resolve_transformer(path)
        self._wrap_transformer()
        self._weights_sha256, self._ready, self.loras = None, True, ()
        return self.compile() if self._compiled else self

    def compile(self) -> SanaPipeline:
        """Compile the transformer's blocks, and on a GPU capture each step as one CUDA graph; returns self.

        The first image of a new size or batch then takes some seconds to a minute more, and later ones less time than
        without. Weights that `from_pretrained` loads afterwards are compiled too.
        """
        self._compiled = True
        if self._ready:
            tokens = (self.config.model.image_size // self.multiple) ** 2
            compile_blocks(self.transformer, rows=2 * tokens)
        self._wrap_transformer()
        return self

    def cache_steps(self, threshold: float | None) -> SanaPipeline:
        """Run only the first block where it changes little between steps, see `StepCache`; None: never. Returns self.

        Raises:
            ValueError: it is not above 0, or the steps are captured, in which nothing can be decided.
        """
        if threshold is not None and isinstance(self._network, CapturedTransformer):
            raise ValueError(
                "a step cache decides in each step, which a captured step cannot: leave out compile"
            )
        self._step_threshold = threshold
        self._wrap_transformer()
        return self

    def _wrap_transformer(self) -> None:
        """Set `_network`: the transformer as the sampler calls it."""
        self._network = self.transformer
        if self._step_threshold is not None:
            self._network = StepCachedTransformer(self.transformer, self._step_threshold)
        elif self._compiled and self.device.type == "cuda":
            self._network = CapturedTransformer(self.transformer)

    def load_lora(self, path: str | Path, weight: float = 1.0) -> SanaPipeline:
        """Add an adapter (LoRA, with the keys of peft or diffusers) to the transformer, times `weight`; returns self.

        Raises:
            ValueError: nothing is there, it does not fit the transformer, or no weights are loaded.
        """
        self._require_weights()
        lora.load_lora(self.transformer, path, weight)
        self.loras += ((hub.sha256(hub.resolve_model(path)), weight),)
        return self

    def unload_lora(self) -> None:
        """Take all adapters away again."""
        lora.unload_lora(self.transformer)
        self.loras = ()

    @property
    def weights_sha256(self) -> str | None:
        """Hash of the transformer's weights as they lie on disk; None if they came from no file."""
        if self._weights_sha256 is None and self.weights is not None:
            self._weights_sha256 = hub.sha256(self.weights)
        return self._weights_sha256

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.autoencoder.parameters()).device

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

        Returns:
            (n, 3, height, width) float32 in about [-1, 1] on `device`, or n pictures, or latents (n, C, H/32, W/32).

        Raises:
            ValueError: a setting out of range; for a size that cannot be, the message holds the nearest that can.
            NonFiniteError: the latents or pixels are not finite.
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
        prompts, asked = self._read_sizes(prompt, height, width)
        size, drawn_size = self.sizes(*asked, use_resolution_binning)
        prompts, negatives = _pair_prompts(prompts, negative_prompt, num_images_per_prompt)
        guidance = Guidance(
            guidance_scale, interval_guidance, pag_guidance_scale, tuple(self.config.model.pag_applied_layers)
        )

        noise, noise_like = self._noise(
            len(prompts), num_images_per_prompt, drawn_size, generator, latents, seed
        )
        text = self.text_encoder.encode(prompts)
        if sampler == "scm":  # guidance is an input of the network, so there is no unconditional branch
            _require_plain_guidance(guidance, negatives)
            text = text.trimmed()
            network = TrigFlow(self.transformer, text.embeds, text.mask, guidance=guidance.scale)
            latents = scm(network, noise, times, noise_like, callback=callback)
        else:
            null = self.text_encoder.encode_unconditional(negatives)
            null = TextFeatures(null.embeds, unconditional_mask(text.mask, null.mask, null_mask))
            text, null = trim_together(text, null)  # no work on padding
            schedule, solver = SOLVERS[sampler]
            sigmas = schedule(steps, shift=self.flow_shift)
            velocity = guided(self._network, text, null, guidance, sigmas[:-1].tolist())
            latents = solver(velocity, noise, sigmas, callback=callback)
        self._require_finite("latents", latents)
        if output_type == "latent":
            return latents
        pixels = self.autoencoder.decode(latents).float()
        self._require_finite("pixels", pixels)
        pixels = images.cover(pixels, *size)
        return images.to_pil(pixels) if output_type == "pil" else pixels

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

    def _read_sizes(
        self, prompt: str | Sequence[str], height: int | None, width: int | None
    ) -> tuple[list[str], tuple[int, int]]:
        """The prompts without their size options, and the one (height, width) that all of them ask for."""
        own = self.config.model.image_size
        default = (own if height is None else height, own if width is None else width)
        parsed = [
            parse_prompt_size(text, self.buckets)
            for text in ([prompt] if isinstance(prompt, str) else prompt)
        ]
        sizes = dict.fromkeys(size or default for _, size in parsed)
        if len(sizes) > 1:
            listed = ", ".join(f"{height} x {width}" for height, width in sizes)
            raise ValueError(
                f"one call draws one size, but these prompts ask for {listed}: call once for each (sana.generation does)"
            )
        return [text for text, _ in parsed], next(iter(sizes), default)

    def sizes(self, height: int, width: int, binning: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """((height, width) asked for, (height, width) to draw at); arguments and error as in `__call__`."""
        if (
            binning and (height, width) in self.buckets.values()
        ):  # some keys of 2880 are not their sizes' ratios
            return (height, width), (height, width)
        if binning and height > 0 and width > 0:
            drawn = nearest_bucket(height, width, self.buckets)[1]
            ratios = [float(key) for key in self.buckets]
            if not min(ratios) - 0.01 <= height / width <= max(ratios) + 0.01:
                raise ValueError(
                    f"the model draws height / width from {min(ratios)} to {max(ratios)}, not {height} x {width}; the "
                    f"nearest size is {drawn[0]} x {drawn[1]}"
                )
            if height * width > 2 * drawn[0] * drawn[1]:
                logger.warning("drawn at %d x %d and enlarged to %d x %d", *drawn, height, width)
            return (height, width), drawn
        if height <= 0 or width <= 0 or height % self.multiple or width % self.multiple:
            near = [
                max(self.multiple, round(side / self.multiple) * self.multiple) for side in (height, width)
            ]
            raise ValueError(
                f"height and width must be positive multiples of {self.multiple}, got {height} x {width}; the nearest "
                f"size is {near[0]} x {near[1]}, or let use_resolution_binning scale and crop"
            )
        return (height, width), (height, width)

    def _noise(
        self,
        count: int,
        copies: int,
        size: tuple[int, int],
        generator: torch.Generator | None,
        latents: Tensor | None,
        seed: int | Sequence[int] | None,
    ) -> tuple[Tensor, FreshNoise]:
        """Noise (count, C, H/32, W/32), float32 on the device, and a source of more of it for the steps of scm.

        Images come in groups of `copies` for each prompt.
        """
        if sum(source is not None for source in (generator, latents, seed)) > 1:
            raise ValueError("generator, latents and seed each decide the noise: give one of them")
        shape = (self.autoencoder.latent_channels, *(side // self.autoencoder.downsample for side in size))
        if latents is not None and latents.shape != (count, *shape):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; these prompts and size need {(count, *shape)}"
            )
        if generator is not None:
            sources, group = [generator] * (count // copies), copies
        else:
            seeds = seeding.image_seeds(seed, count, copies)
            sources, group = [torch.Generator().manual_seed(image_seed) for image_seed in seeds], 1

        def draw() -> Tensor:
            parts = [torch.randn((group, *shape), generator=own, device=own.device) for own in sources]
            return torch.cat(parts).to(self.device)

        noise = draw()
        return noise if latents is None else latents.to(noise), lambda step: draw()

    def _require_finite(self, what: str, values: Tensor) -> None:
        """NaN turns into a black picture if nobody looks."""
        bad = (~values.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteError(
                f"the {what} of image(s) {', '.join(map(str, bad))} are not finite, with the transformer in {self.dtype} and "
                f"the autoencoder in {self.autoencoder.dtype}: use the dtype that the weights were trained in, or dtype='fp32'"
            )


def _require_plain_guidance(guidance: Guidance, negatives: Sequence[str]) -> None:
    if any(negatives) or guidance.uses_pag or guidance.interval != (0, 1):
        raise ValueError(
            "sampler scm has no unconditional branch: a negative prompt, a PAG scale above 1 or a guidance interval would "
            "have no effect; leave them out"
        )


def _pair_prompts(
    prompts: Sequence[str], negative_prompt: str | Sequence[str], copies: int
) -> tuple[list[str], list[str]]:
    """Prompt and negative prompt of each image."""
    if not prompts:
        raise ValueError("an empty list of prompts; give at least one (which may be the empty text)")
    negatives = (
        [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
    )
    if len(negatives) != len(prompts):
        raise ValueError(
            f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one for each, or one for all"
        )
    repeated = ([text for text in texts for _ in range(copies)] for texts in (prompts, negatives))
    return tuple(repeated)
