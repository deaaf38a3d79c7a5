"""From prompts to pixels: the only such code in the repository."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.config import SanaConfig, load_config, transformer_overrides
from sana.diffusion.guidance import Guidance, guided
from sana.diffusion.solvers import DEFAULT_STEPS, SOLVERS, Callback
from sana.models.autoencoder import Autoencoder
from sana.models.state_dict import load_into, load_transformer_state
from sana.models.text_encoder import TextEncoder, TextFeatures
from sana.models.transformer import SanaTransformer
from sana.models.zoo import build_transformer
from sana.resolution import TABLES, Table, nearest_bucket
from sana.utils import distributed, hub, images, seeding
from sana.utils.logging import get_logger

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_CONFIG = "configs/sana_config/tiny/Sana_tiny_img256.yaml"
"""The model that the repository trained itself and ships."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
"""Names in configs and on the command line -> dtype."""
SAMPLERS = DEFAULT_STEPS
"""Names of the samplers -> their usual number of steps."""

logger = get_logger(__name__)


class NonFiniteError(ArithmeticError):
    """Latents or pixels hold NaN or infinity: nothing that could be shown."""


class SanaPipeline:
    """Text to image with one model; calls share no state, so equal calls give equal images.

    Attributes:
        config: the model's `SanaConfig`.
        transformer, autoencoder, text_encoder: the three networks, on `device`.
        weights: file or folder of the transformer's weights; None before `from_pretrained`.
    """

    def __init__(
        self,
        config_path: str | Path | SanaConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        """Build the networks of a config and load the weights that it names.

        Args:
            config_path: a YAML file or a loaded config; None is the model shipped with the repository. If its
                `model.load_from` is empty, call `from_pretrained` before drawing.
            device: None takes the GPU where there is one, that of this process under torchrun.
            dtype: of the transformer, also by name ("bf16"). None is the config's `model.mixed_precision` on a GPU and
                float32 on a CPU. The autoencoder runs in the config's `vae.weight_dtype` and the text encoder in
                bfloat16, as the published ones were trained, both in float32 on a CPU.

        Raises:
            ValueError: a bad config, or a part of the model that is missing or does not fit.
        """
        config = config_path
        if not isinstance(config, SanaConfig):
            config = load_config(hub.resolve(config or DEFAULT_CONFIG))
        device = _device(device)
        on_cpu = device.type == "cpu"
        dtype = _dtype(dtype or ("fp32" if on_cpu else config.model.mixed_precision))
        overrides = transformer_overrides(config)
        if dtype == torch.bfloat16:
            overrides["fp32_attention"] = False  # bfloat16 has float32's range: only float16 sums overflow
        transformer = build_transformer(config.model.model, **overrides)
        self._assemble(
            config,
            transformer.to(device, dtype).eval().requires_grad_(False),
            Autoencoder.from_pretrained(
                config.vae.vae_pretrained,
                dtype=torch.float32 if on_cpu else _dtype(config.vae.weight_dtype),
                device=device,
            ),
            TextEncoder.from_pretrained(
                config.text_encoder.text_encoder_name,
                max_length=config.text_encoder.model_max_length,
                chi_prompt=config.text_encoder.chi_prompt,
                dtype=torch.float32 if on_cpu else torch.bfloat16,
                device=device,
            ),
        )
        self._ready = False
        if config.model.load_from:
            self.from_pretrained(config.model.load_from)

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
        self.config, self.transformer = config, transformer
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.weights: Path | None = None
        self._weights_sha256: str | None = None
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
        """Load the transformer's weights, strictly, and return self.

        Args:
            path: .pth or .safetensors file; `hf://owner/repo/path` is fetched.

        Raises:
            ValueError: nothing is there, or names or shapes differ from the model's.
        """
        weights = hub.resolve(path)
        load_into(self.transformer, load_transformer_state(weights))
        self.weights, self._weights_sha256, self._ready = weights, None, True
        return self

    @property
    def weights_sha256(self) -> str | None:
        """Hash of the transformer's weights as they lie on disk; None if they came from no file."""
        if self._weights_sha256 is None and self.weights is not None:
            self._weights_sha256 = hub.sha256(self.weights)
        return self._weights_sha256

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.transformer.parameters()).device

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
        num_inference_steps: int | None = 20,
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
        output_type: str = "tensor",
        callback: Callback | None = None,
    ) -> Tensor | list[Image]:
        """Draw `num_images_per_prompt` images of each prompt, in one batch, in the order of the prompts.

        Args:
            prompt: one or several; may be empty.
            height, width: in pixels; None is the model's own size.
            negative_prompt: what to steer away from: one for all prompts, or one for each.
            num_inference_steps: network evaluations (twice as many with guidance); None is the sampler's usual number.
            guidance_scale: of classifier-free guidance; 1 turns it off.
            pag_guidance_scale: of perturbed-attention guidance; 1 turns it off.
            generator: the noise is drawn from it, prompt by prompt, on its device.
            latents: the noise itself, (n, C, H/32, W/32).
            use_resolution_binning: draw at the nearest size of the model's table, then scale and crop to
                (height, width). Without it, draw at that size, whose sides must be multiples of 32.
            seed: the noise of sample j of prompt i is drawn on the CPU from (seed, i, j), so that it is the same on
                every device and does not depend on the other images; or one seed for each image. 0 if neither
                `generator` nor `latents` nor `seed` is given.
            sampler: "flow_dpm-solver" or "flow_euler"; None is the config's `scheduler.vis_sampler`.
            interval_guidance: (lo, hi); classifier-free guidance acts for lo < t < hi only.
            output_type: "tensor" or "pil".
            callback: called after every step as callback(step, total, x, x0), see `sana.diffusion.solvers.Callback`.

        Returns:
            (n, 3, height, width) float32 in about [-1, 1] on `device`, or n pictures.

        Raises:
            ValueError: a setting out of range; for a size that cannot be, the message holds the nearest that can.
            NonFiniteError: the latents or pixels are not finite.
        """
        sampler = sampler or self.config.scheduler.vis_sampler
        self._check(sampler, output_type, num_images_per_prompt)
        steps = SAMPLERS[sampler] if num_inference_steps is None else num_inference_steps
        prompts, negatives = _pair_prompts(prompt, negative_prompt, num_images_per_prompt)
        size, drawn_size = self.sizes(height, width, use_resolution_binning)
        guidance = Guidance(
            guidance_scale, interval_guidance, pag_guidance_scale, tuple(self.config.model.pag_applied_layers)
        )

        text, null = self._encode(prompts, negatives)
        noise = self._noise(len(prompts), num_images_per_prompt, drawn_size, generator, latents, seed)
        velocity = guided(self.transformer, text, null, guidance)
        schedule, solver = SOLVERS[sampler]
        latents = solver(velocity, noise, schedule(steps, shift=self.flow_shift), callback=callback)
        self._require_finite("latents", latents)
        pixels = self.autoencoder.decode(latents).float()
        self._require_finite("pixels", pixels)
        pixels = _cover(pixels, *size)
        return images.to_pil(pixels) if output_type == "pil" else pixels

    def _check(self, sampler: str, output_type: str, num_images_per_prompt: int) -> None:
        if not self._ready:
            raise ValueError(
                "no weights are loaded: call from_pretrained(path), or set model.load_from in the config"
            )
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; choose from {', '.join(SAMPLERS)}")
        if output_type not in ("tensor", "pil"):
            raise ValueError(f"unknown output_type {output_type!r}; choose from tensor, pil")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")

    def sizes(
        self, height: int | None, width: int | None, binning: bool
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """((height, width) asked for, (height, width) to draw at); arguments and error as in `__call__`."""
        own = self.config.model.image_size
        height, width = own if height is None else height, own if width is None else width
        if binning and height > 0 and width > 0:
            ratios = [float(key) for key in self.buckets]
            if not min(ratios) - 0.01 <= height / width <= max(ratios) + 0.01:
                near = nearest_bucket(height, width, self.buckets)[1]
                raise ValueError(
                    f"the model draws height / width from {min(ratios)} to {max(ratios)}, not {height} x {width}; the "
                    f"nearest size is {near[0]} x {near[1]}"
                )
            drawn = nearest_bucket(height, width, self.buckets)[1]
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

    def _encode(self, prompts: Sequence[str], negatives: Sequence[str]) -> tuple[TextFeatures, TextFeatures]:
        """Features of the prompts and of their negative prompts, one row for each image."""
        text = _encode_each(self.text_encoder.encode, prompts)
        null = _encode_each(self.text_encoder.encode_unconditional, negatives)
        # In training a dropped caption keeps its own mask; so the empty prompt is seen through the prompt's mask here.
        empty = torch.tensor([not negative for negative in negatives], device=null.mask.device)
        return text, TextFeatures(embeds=null.embeds, mask=torch.where(empty[:, None], text.mask, null.mask))

    def _noise(
        self,
        count: int,
        copies: int,
        size: tuple[int, int],
        generator: torch.Generator | None,
        latents: Tensor | None,
        seed: int | Sequence[int] | None,
    ) -> Tensor:
        """(count, C, H/32, W/32) float32 on the device; images come in groups of `copies` for each prompt."""
        if sum(source is not None for source in (generator, latents, seed)) > 1:
            raise ValueError("generator, latents and seed each decide the noise: give one of them")
        shape = (self.autoencoder.latent_channels, *(side // self.autoencoder.downsample for side in size))
        if latents is not None:
            if latents.shape != (count, *shape):
                raise ValueError(
                    f"latents have shape {tuple(latents.shape)}; these prompts and size need {(count, *shape)}"
                )
            return latents.to(self.device, torch.float32)
        if generator is not None:
            draws = [
                torch.randn((copies, *shape), generator=generator, device=generator.device)
                for _ in range(count // copies)
            ]
        else:
            draws = [
                torch.randn((1, *shape), generator=torch.Generator().manual_seed(image_seed))
                for image_seed in _image_seeds(seed, count, copies)
            ]
        return torch.cat(draws).to(self.device)

    def _require_finite(self, what: str, values: Tensor) -> None:
        """NaN turns into a black picture if nobody looks."""
        bad = (~values.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteError(
                f"the {what} of image(s) {', '.join(map(str, bad))} are not finite, with the transformer in {self.dtype} and "
                f"the autoencoder in {self.autoencoder.dtype}: use the dtype that the weights were trained in, or dtype='fp32'"
            )


def image_seed(seed: int, prompt_index: int, sample: int) -> int:
    """The seed of one image's noise: of sample number `sample` of prompt number `prompt_index` under `seed`."""
    return seeding.derive_seed(seed, prompt_index, sample)


def _image_seeds(seed: int | Sequence[int] | None, count: int, copies: int) -> list[int]:
    if seed is None or isinstance(seed, int):
        return [image_seed(seed or 0, *divmod(index, copies)) for index in range(count)]
    if len(seed) != count:
        raise ValueError(f"{len(seed)} seeds for {count} images: give one for each, or a single number")
    return list(seed)


def _pair_prompts(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str], copies: int
) -> tuple[list[str], list[str]]:
    """Prompt and negative prompt of each image."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
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


def _encode_each(encode: Callable[[list[str]], TextFeatures], texts: Sequence[str]) -> TextFeatures:
    """Features of every text, computed once for equal texts."""
    unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    features = encode(list(unique))
    rows = torch.tensor([unique[text] for text in texts], device=features.embeds.device)
    return TextFeatures(embeds=features.embeds[rows], mask=features.mask[rows])


def _cover(pixels: Tensor, height: int, width: int) -> Tensor:
    """Scale (n, 3, H, W) so that it just covers (height, width), and cut the middle out; nothing if it fits already."""
    drawn_height, drawn_width = pixels.shape[-2:]
    if (drawn_height, drawn_width) == (height, width):
        return pixels
    scale = max(height / drawn_height, width / drawn_width)
    covering = (max(height, round(drawn_height * scale)), max(width, round(drawn_width * scale)))
    pixels = F.interpolate(pixels, covering, mode="bilinear", align_corners=False)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def _device(name: torch.device | str | None) -> torch.device:
    """The device of a name, or the best there is."""
    if name is None:
        return (
            torch.device("cuda", distributed.local_rank())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise ValueError(f"no device {str(name)!r} here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def _dtype(name: torch.dtype | str) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose from {', '.join(DTYPES)}")
    return DTYPES[name]
