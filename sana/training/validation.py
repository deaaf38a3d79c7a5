"""Validation images: what the model in training draws for fixed prompts, from fixed noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from sana.config import SanaConfig
from sana.models.autoencoder import Autoencoder
from sana.models.text_encoder import TextEncoder
from sana.models.transformer import SanaTransformer
from sana.pipeline import SanaPipeline
from sana.utils.images import grid, to_pil
from sana.utils.logging import get_logger

log = get_logger(__name__)


class Validation:
    """Draws `train.validation_prompts` into TensorBoard and, with `train.local_save_vis`, into `work_dir/log_vis`."""

    def __init__(self, config: SanaConfig, autoencoder: Autoencoder, text_encoder: TextEncoder) -> None:
        self.config, self.autoencoder, self.text_encoder = config, autoencoder, text_encoder

    def draw(self, transformer: SanaTransformer, step: int, writer: SummaryWriter | None) -> None:
        """Draw with `transformer`; a failure is logged and never ends the training."""
        train = self.config.train
        was_training = transformer.training
        try:
            pipeline = SanaPipeline.from_components(
                self.config, transformer.eval(), self.autoencoder, self.text_encoder
            )
            pictures = []
            for first in range(0, len(train.validation_prompts), train.eval_batch_size):
                prompts = list(train.validation_prompts[first : first + train.eval_batch_size])
                seed = train.seed + first if train.deterministic_validation else step
                pictures += to_pil(
                    pipeline(
                        prompts,
                        guidance_scale=self.config.model.cfg_scale,
                        num_inference_steps=None,
                        seed=seed,
                    )
                )
        except (ArithmeticError, RuntimeError) as error:
            log.warning("no validation images at step %d: %s", step, error)
            return
        finally:
            transformer.train(was_training)
        if writer is not None:
            for prompt, picture in zip(train.validation_prompts, pictures, strict=True):
                writer.add_image(prompt, np.asarray(picture), step, dataformats="HWC")
        if train.local_save_vis:
            path = Path(self.config.work_dir) / "log_vis" / f"vis_{step}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grid(pictures).save(path)
