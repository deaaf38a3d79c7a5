"""Train a deep-compression autoencoder: reconstruct pictures through 32x smaller latents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sana.models.autoencoder import Autoencoder
from sana.training.ema import EMA
from sana.utils.files import write_atomic
from sana.utils.logging import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """How to train an autoencoder."""

    steps: int
    """Optimizer steps in all."""
    batch_size: int = 16
    """Pictures a step."""
    lr: float = 2e-3
    """Peak learning rate: linear warm-up over `warmup` steps, then a cosine to 1 % of it."""
    warmup: int = 100
    """Steps of warm-up."""
    ema_rate: float = 0.998
    """Rate of the weights' moving average, which is what is kept."""
    latent_noise: float = 0.2
    """Most noise added to the latents in training, as a fraction of their standard deviation; each picture draws its
    own level below it. A decoder that has seen it forgives the transformer's errors."""
    latent_spread: float = 0.01
    """Weight of the term that draws every latent channel to mean 0 and variance 1, so that the flow loss of a
    transformer sees all channels alike. 0 where latents must stay what they are."""
    gradient_clip: float = 1.0
    """Largest gradient norm."""
    freeze_encoder: bool = False
    """Train the decoder alone: the latents stay what they are, so that a transformer trained on them stays valid."""
    save_every: int = 500
    """Steps between checkpoints."""


class AutoencoderTrainer:
    """Owns the autoencoder, its average, the optimizer and the step count; `work_dir` holds all that is written.

    Args:
        autoencoder: to be trained, float32.
        settings: how.
        batches: step -> pictures (B, 3, H, W) in [-1, 1]; a pure function of the step, so that a run can be resumed.
        work_dir: gets `logs/` (TensorBoard), `training.pt` (resume) and `autoencoder/` (diffusers folder of the average).
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        settings: AutoencoderTraining,
        batches: Callable[[int], Tensor],
        work_dir: Path,
    ) -> None:
        self.settings, self.batches, self.work_dir, self.step = settings, batches, work_dir, 0
        self.autoencoder = autoencoder.to(memory_format=torch.channels_last).train().requires_grad_(True)
        self.autoencoder.model.encoder.requires_grad_(not settings.freeze_encoder)
        self.ema = EMA(autoencoder, settings.ema_rate)
        trained = [parameter for parameter in autoencoder.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)

    def _lr_factor(self, step: int) -> float:
        s = self.settings
        progress = min(1.0, max(0, step - s.warmup) / max(1, s.steps - s.warmup))
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
        return min(1.0, (step + 1) / s.warmup) * (0.01 + 0.99 * cosine)

    def train(self, validation: Tensor) -> float:
        """Run to `settings.steps`; `validation` (n, 3, H, W) is reconstructed at each save. Returns its final PSNR in dB."""
        writer = SummaryWriter(self.work_dir / "logs")
        began, first = time.perf_counter(), self.step
        while self.step < self.settings.steps:
            loss = self.train_step(self.batches(self.step))
            if self.step % 50 == 0:
                rate = (self.step - first) * self.settings.batch_size / (time.perf_counter() - began)
                log.info("step %d / %d  loss %.4f  %.1f images/s", self.step, self.settings.steps, loss, rate)
                writer.add_scalar("loss", loss, self.step)
            if self.step % self.settings.save_every == 0 or self.step == self.settings.steps:
                psnr = self.reconstruction_psnr(validation)
                log.info("step %d  PSNR %.2f dB on %d held-out pictures", self.step, psnr, len(validation))
                writer.add_scalar("psnr", psnr, self.step)
                self.save()
        writer.close()
        if not self.settings.freeze_encoder:
            self.calibrate(self.batches(i) for i in range(8))
        self.ema.model.save_pretrained(self.work_dir / "autoencoder", torch.float16)
        return self.reconstruction_psnr(validation)

    def train_step(self, images: Tensor) -> float:
        """One step on `images`: encode, disturb the latents, decode, descend |error| + error^2 + spread. Returns the loss."""
        model, images = self.autoencoder.model, images.contiguous(memory_format=torch.channels_last)
        device = images.device.type
        with torch.autocast(device, dtype=torch.bfloat16):
            latents = model.encode(images).latent
            level = torch.rand(len(images), 1, 1, 1, device=images.device) * self.settings.latent_noise
            noise = torch.randn_like(latents) * latents.detach().float().std() * level
            reconstruction = model.decode(latents + noise).sample
        error = reconstruction.float() - images
        loss = error.abs().mean() + error.square().mean()
        loss = loss + self.settings.latent_spread * _spread(latents.float())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.settings.gradient_clip)
        if not norm.isfinite():
            raise FloatingPointError(
                f"gradient norm {norm.item()} at step {self.step}: lower the learning rate"
            )
        self.optimizer.step()
        self.schedule.step()
        self.ema.update(self.autoencoder)
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def reconstruction_psnr(self, images: Tensor, batch_size: int = 16) -> float:
        """Mean over `images` of the PSNR in dB (peak to peak 2) of the averaged weights' reconstruction, clipped."""
        values = []
        for batch in images.split(batch_size):
            decoded = self.ema.model.decode(self.ema.model.encode(batch)).clamp(-1, 1)
            mse = F.mse_loss(decoded, batch, reduction="none").mean(dim=(1, 2, 3))
            values.append(10 * torch.log10(4 / mse.clamp_min(1e-12)))
        return torch.cat(values).mean().item()

    @torch.no_grad()
    def calibrate(self, batches: Iterator[Tensor]) -> None:
        """Set the average's scaling factor so that scaled latents have unit standard deviation over `batches`."""
        latents = torch.cat([self.ema.model.model.encode(images).latent for images in batches])
        self.ema.model.model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))

    def save(self) -> None:
        """Write `training.pt`, in one step."""
        state = {
            "step": self.step,
            "model": self.autoencoder.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": torch.get_rng_state(),
        }
        write_atomic(self.work_dir / "training.pt", lambda handle: torch.save(state, handle))

    def resume(self) -> bool:
        """Go on from `training.pt`, if there is one; returns whether there was."""
        path = self.work_dir / "training.pt"
        if not path.is_file():
            return False
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.autoencoder.load_state_dict(state["model"])
        self.ema.restore(state["ema"], state["ema_updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]
        log.info("resumed at step %d from %s", self.step, path)
        return True


def _spread(latents: Tensor) -> Tensor:
    """How far the channels of `latents` (B, C, h, w) are from mean 0 and variance 1."""
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
    return mean.square().mean() + (variance - 1).square().mean()
