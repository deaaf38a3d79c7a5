"""Learning is real: eight pictures are learnt by heart, from their captions, with the embedded autoencoder and text encoder."""

from pathlib import Path

import pytest
import torch

from sana.config import load_config
from sana.models.transformer import TransformerConfig
from sana.models.zoo import TRANSFORMERS
from sana.pipeline import SanaPipeline
from sana.training.features import load_autoencoder
from sana.training.trainer import Trainer

CONFIG = Path(__file__).resolve().parents[2] / "configs/sana_config/tiny/Sana_tiny_img256.yaml"
STEPS = 240


@pytest.mark.slow  # 16 s on one idle core
def test_eight_pictures_are_learnt_by_heart(tmp_path, monkeypatch):
    """Measured: loss 0.19 over the last 50 steps, samples at most 2.6 dB below the autoencoder's own reconstructions."""
    monkeypatch.setitem(TRANSFORMERS, "Small", TransformerConfig(depth=3, hidden_size=192, num_heads=6))
    settings = [
        *(f"--work_dir={tmp_path}", f"--train.feature_cache_dir={tmp_path / 'features'}", "--report_to=none"),
        *(
            "--model.model=Small",
            "--model.image_size=128",
            "--model.aspect_ratio_type=",
            "--model.load_from=",
        ),
        *("--model.mixed_precision=fp32", "--model.class_dropout_prob=0", "--data.num_scenes=8"),
        *("--train.train_batch_size=8", f"--train.max_steps={STEPS}", "--train.ema_rate=0.98"),
        *("--train.optimizer={type: AdamW, lr: 3e-3, betas: [0.9, 0.99]}", "--train.heldout_samples=0"),
        *("--train.lr_schedule_args.num_warmup_steps=20", "--train.visualize=false"),
    ]
    config = load_config(CONFIG, settings)
    run = Trainer(config)
    stream = run._batches()
    losses = [run.train_step([next(stream)]).loss for _ in range(STEPS)]
    assert sum(losses[:5]) / 5 > 1.5 and sum(losses[-50:]) / 50 < 0.3

    scenes = run.samples.samples  # behind their latents
    pictures = torch.stack([scenes.image(index) for index in range(8)])
    captions = [run.samples.caption(index, epoch=0) for index in range(8)]
    autoencoder = load_autoencoder(config, run.device)  # training has needed none
    pipeline = SanaPipeline.from_components(config, run.ema.model, autoencoder, run.text_encoder)
    drawn = pipeline(captions, guidance_scale=1.0, num_inference_steps=12, seed=0).clamp(-1, 1)
    errors = (drawn[:, None] - pictures[None]).square().mean(dim=(2, 3, 4))
    # Each sample is nearest to the picture of its caption.
    assert errors.argmin(dim=1).tolist() == list(range(8))
    rebuilt = autoencoder.decode(autoencoder.encode(pictures)).clamp(-1, 1)
    floor = (rebuilt - pictures).square().mean(dim=(1, 2, 3))
    assert (10 * torch.log10(errors.diagonal() / floor)).max() < 4  # dB
