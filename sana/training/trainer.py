"""Train the transformer: flow matching on latents, conditioned on text."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from sana.config import ConfigError, SanaConfig, dump_config, transformer_overrides
from sana.data.loader import Batch, batches
from sana.data.order import Order
from sana.diffusion import flow
from sana.loading import load_text_encoder
from sana.models.state_dict import save_transformer
from sana.models.text_encoder import TextFeatures
from sana.models.zoo import build_transformer
from sana.runtime.compile import compile_blocks
from sana.training.checkpoint import remove_leftovers, retain, write_checkpoint
from sana.training.ema import EMA
from sana.training.feature_cache import open_cache
from sana.training.features import CachedTextEncoder, encode_pictures, load_autoencoder, padded
from sana.training.heldout import HeldOutLoss, data_sets, hold_out
from sana.training.lora import FILE_NAME as LORA_FILE
from sana.training.lora import save_lora, trained_state
from sana.training.online_metric import OnlineMetric
from sana.training.optim import Schedule, build_optimizer, lr_factor
from sana.training.parallel import build_accelerator, gathered, shard
from sana.training.progress import Progress, forward_flops
from sana.training.resume import Resume, training_state
from sana.training.safety import StopRequest, Watchdog, patiently, shielded
from sana.training.stats import Seen, SkippedSteps, StepStats
from sana.training.tracker import Tracker
from sana.training.validation import Validation
from sana.utils.logging import get_logger
from sana.utils.seeding import generator

log = get_logger(__name__)


class Trainer:
    """One training run, in `config.work_dir`; asset/docs/training.md lists what it writes there.

    Everything random in a step is drawn from (seed, epoch, sample number): a run gives the same losses on any number of
    processes, and goes on after a stop as if there had been none.
    """

    RETRY_SECONDS = 60.0
    """Between attempts to write on a full disk."""

    def __init__(self, config: SanaConfig, resume_from: str | None = None) -> None:
        if config.model.cfg_embed:
            raise ConfigError(
                f"model.model: {config.model.model} is a Sprint model, and the training of Sprint (sCM, LADD) is not "
                "available here; it draws images"
            )
        self.config, train = config, config.train
        self.work_dir = Path(config.work_dir)
        self.accelerator = build_accelerator(config)
        self.device = self.accelerator.device
        self.batch_size = (
            train.train_batch_size * train.gradient_accumulation_steps * self.accelerator.num_processes
        )
        self.stop = StopRequest(train.early_stop_hours)
        stacks = self.work_dir / "logs" / "stacks" / f"rank_{self.accelerator.process_index}.txt"
        self.watchdog = Watchdog(stacks, train.hang_minutes)

        # What is wrong with it is said before anything loads.
        resume = Resume(config, resume_from, self.accelerator)
        with self.accelerator.main_process_first():  # the others then find the index that it has written
            sets = data_sets(config)
        self.cache = open_cache(config, sets, self.accelerator) if train.feature_cache_dir else None
        if self.cache is None:
            log.info("train.feature_cache_dir is empty: pictures and captions are encoded in every step")
        parts = [self.cache.of(*item) for item in sets.items()] if self.cache else sets.values()
        self.samples, held_out = hold_out(config, *parts)
        folder, label = self.work_dir / "logs" / "not_finite", self.samples.label
        self.skipped = SkippedSteps(folder, train.nonfinite_limit, label, self.accelerator)
        self.order = Order.of(self.samples, batch_size=self.batch_size, seed=train.seed)
        self.total_steps = min(train.max_steps or 10**12, train.num_epochs * self.order.steps_per_epoch)
        self.cached_text = self.cache.text if self.cache and self.cache.has_texts else None
        self.text_encoder = (
            CachedTextEncoder(self.cache, config.text_encoder.model_max_length, self.device)
            if self.cached_text
            else load_text_encoder(config, self.device)
        )
        # With a cache it is wanted for pictures to look at alone.
        self.autoencoder = None
        if self.cache is None or train.visualize:
            self.autoencoder = load_autoencoder(config, self.device)
        set_seed(train.seed)  # the initial weights, equal in every process
        self._build(resume)
        self.validation = Validation(config, self.autoencoder, self.text_encoder) if train.visualize else None
        self.online_metric = OnlineMetric.of(config)
        self.held_out_loss = held_out and HeldOutLoss(
            config, held_out, self.encode, self.cached_text, self.accelerator
        )

    def _build(self, resume: Resume) -> None:
        """The model, its average, the optimizer and the schedule, as a checkpoint left them or new."""
        config, train = self.config, self.config.train
        transformer = build_transformer(config.model.model, **transformer_overrides(config)).to(self.device)
        if not resume.weights(transformer):
            # What a dropped caption is replaced by, and guidance compares with: the text encoder's view of nothing.
            null = self.text_encoder.encode_unconditional([""]).embeds[0]
            transformer.y_embedder.y_embedding.copy_(null)
        self.ema = EMA(transformer, train.ema_rate) if train.ema_update else None
        resume.average(self.ema)
        if train.use_fsdp:
            for network in [transformer] if self.ema is None else [transformer, self.ema.model]:
                shard(network)
        if train.compile:
            compile_blocks(transformer)
        self.transformer = transformer  # the network itself; `self.model` may be wrapped
        self.model = transformer if train.use_fsdp else self.accelerator.prepare(transformer)
        self.optimizer = self.accelerator.prepare(build_optimizer(transformer, train, self.batch_size))
        self.schedule = Schedule(
            self.optimizer.optimizer,
            lr_factor(train, self.total_steps, self.batch_size),
            resume.schedule_start,
        )
        resume.optimizer(transformer, self.optimizer.optimizer)
        self.step = self.saved_step = resume.step
        resume.generators(self._data_facts())

    def train(self) -> bool:
        """Run to the last step, or until `train.early_stop_hours` are over. Returns False where SIGTERM ended it before.

        However it ends, all that was trained is saved.
        """
        train, first = self.config.train, self.step + 1
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        progress = Progress(train.log_interval, self.batch_size, device)
        per_epoch = self.order.steps_per_epoch
        log.info("%d samples, %d steps an epoch, %d steps", len(self.samples), per_epoch, self.total_steps)
        stopping = False
        with self.stop, self.watchdog, contextlib.closing(self._start_records()) as tracker:
            self.watchdog.rest()  # caches may take hours
            with shielded(), torch.random.fork_rng(devices=[]):  # the loader draws a seed for its workers
                stream = self._batches()
            while self.step < self.total_steps and not stopping:
                self.watchdog.beat()
                began = time.monotonic()
                parts = [next(stream) for _ in range(train.gradient_accumulation_steps)]
                waited = time.monotonic() - began
                stats = self.train_step(parts)
                stopping = stats.stopping
                progress.add(stats, time.monotonic() - began, waited)
                tracker.step(stats.record(self.config.loss_report_name), self.step)
                if self.step % train.log_interval == 0 or self.step == first:
                    log.info(progress.line(self._epoch(), self.step, self.total_steps))
                if stopping or self._is_time_to_save():
                    self.save()
                last = self.step == self.total_steps
                if not stopping and (last or self.step % train.eval_sampling_steps == 0):
                    self._validate(tracker)
                if not stopping and (last or self.step % train.eval_metric_step == 0):
                    self._measure(tracker)
            finished = self.step >= self.total_steps and self.saved_step == self.step
            if finished:
                self.export(self.work_dir / (LORA_FILE if train.lora else "transformer.safetensors"))
        log.info("%s at step %d of %d", "finished" if finished else "stopped", self.step, self.total_steps)
        return finished or not self.stop.signalled

    def _start_records(self) -> Tracker:
        main = self.accelerator.is_main_process
        if main:
            remove_leftovers(self.work_dir / "checkpoints")
        self._write(lambda: dump_config(self.config, self.work_dir / "config.yaml"))
        return Tracker(self.config, self.step, active=main)

    def train_step(self, parts: list[Batch]) -> StepStats:
        """One optimizer step on a global batch, of which `parts` are this process's shares.

        Where the loss or the gradient is not finite, no weight changes.

        Raises:
            FloatingPointError: it was not finite in more than `train.nonfinite_limit` steps in a row.
        """
        losses, seen = [], []
        lr = self.schedule.set(self.step)
        for batch in parts:
            with self.accelerator.accumulate(self.model):
                latents, text = self.encode(batch)
                t, noise, drop = self._draws(batch, latents)
                x_t = flow.interpolate(latents, noise, t)
                with self.accelerator.autocast():
                    prediction = self.model(
                        x_t, flow.network_time(t).to(self.device), text.embeds, text.mask, drop_caption=drop
                    )
                target = flow.velocity_target(latents, noise)
                loss = flow.loss(prediction, target)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
            each = flow.loss(prediction.detach(), target, per_sample=True)
            seen.append(Seen(batch, t, drop, each, self._flops(latents, text)))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.gradient_clip)
        stats = self._agree(torch.stack(losses).mean(), gathered(norm), lr, seen)
        # fp16's scaler leaves such steps out by itself.
        if stats.finite or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if stats.finite and not self.optimizer.step_was_skipped:
            if self.ema is not None:
                self.ema.update(self.transformer)
            self.skipped.none()
        else:
            self.skipped.add(self.step, stats, seen)
        self.step += 1
        return stats

    def _agree(self, loss: Tensor, norm: Tensor, lr: float, seen: list[Seen]) -> StepStats:
        """What all processes say together: the mean loss, and whether any was asked to stop."""
        mine = torch.stack([loss.float(), loss.new_tensor(float(self.stop.wanted))])
        mean, stopping = self.accelerator.reduce(mine, reduction="mean").tolist()
        return StepStats(loss=mean, grad_norm=norm.item(), lr=lr, stopping=stopping > 0, seen=seen)

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[Tensor, TextFeatures]:
        """Scaled latents (B, C, h, w) and text features of a batch, on the device."""
        if self.cache is not None:
            latents = batch.pixels.to(self.device).float()
        else:
            latents = self.encode_images(batch.pixels)
        fixed = self.config.train.compile  # for one length of text
        if batch.texts is not None:
            length = self.config.text_encoder.model_max_length if fixed else None
            return latents, padded(batch.texts, self.device, length)
        text = self.text_encoder.encode(batch.captions)
        return latents, text if fixed else text.trimmed()

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, H/32, W/32), on the device."""
        return encode_pictures(self.autoencoder, pixels.to(self.device)).float()

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

    def _flops(self, latents: Tensor, text: TextFeatures) -> float:
        """Operations of a step on these: the backward pass is two forward passes; recomputation does not count."""
        patches = latents[0, 0].numel() // self.transformer.config.patch_size**2
        forward = forward_flops(self.transformer.config, patches, text.embeds.shape[1])
        return 3 * len(latents) * forward

    def _batches(self) -> Iterator[Batch]:
        return batches(
            self.samples,
            self.order,
            first_step=self.step,
            accumulation=self.config.train.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=self.config.train.num_workers,
            text=self.cached_text,
        )

    def _data_facts(self) -> dict[str, Any]:
        """What the order of the samples depends on."""
        order = self.order
        return {
            "samples": self.samples.name,
            "num_samples": order.num_samples,
            "batch_size": order.batch_size,
            "seed": order.seed,
        }

    def _epoch(self) -> int:
        """The epoch that the last step belongs to, from 1."""
        return max(0, self.step - 1) // self.order.steps_per_epoch + 1

    def _is_time_to_save(self) -> bool:
        train, per_epoch = self.config.train, self.order.steps_per_epoch
        last = self.step == self.total_steps
        ends_epoch = self.step % per_epoch == 0 and (self.step // per_epoch) % train.save_model_epochs == 0
        return last or ends_epoch or self.step % train.save_model_steps == 0

    def _validate(self, tracker: Tracker) -> None:
        """The held-out loss, and pictures for the prompts; neither can end the training."""
        self.watchdog.beat()
        if self.held_out_loss is not None:
            values = self.held_out_loss(self.best())
            tracker.scalars(values, self.step)
            log.info("step %d  held-out loss %.4f", self.step, values["heldout_loss"])
        if self.validation is not None:
            # A sharded network computes in all processes or in none.
            if self.accelerator.is_main_process or self.config.train.use_fsdp:
                self.validation.draw(self.best(), self.step, tracker)
            self.accelerator.wait_for_everyone()
        self.watchdog.beat()

    def _measure(self, tracker: Tracker) -> None:
        """`train.online_metric`; it may take hours, so nothing is left unsaved meanwhile."""
        if self.online_metric is not None:
            self.save()
            self.watchdog.rest()
            if self.accelerator.is_main_process:
                self.online_metric.measure(self.best(), self.step, tracker)
            self.accelerator.wait_for_everyone()
            self.watchdog.beat()

    def best(self) -> nn.Module:
        """The weights that a user would take: the average where there is one."""
        return self.transformer if self.ema is None else self.ema.model

    def save(self) -> None:
        """Write a checkpoint, unless this step has one. On a full disk it waits for room."""
        if self.step == self.saved_step:
            return
        self.watchdog.beat()
        folder, keep = self.work_dir / "checkpoints", self.config.train.keep_checkpoints
        state = training_state(
            transformer=self.transformer,
            ema=self.ema,
            optimizer=self.optimizer.optimizer,
            schedule_start=self.schedule.start,
            accelerator=self.accelerator,
            step=self.step,
            epoch=self._epoch(),
            data=self._data_facts(),
        )

        def write() -> None:
            write_checkpoint(folder, state, self.config)
            if keep is not None:
                retain(folder, keep)

        if self._write(write):
            self.saved_step = self.step

    def export(self, path: Path) -> None:
        """Write the best weights alone, as float16 safetensors with the architecture in the metadata; or the LoRA."""
        if self.config.train.lora:
            self._write(lambda: save_lora(self.best(), path))
            return
        state, name = trained_state(self.best()), self.config.model.model
        self._write(lambda: save_transformer(state, path, dtype=torch.float16, name=name))

    def _write(self, write: Callable[[], object]) -> bool:
        """Have the main process write; whether it could, before the run was asked to stop."""
        return patiently(write, self.accelerator, self.stop, self.watchdog, self.RETRY_SECONDS)
