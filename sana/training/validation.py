"""Validation images: what the model in training draws for fixed prompts, from fixed noise."""

from __future__ import annotations

from pathlib import Path

import torch

from sana.config import SanaConfig
from sana.models.autoencoder import Autoencoder
from sana.models.text_encoder import TextEncoder
from sana.models.transformer import SanaTransformer
from sana.pipeline import SanaPipeline
from sana.training.features import CachedTextEncoder
from sana.training.tracker import Tracker
from sana.utils.images import grid, to_pil
from sana.utils.logging import first_line, get_logger

log = get_logger(__name__)


class Validation:
    """Draws `train.validation_prompts` into the tracker and, with `train.local_save_vis`, into `work_dir/log_vis`."""

    def __init__(
        self, config: SanaConfig, autoencoder: Autoencoder, text_encoder: TextEncoder | CachedTextEncoder
    ) -> None:
        self.config, self.autoencoder, self.text_encoder = config, autoencoder, text_encoder

    def draw(self, transformer: SanaTransformer, step: int, tracker: Tracker) -> None:
        """Draw with `transformer`; a failure of any kind is one line in the log and never ends the training."""
        train, was_training = self.config.train, transformer.training
        try:
            pictures = self._pictures(transformer.eval(), step)
            tracker.images(train.validation_prompts, pictures, step)
            if train.local_save_vis and tracker.active:
                path = Path(self.config.work_dir) / "log_vis" / f"vis_{step}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                grid(pictures).save(path)
        except Exception as error:  # noqa: BLE001 pictures are not worth a run, whatever went wrong
            log.warning(
                "no validation images at step %d: %s: %s", step, type(error).__name__, first_line(error)
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        finally:
            transformer.train(was_training)

    def _pictures(self, transformer: SanaTransformer, step: int) -> list:
        train = self.config.train
        pipeline = SanaPipeline.from_components(self.config, transformer, self.autoencoder, self.text_encoder)
        pictures = []
        for first in range(0, len(train.validation_prompts), train.eval_batch_size):
            prompts = list(train.validation_prompts[first : first + train.eval_batch_size])
            seed = train.seed + first if train.deterministic_validation else step
            scale = self.config.model.cfg_scale
            pictures += to_pil(pipeline(prompts, guidance_scale=scale, num_inference_steps=None, seed=seed))
        return pictures
