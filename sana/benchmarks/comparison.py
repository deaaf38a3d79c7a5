"""One task for several implementations of a pipeline: its stages as functions, and whether they agree."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from sana.benchmarks import timing
from sana.benchmarks.baseline import IMPLEMENTATIONS, FixedText, build_diffusers, prompts_of
from sana.evaluation.checks import relative_rms
from sana.pipeline import SanaPipeline

GUIDANCE = 4.5
CHECK_STEPS = 2
"""After which random weights are compared: further ones multiply the rounding."""
CHECK_SIZE = 2048
"""Pixels a side at which larger images are compared, and of the square that a batch of smaller ones may fill: decoding
4096 x 4096 in float32 takes diffusers 56 GB."""

LARGEST_ERROR = {"cpu": 1e-4, "cuda": 2e-3}
"""Relative RMS against diffusers in float32. A GPU's convolutions keep 10 bits."""
HALF = 2.0
"""In half types: at most this many times the error that diffusers' own modules make in that type."""
LEAST_PSNR = {torch.float32: 60.0, torch.bfloat16: 40.0, torch.float16: 40.0}
"""dB of decoded images."""


@dataclass(frozen=True)
class Work:
    """What is to be done; equal for all."""

    prompts: list[str]
    noise: Tensor
    """(B, 32, h, w) float32, for B different prompts; what is decoded too."""
    steps: int
    features: FixedText
    """For denoising alone."""

    @classmethod
    def of(cls, pipeline: SanaPipeline, size: int, batch: int, steps: int) -> Work:
        """The work of a pipeline of ours: `batch` images of size x size pixels."""
        side = size // pipeline.autoencoder.downsample
        shape = (batch, pipeline.autoencoder.latent_channels, side, side)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pipeline.device)
        features = FixedText(pipeline.config, pipeline.dtype, pipeline.device)
        words = features.valid - 2 if pipeline.weights is None else 7  # Sana-tiny knows short sentences
        return cls(prompts_of(batch, words), noise, steps, features)

    @property
    def size(self) -> int:
        """Pixels a side."""
        return 32 * self.noise.shape[-1]


def call(pipeline: SanaPipeline | diffusers.SanaPipeline, work: Work, stage: str) -> Callable[[], Tensor]:
    """A function that does one stage of `sana.benchmarks.baseline.STAGES` in either implementation.

    It returns features (B, L, C) of the text, zero where the mask is, and then of the null caption; latents; or pixels in
    [-1, 1].
    """
    run = _ours if isinstance(pipeline, SanaPipeline) else _theirs
    return torch.inference_mode()(run(pipeline, work, stage))


def _ours(pipeline: SanaPipeline, work: Work, stage: str) -> Callable[[], Tensor]:
    encoder, count = pipeline.text_encoder, len(work.prompts)
    if stage == "denoise":
        pipeline = copy.copy(pipeline)  # with its captured steps, if it has any
        pipeline.text_encoder = work.features

    def text() -> Tensor:
        text, null = encoder.encode(work.prompts), encoder.encode_unconditional([""] * count)
        return torch.cat([text.embeds * text.mask[..., None], null.embeds])

    def draw() -> Tensor:
        return pipeline(
            work.prompts,
            work.size,
            work.size,
            num_inference_steps=work.steps,
            guidance_scale=GUIDANCE,
            latents=work.noise,
            use_resolution_binning=False,
            output_type="latent" if stage == "denoise" else "tensor",
        )

    return {
        "text": text,
        "denoise": draw,
        "decode": lambda: pipeline.autoencoder.decode(work.noise),
        "all": lambda: draw().clamp(-1, 1),
    }[stage]


def _theirs(pipeline: diffusers.SanaPipeline, work: Work, stage: str) -> Callable[[], Tensor]:
    """diffusers attends to the null caption through that caption's own mask, ours and the reference through the prompt's.

    That is as much work; equal masks are given, so that the results may be compared.
    """
    count, settings = len(work.prompts), work.features.settings

    def encode() -> tuple[Tensor, Tensor, Tensor]:
        text, mask, null, _ = pipeline.encode_prompt(
            work.prompts,
            True,
            device=pipeline.device,
            max_sequence_length=settings.model_max_length,
            complex_human_instruction=list(settings.chi_prompt),
        )
        return text, mask, null

    def text() -> Tensor:
        text, mask, null = encode()
        return torch.cat([text * mask[..., None], null])

    def draw(text: Tensor, mask: Tensor, null: Tensor, output: str) -> Tensor:
        return pipeline(
            prompt_embeds=text,
            prompt_attention_mask=mask,
            negative_prompt=None,
            negative_prompt_embeds=null,
            negative_prompt_attention_mask=mask,
            height=work.size,
            width=work.size,
            num_inference_steps=work.steps,
            guidance_scale=GUIDANCE,
            latents=work.noise,
            use_resolution_binning=False,
            output_type=output,
        ).images

    def decode() -> Tensor:
        vae = pipeline.vae
        return vae.decode(work.noise.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]

    fixed, null = work.features.encode(work.prompts), work.features.encode_unconditional([""] * count)
    return {
        "text": text,
        "denoise": lambda: draw(fixed.embeds, fixed.mask, null.embeds, "latent"),
        "decode": decode,
        "all": lambda: 2 * draw(*encode(), "pt") - 1,
    }[stage]


