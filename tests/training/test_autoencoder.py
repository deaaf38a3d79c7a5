"""Training of the autoencoder: it learns, stops and goes on, and leaves what can be loaded."""

import pytest
import torch

from sana.data.shapes import ShapesDataset
from sana.models.autoencoder import Autoencoder
from sana.training.autoencoder import AutoencoderTrainer, AutoencoderTraining
from tests.factories import make_autoencoder

PICTURES = torch.stack([ShapesDataset(64, 8).image(i) for i in range(8)])


def autoencoder_trainer(work_dir, steps, **more):
    torch.manual_seed(0)
    settings = AutoencoderTraining(steps=steps, lr=3e-3, warmup=2, ema_rate=0.9, save_every=10, **more)
    return AutoencoderTrainer(Autoencoder(make_autoencoder()), settings, lambda step: PICTURES, work_dir)


def test_autoencoder_learns_and_leaves_unit_latents(tmp_path):
    trainer = autoencoder_trainer(tmp_path, steps=30)
    before = trainer.reconstruction_psnr(PICTURES)
    after = trainer.train(PICTURES)
    assert after > before + 4, (before, after)
    loaded = Autoencoder.from_pretrained(tmp_path / "autoencoder")
    with torch.no_grad():
        latents = loaded.encode(PICTURES)
    assert latents.std().item() == pytest.approx(1, abs=0.02)
    assert loaded.scaling_factor != 0.5  # the random one's
    assert next(iter(loaded.parameters())).dtype == torch.float32


def test_the_spread_term_gives_every_channel_mean_0_and_variance_1(tmp_path):
    def distance(weight):
        trainer = autoencoder_trainer(tmp_path / str(weight), steps=60, latent_spread=weight)
        for _ in range(60):
            trainer.train_step(PICTURES)
        with torch.no_grad():
            variance, mean = torch.var_mean(trainer.autoencoder.model.encode(PICTURES).latent, dim=(0, 2, 3))
        return max(mean.abs().max(), (variance - 1).abs().max())

    assert distance(1.0) < 0.2 < 0.5 < distance(0.0)


def test_a_frozen_encoder_keeps_its_latents_while_the_decoder_learns(tmp_path):
    trainer = autoencoder_trainer(tmp_path, steps=10, freeze_encoder=True)
    with torch.no_grad():
        before = trainer.ema.model.encode(PICTURES)
    first = trainer.reconstruction_psnr(PICTURES)
    assert trainer.train(PICTURES) > first + 1
    with torch.no_grad():
        after = trainer.ema.model.encode(PICTURES)
    assert torch.equal(before, after) and trainer.ema.model.scaling_factor == 0.5


def test_psnr_is_that_of_its_definition(tmp_path):
    trainer = autoencoder_trainer(tmp_path, steps=1)
    trainer.ema.model.encode, trainer.ema.model.decode = (lambda x: x), (lambda x: x + 0.02)
    images = torch.zeros(3, 3, 32, 32)
    assert trainer.reconstruction_psnr(images) == pytest.approx(40.0)  # 20 log10(2 / 0.02)


def test_autoencoder_goes_on_bit_for_bit(tmp_path):
    autoencoder_trainer(tmp_path / "whole", steps=6).train(PICTURES)
    stopped = autoencoder_trainer(tmp_path / "parts", steps=6)
    for step in range(3):
        stopped.train_step(PICTURES)
        assert stopped.step == step + 1
    stopped.save()
    resumed = autoencoder_trainer(tmp_path / "parts", steps=6)
    assert resumed.resume() and resumed.step == 3
    resumed.train(PICTURES)
    whole, parts = (
        Autoencoder.from_pretrained(tmp_path / name / "autoencoder") for name in ("whole", "parts")
    )
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole.scaling_factor == parts.scaling_factor


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    trainer = autoencoder_trainer(tmp_path, steps=2)
    before = {name: value.clone() for name, value in trainer.autoencoder.state_dict().items()}
    with pytest.raises(FloatingPointError, match="gradient norm nan at step 0"):
        trainer.train_step(PICTURES * float("nan"))
    assert all(torch.equal(value, before[name]) for name, value in trainer.autoencoder.state_dict().items())
