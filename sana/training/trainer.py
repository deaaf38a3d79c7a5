"""Train the transformer: flow matching on latents, conditioned on text."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from sana.config import ConfigError, SanaConfig, dump_config, transformer_overrides
from sana.data.loader import Batch, Order, batches, build_dataset
from sana.diffusion import flow
from sana.models.autoencoder import Autoencoder
from sana.models.state_dict import load_into, load_transformer_state, save_transformer
from sana.models.text_encoder import TextEncoder, TextFeatures
from sana.models.zoo import build_transformer
from sana.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from sana.training.ema import EMA
from sana.training.features import cached_latents
from sana.training.optim import build_optimizer, lr_factor
from sana.training.validation import Validation
from sana.utils.logging import get_logger
from sana.utils.seeding import generator

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What a step reports, averaged over all processes."""

    loss: float
    grad_norm: float


class Trainer:
    """One training run, in `config.work_dir`: `config.yaml`, `logs/` (TensorBoard), `log_vis/`, `checkpoints/`, and at
    the end `transformer.safetensors`, the (averaged) weights alone.

    Everything random in a step is drawn from (seed, epoch, sample number): a run gives the same losses on any number of
    processes, and goes on after a stop as if there had been none.
    """

    def __init__(self, config: SanaConfig, resume_from: str | None = None) -> None:
        if config.model.cfg_embed:
            raise ConfigError(
                f"model.model: {config.model.model} is a Sprint model, and the training of Sprint (sCM, LADD) is not "
                "available here; it draws images"
            )
        self.config, train = config, config.train
        self.work_dir = Path(config.work_dir)
        self.accelerator = _accelerator(config)
        self.device = self.accelerator.device
        self.batch_size = (
            train.train_batch_size * train.gradient_accumulation_steps * self.accelerator.num_processes
        )

        set_seed(train.seed)  # the initial weights, equal in every process
        self.samples = build_dataset(config)
        self.order = Order(num_samples=len(self.samples), batch_size=self.batch_size, seed=train.seed)
        self.total_steps = min(train.max_steps or 10**12, train.num_epochs * self.order.steps_per_epoch)
        self.text_encoder = TextEncoder.from_pretrained(
            config.text_encoder.text_encoder_name,
            max_length=config.text_encoder.model_max_length,
            chi_prompt=config.text_encoder.chi_prompt,
            dtype=torch.float32 if self.device.type == "cpu" else torch.bfloat16,
            device=self.device,
        )
        self.autoencoder = Autoencoder.from_pretrained(config.vae.vae_pretrained, device=self.device)

        transformer = build_transformer(config.model.model, **transformer_overrides(config)).to(self.device)
        self.ema: EMA | None = None
        optimizer = build_optimizer(transformer.parameters(), train, self.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(train, self.total_steps))
        self.step = self._restore(transformer, optimizer, schedule, resume_from)
        if self.ema is None and train.ema_update:
            self.ema = EMA(transformer, train.ema_rate)
        self.model, self.optimizer = self.accelerator.prepare(transformer, optimizer)
        self.schedule = schedule  # ours to step, once for each optimizer step
        self.pixels_are_latents = train.feature_cache_dir is not None
        self.validation = Validation(config, self.autoencoder, self.text_encoder) if train.visualize else None

    def _restore(
        self,
        transformer: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        resume_from: str | None,
    ) -> int:
        """Take weights and state from a checkpoint to resume, else weights from `model.load_from`; returns the step."""
        config, resume = self.config, self.config.model.resume_from
        name = resume_from or resume.checkpoint
        path = find_checkpoint(name, self.work_dir / "checkpoints") if name else None
        if path:
            state = load_checkpoint(path)
            load_into(transformer, state["state_dict"])
            if "state_dict_ema" in state and config.train.ema_update:
                self.ema = EMA(transformer, config.train.ema_rate)
                self.ema.restore(state["state_dict_ema"], state["ema_updates"])
            if resume.resume_optimizer:
                optimizer.load_state_dict(state["optimizer"])
            if resume.resume_lr_scheduler and config.train.resume_lr_scheduler:
                schedule.load_state_dict(state["scheduler"])
            log.info("resumed at step %d from %s", state["step"], path)
            return state["step"]
        if config.model.load_from:
            load_into(transformer, load_transformer_state(config.model.load_from))
            log.info("starting from the weights in %s", config.model.load_from)
        # What a dropped caption is replaced by, and guidance compares with: the text encoder's view of nothing.
        transformer.y_embedder.y_embedding.copy_(self.text_encoder.encode_unconditional([""]).embeds[0])
        return 0

    def train(self) -> None:
        """Run to the last step, or until `train.early_stop_hours` have passed."""
        train, accelerator = self.config.train, self.accelerator
        writer = None
        if accelerator.is_main_process:
            dump_config(self.config, self.work_dir / "config.yaml")
            if self.config.report_to == "tensorboard":
                writer = SummaryWriter(self.work_dir / "logs", purge_step=self.step)
        stream = self._batches()
        began, recent = time.monotonic(), deque(maxlen=train.log_interval)
        log.info(
            "%d samples, %d steps an epoch, %d steps",
            len(self.samples),
            self.order.steps_per_epoch,
            self.total_steps,
        )
        while self.step < self.total_steps:
            tick = time.monotonic()
            stats = self.train_step([next(stream) for _ in range(train.gradient_accumulation_steps)])
            recent.append((stats, time.monotonic() - tick))
            if writer is not None:
                writer.add_scalar(self.config.loss_report_name, stats.loss, self.step)
                writer.add_scalar("grad_norm", stats.grad_norm, self.step)
                writer.add_scalar("lr", self.schedule.get_last_lr()[0], self.step)
            if self.step % train.log_interval == 0:
                self._log(recent)
            if train.visualize and (
                self.step % train.eval_sampling_steps == 0 or self.step == self.total_steps
            ):
                self._validate(writer)
            late = time.monotonic() - began > train.early_stop_hours * 3600
            if late or self._is_time_to_save():
                self.save()
            if late:
                log.info("stopped after %.2f hours (train.early_stop_hours)", train.early_stop_hours)
                break
        if writer is not None:
            writer.close()
        if accelerator.is_main_process:
            self.export(self.work_dir / "transformer.safetensors")

    def train_step(self, parts: list[Batch]) -> StepStats:
        """One optimizer step on a global batch, of which `parts` are this process's shares."""
        losses = []
        for batch in parts:
            with self.accelerator.accumulate(self.model):
                latents, text = self.encode(batch)
                t, noise, drop = self._draws(batch, latents)
                x_t = flow.interpolate(latents, noise, t)
                with self.accelerator.autocast():
                    prediction = self.model(
                        x_t, flow.network_time(t).to(self.device), text.embeds, text.mask, drop_caption=drop
                    )
                loss = flow.loss(prediction, flow.velocity_target(latents, noise))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:  # the last part: the gradient is whole
                    norm = self.accelerator.clip_grad_norm_(
                        self.model.parameters(), self.config.train.gradient_clip
                    )
                    # With a scaler (fp16), infinite gradients are how it finds its scale: it skips those steps itself.
                    if self.accelerator.scaler is None and not norm.isfinite():
                        raise FloatingPointError(
                            f"gradient norm {norm.item()} at step {self.step}: the step was not taken; "
                            "resume with a lower learning rate"
                        )
                self.optimizer.step()
                self.optimizer.zero_grad()
                losses.append(loss.detach())
        self.schedule.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.model))
        loss = self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.step}: resume with a lower learning rate"
            )
        return StepStats(loss=loss.item(), grad_norm=float(norm))

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[Tensor, TextFeatures]:
        """Scaled latents (B, C, h, w) and text features of a batch, on the device."""
        pixels = batch.pixels.to(self.device)
        latents = pixels if self.pixels_are_latents else self.autoencoder.encode(pixels).float()
        return latents, self.text_encoder.encode(batch.captions).trimmed()

    def _draws(self, batch: Batch, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Time (B,), noise like `latents` and caption dropout (B,) bool, each sample's from (seed, epoch, sample)."""
        scheduler, seed = self.config.scheduler, self.config.train.seed
        density = flow.TimestepDensity(
            scheduler.weighting_scheme or "uniform", scheduler.logit_mean, scheduler.logit_std
        )
        times, noises, drops = [], [], []
        for epoch, sample in batch.samples:
            draw = generator("step", seed, epoch, sample)
            times.append(flow.sample_timesteps(1, density, scheduler.flow_shift, draw))
            noises.append(torch.randn(latents.shape[1:], generator=draw))
            drops.append(torch.rand(1, generator=draw) < self.config.model.class_dropout_prob)
        return torch.cat(times), torch.stack(noises).to(self.device), torch.cat(drops).to(self.device)

    def _batches(self):  # noqa: ANN202 an iterator of Batch
        train, pixels = self.config.train, None
        if self.pixels_are_latents:
            folder = Path(train.feature_cache_dir)
            pixels = cached_latents(
                self.samples, self.autoencoder, self.config.vae.vae_pretrained, folder, self.accelerator
            )
        return batches(
            self.samples,
            self.order,
            first_step=self.step,
            accumulation=train.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=train.num_workers,
            pixels=pixels,
        )

    def _log(self, recent: deque[tuple[StepStats, float]]) -> None:
        seconds = sum(taken for _, taken in recent) / len(recent)
        loss = sum(stats.loss for stats, _ in recent) / len(recent)
        norm = sum(stats.grad_norm for stats, _ in recent) / len(recent)
        epoch = self.step // self.order.steps_per_epoch + 1
        eta = time.strftime("%H:%M:%S", time.gmtime(seconds * (self.total_steps - self.step)))
        log.info(
            "epoch %d  step %d / %d  loss %.4f  grad_norm %.3f  lr %.2e  %.0f images/s  eta %s",
            epoch, self.step, self.total_steps, loss, norm, self.schedule.get_last_lr()[0], self.batch_size / seconds, eta,
        )  # fmt: skip

    def _is_time_to_save(self) -> bool:
        train, per_epoch = self.config.train, self.order.steps_per_epoch
        last = self.step == self.total_steps
        ends_epoch = self.step % per_epoch == 0 and (self.step // per_epoch) % train.save_model_epochs == 0
        return last or ends_epoch or self.step % train.save_model_steps == 0

    def _validate(self, writer: SummaryWriter | None) -> None:
        if self.accelerator.is_main_process:
            self.validation.draw(self._best(), self.step, writer)
        self.accelerator.wait_for_everyone()

    def _best(self) -> nn.Module:
        """The weights that a user would take: the average where there is one."""
        return self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.model

    def save(self) -> None:
        """Write a checkpoint."""
        if self.accelerator.is_main_process:
            state = {
                "state_dict": self.accelerator.unwrap_model(self.model).state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.schedule.state_dict(),
                "epoch": self.step // self.order.steps_per_epoch + 1,
                "step": self.step,
            }
            if self.ema is not None:
                state |= {"state_dict_ema": self.ema.model.state_dict(), "ema_updates": self.ema.updates}
            save_checkpoint(self.work_dir / "checkpoints", state, state["epoch"], self.step)
        self.accelerator.wait_for_everyone()

    def export(self, path: Path) -> None:
        """Write the best weights alone, as float16 safetensors with the architecture in the metadata."""
        save_transformer(self._best().state_dict(), path, dtype=torch.float16, name=self.config.model.model)


def _accelerator(config: SanaConfig) -> Accelerator:
    precision = {"fp16": "fp16", "bf16": "bf16", "fp32": "no"}[config.model.mixed_precision]
    if precision == "fp16" and not torch.cuda.is_available():
        log.warning("model.mixed_precision fp16 needs a GPU: training in bf16 instead")
        precision = "bf16"
    try:
        return Accelerator(
            cpu=not torch.cuda.is_available(),  # else processes without a GPU would not join each other
            mixed_precision=precision,
            gradient_accumulation_steps=config.train.gradient_accumulation_steps,
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:
        raise ConfigError(f"model.mixed_precision: {error}") from error