@dataclass(frozen=True)
class Verdict:
    """How far an output is from the exact one."""

    error: float
    """Relative RMS."""
    psnr: float | None
    """Of images, dB, at most 200."""
    wrong: str | None
    """Why it may not be measured."""


def judge(
    stage: str, outputs: Mapping[str, Tensor], exact: Tensor, own: Tensor, dtype: torch.dtype
) -> dict[str, Verdict]:
    """Compare the outputs of implementations with that of diffusers in float32.

    Args:
        exact: on the same weights, which are those of `dtype`.
        own: diffusers' output in `dtype`, whose rounding the others are allowed `HALF` times.
    """
    limit = max(LARGEST_ERROR[exact.device.type], HALF * relative_rms(own, exact))
    verdicts = {}
    for name, output in outputs.items():
        if output.shape != exact.shape or not output.isfinite().all():
            shapes = f"shape {tuple(output.shape)}, expected {tuple(exact.shape)}, or not finite"
            verdicts[name] = Verdict(math.inf, None, shapes)
            continue
        error = relative_rms(output, exact)
        ratio = psnr(output, exact) if stage in ("decode", "all") else None
        wrong = f"relative RMS error {error:.1e}, allowed {limit:.1e}" if error > limit else None
        if stage == "decode" and ratio < LEAST_PSNR[dtype]:
            wrong = f"PSNR {ratio:.1f} dB, wanted {LEAST_PSNR[dtype]:.0f}"
        verdicts[name] = Verdict(error, ratio, wrong)
    return verdicts


def psnr(image: Tensor, exact: Tensor) -> float:
    """Decibels, for a peak of four standard deviations of `exact`.

    That is the range of a picture in [-1, 1] with the usual 0.5; random weights have one of their own.
    """
    error = (image.double() - exact.double()).square().mean().sqrt()
    return min(200.0, (20 * torch.log10(4 * exact.double().std() / error.clamp_min(1e-30))).item())


@dataclass(frozen=True)
class Figures:
    """Of one stage and batch."""

    figures: dict[str, dict[str, Any]]
    """Implementation -> its timing, error, images a second and, where diffusers is among them, speed over diffusers."""
    failed: list[str]
    """Implementations that were wrong and not measured, with the reason."""


class Bench:
    """A pipeline of ours and its competitors, built once, measured at several stages and batches."""

    def __init__(self, ours: SanaPipeline, names: Sequence[str]) -> None:
        self.ours, self.names = ours, names
        self.device, self.dtype = ours.device, ours.dtype
        self._built: dict[str, Any] = {"diffusers": build_diffusers(ours)}

    def measure(
        self, stage: str, size: int, batch: int, steps: int, repeats: int, ceiling: float | None = None
    ) -> Figures:
        """Compare all with diffusers in float32, then time those that are right.

        Args:
            stage: of `sana.benchmarks.baseline.STAGES`.
            size: pixels a side.
            batch: images.
            steps: of the sampler. Runs of random weights are compared after `CHECK_STEPS`.
            repeats: of which the median is taken.
            ceiling: floating-point operations a second that the device reaches at most; denoising then gets its share.
        """
        work = Work.of(self.ours, size, batch, steps)
        checked = work
        if self.ours.weights is None:
            side = min(size, CHECK_SIZE)
            images = max(1, min(batch, (CHECK_SIZE // side) ** 2))
            checked = Work.of(self.ours, side, images, min(steps, CHECK_STEPS))
        own = call(self._built["diffusers"], checked, stage)()
        exact = own if self.dtype == torch.float32 else call(self._exact(), checked, stage)()
        outputs, first_calls = {}, {}
        for name in self.names:
            function = call(self._get(name), checked, stage)
            outputs[name], first_calls[name] = timing.first_call(function, self.device)
        verdicts = judge(stage, outputs, exact, own, self.dtype)
        right = {name: call(self._get(name), work, stage) for name in outputs if not verdicts[name].wrong}
        if checked.noise.shape != work.noise.shape:  # what is compiled for a shape was not compiled yet
            for name, function in right.items():
                first_calls[name] += timing.first_call(function, self.device)[1]
        timings = timing.take_turns(right, first_calls, self.device, repeats)
        figures = {}
        for name, seen in timings.items():
            row = asdict(seen) | {"images_per_second": batch / seen.seconds}
            row |= {"error": verdicts[name].error, "psnr": verdicts[name].psnr}
            if "diffusers" in timings:
                row["speedup"] = timings["diffusers"].seconds / seen.seconds
            if ceiling and stage == "denoise":
                row["share_of_matmul"] = self._flops(work) / ceiling / seen.seconds
            figures[name] = row
        failed = [
            f"{stage}, batch {batch}, {name}: {verdict.wrong}"
            for name, verdict in verdicts.items()
            if verdict.wrong
        ]
        return Figures(figures, failed)

    def _get(self, name: str) -> Any:
        """An implementation, built when it is first asked for."""
        if name not in self._built:
            self._built[name] = IMPLEMENTATIONS[name](self.ours)
        return self._built[name]

    def _exact(self) -> diffusers.SanaPipeline:
        return build_diffusers(self.ours, dtype=torch.float32)

    def _flops(self, work: Work) -> float:
        """Of denoising: both branches of guidance, on valid text tokens alone, whatever an implementation computes."""
        config = self.ours.transformer.config
        tokens = work.noise[0, 0].numel() // config.patch_size**2
        image = timing.transformer_flops(config.hidden_size, config.depth, tokens, work.features.valid)
        return 2 * work.steps * len(work.prompts) * image
