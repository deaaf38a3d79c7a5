"""The step of a training, ours and the plain one of a user of diffusers, on features that were made up."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor

from sana.benchmarks import timing
from sana.benchmarks.baseline import FixedText
from sana.benchmarks.comparison import Figures, judge
from sana.config import SanaConfig
from sana.data.loader import Batch
from sana.diffusion import flow
from sana.loading import DTYPES
from sana.models.diffusers_folder import build_transformer_twin
from sana.training.parallel import build_accelerator
from sana.training.progress import forward_flops, peak_flops
from sana.training.resume import Resume
from sana.training.safety import StopRequest
from sana.training.stats import SkippedSteps
from sana.training.trainer import Trainer


class SyntheticTrainer(Trainer):
    """The trainer and its own step, without a data set, encoders or a folder: every step is on the same cached features."""

    def __init__(self, config: SanaConfig) -> None:
        train = config.train
        self.config, self.accelerator = config, build_accelerator(config)
        self.device, self.batch_size = self.accelerator.device, train.train_batch_size
        self.stop, self.total_steps = StopRequest(train.early_stop_hours), 10**6
        folder = Path(tempfile.gettempdir()) / "sana_not_finite"
        self.skipped = SkippedSteps(folder, train.nonfinite_limit, str, self.accelerator)
        self.autoencoder = None
        self.text_encoder = FixedText(config, torch.float32, self.device)
        self.batch = self.cache = _features(config, self.text_encoder.valid)  # a cache: pictures are latents
        set_seed(train.seed)
        self._build(Resume(config, None, self.accelerator))
        self.transformer.train()

    def _data_facts(self) -> dict[str, Any]:
        return {}

    def run_step(self) -> float:
        """One step of the optimizer; its loss."""
        return self.train_step([self.batch]).loss


class DiffusersTrainer:
    """What diffusers' training scripts do: autocast, flow matching, clipping, AdamW; text padded to the model's length."""

    def __init__(self, ours: SyntheticTrainer, *, compiled: bool = False) -> None:
        config, train = ours.config, ours.config.train
        self.device, self.precision = ours.device, DTYPES[config.model.mixed_precision]
        self.clip, self.scheduler = train.gradient_clip, config.scheduler
        self.latents = ours.batch.pixels.to(self.device).float()
        length = config.text_encoder.model_max_length
        texts = [F.pad(text.float(), (0, 0, 0, length - len(text))) for text in ours.batch.texts]
        self.text = torch.stack(texts).to(self.device)
        self.mask = (
            (torch.arange(length) < len(ours.batch.texts[0])).long().repeat(len(texts), 1).to(self.device)
        )
        state = {name: value.detach().clone() for name, value in ours.transformer.state_dict().items()}
        self.model = build_transformer_twin(state, ours.transformer.config, config.model.image_size)
        self.model.requires_grad_(True).train()
        if train.grad_checkpointing:
            self.model.enable_gradient_checkpointing()
        if compiled:
            self.model.compile()
        settings = {key: value for key, value in train.optimizer.items() if key not in ("type", "fused")}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **settings)

    def predict(self, x_t: Tensor, time: Tensor) -> Tensor:
        """The velocity, under autocast."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.model(
                x_t,
                encoder_hidden_states=self.text,
                encoder_attention_mask=self.mask,
                timestep=time,
                return_dict=False,
            )[0]

    def run_step(self) -> float:
        """One step of the optimizer; its loss."""
        noise = torch.randn_like(self.latents)
        t = torch.sigmoid(
            self.scheduler.logit_mean + self.scheduler.logit_std * torch.randn(len(noise), device=self.device)
        )
        t = flow.shift_time(t, self.scheduler.flow_shift)
        prediction = self.predict(flow.interpolate(self.latents, noise, t), flow.network_time(t))
        loss = F.mse_loss(prediction.float(), noise - self.latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def _features(config: SanaConfig, tokens: int) -> Batch:
    """Latents and texts as the cache gives them: half precision, on the CPU, without padding."""
    count, side = config.train.train_batch_size, config.model.image_size // config.vae.vae_downsample_rate
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    texts = [draw(tokens, config.text_encoder.caption_channels).half() for _ in range(count)]
    return Batch(
        pixels=draw(count, config.vae.vae_latent_dim, side, side).half(),
        captions=[""] * count,
        samples=[(0, index) for index in range(count)],
        replaced={},
        texts=texts,
    )


IMPLEMENTATIONS = ("ours", "ours_compiled", "diffusers", "diffusers_compiled")


def measure(load: Callable[[bool], SanaConfig], names: Sequence[str], repeats: int) -> Figures:
    """Compare the first predictions, then time the steps; all of `names` are in memory at once.

    Args:
        load: whether to compile -> the config of ours.
        names: of `IMPLEMENTATIONS`.
        repeats: of which the median is taken.
    """
    plain = SyntheticTrainer(load(False))
    baseline = DiffusersTrainer(plain)
    trainers: dict[str, Any] = {}
    for name in names:
        if name.startswith("ours"):
            trainers[name] = SyntheticTrainer(load(True)) if "compiled" in name else plain
        else:
            trainers[name] = DiffusersTrainer(plain, compiled=True) if "compiled" in name else baseline
    verdicts = judge("train", *_predictions(trainers, baseline), baseline.precision)
    right = {name: trainer.run_step for name, trainer in trainers.items() if not verdicts[name].wrong}
    first_calls = {name: timing.first_call(function, plain.device)[1] for name, function in right.items()}
    timings = timing.take_turns(right, first_calls, plain.device, repeats)
    config, batch = plain.transformer.config, plain.batch
    flops = 3 * len(batch.texts) * forward_flops(config, batch.pixels[0, 0].numel(), len(batch.texts[0]))
    peaks = {"share_of_matmul": timing.matmul_ceiling(plain.device, baseline.precision)}
    if plain.device.type == "cuda" and (known := peak_flops(torch.cuda.get_device_name(plain.device))):
        peaks["mfu"] = known
    figures = {}
    for name, seen in timings.items():
        row = asdict(seen) | {
            "images_per_second": len(batch.texts) / seen.seconds,
            "error": verdicts[name].error,
        }
        row |= {key: flops / peak / seen.seconds for key, peak in peaks.items()}
        if "diffusers" in timings:
            row["speedup"] = timings["diffusers"].seconds / seen.seconds
        figures[name] = row
    return Figures(
        figures, [f"training, {name}: {found.wrong}" for name, found in verdicts.items() if found.wrong]
    )


@torch.no_grad()
def _predictions(
    trainers: dict[str, Any], baseline: DiffusersTrainer
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(of each, of diffusers in float32, of diffusers under autocast), for the same noise and times."""
    noise = torch.randn(baseline.latents.shape, generator=torch.Generator().manual_seed(1)).to(
        baseline.device
    )
    t = torch.linspace(0.05, 0.95, len(noise), device=baseline.device)
    x_t, time = flow.interpolate(baseline.latents, noise, t), flow.network_time(t)

    def ours(trainer: SyntheticTrainer) -> Tensor:
        latents, text = trainer.encode(trainer.batch)
        keep = torch.zeros(len(latents), dtype=torch.bool, device=trainer.device)
        with trainer.accelerator.autocast():
            return trainer.model(x_t, time, text.embeds, text.mask, drop_caption=keep)

    own = baseline.predict(x_t, time)
    precision, baseline.precision = baseline.precision, torch.float32
    exact = baseline.predict(x_t, time)
    baseline.precision = precision
    outputs = {
        name: ours(trainer) if isinstance(trainer, SyntheticTrainer) else trainer.predict(x_t, time)
        for name, trainer in trainers.items()
    }
    return outputs, exact, own
