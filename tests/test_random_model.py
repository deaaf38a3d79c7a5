"""scripts/make_random_model.py: what it writes is a model that draws."""

import runpy
from pathlib import Path

import torch

from sana.pipeline import SanaPipeline

ROOT = Path(__file__).resolve().parents[1]


def test_a_random_model_draws(tmp_path, capsys):
    script = runpy.run_path(str(ROOT / "scripts/make_random_model.py"))
    parts = ["--model=SanaMS_Tiny_P1_D8", "--text_encoder=small", "--autoencoder=tiny", "--image_size=256"]
    words = [f"--output={tmp_path / 'model'}", *parts, "--overrides=[text_encoder.model_max_length=32]"]
    script["run"](script["make_parser"]().parse_args(words))
    config = Path(capsys.readouterr().out.strip())
    pipeline = SanaPipeline(config, device="cpu", dtype="bf16")
    assert pipeline.text_encoder.max_length == pipeline.transformer.config.model_max_length == 32
    assert pipeline.text_encoder.model.dtype == pipeline.autoencoder.dtype == torch.bfloat16
    picture = pipeline("a red circle", num_inference_steps=2)
    assert picture.shape == (1, 3, 256, 256) and picture.isfinite().all()
