"""Networks without weights, from whatever a config may name."""

from pathlib import Path

import pytest

from sana.config import load_config
from sana.models.autoencoder import Autoencoder
from sana.models.outline import outline_autoencoder, outline_text_encoder
from sana.utils import hub
from tests.factories import write_model
from tests.models.native_dc_ae import LAYOUTS, build_published, native_state, small, write_native


@pytest.mark.parametrize("kind", LAYOUTS)
def test_an_autoencoder_under_its_authors_names(kind, tmp_path):
    """Its settings tell nothing: the shape is that of its tensors."""
    folder = write_native(tmp_path / "native", native_state(build_published(small(LAYOUTS[kind]))))
    found, real = outline_autoencoder(str(folder)), Autoencoder.from_pretrained(folder)
    shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (found, real)]
    assert shapes[0] == shapes[1] and next(found.parameters()).device.type == "meta"


def test_of_the_hub_settings_alone_are_read(monkeypatch, tmp_path):
    asked = []

    def settings(path):
        asked.append(path)
        return Path(
            {"hf://me/mine/vae": parts.vae.vae_pretrained}.get(path, parts.text_encoder.text_encoder_name)
        )

    parts = load_config(write_model(tmp_path))
    monkeypatch.setattr(hub, "resolve_settings", settings)
    monkeypatch.setattr(hub, "resolve_model", lambda path: pytest.fail(f"weights of {path} were asked for"))
    assert outline_autoencoder("hf://me/mine/vae").latent_channels == 32
    model, tokens = outline_text_encoder("Qwen2-0.5B-Instruct", ["Enhance the prompt: "])
    assert asked == ["hf://me/mine/vae", "Qwen/Qwen2-0.5B-Instruct"]
    assert next(model.parameters()).device.type == "meta" and tokens > 0


def test_what_is_not_there_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("no json")
    for outline in (outline_autoencoder, lambda name: outline_text_encoder(name, [])):
        for name in (str(tmp_path), str(tmp_path / "nowhere")):
            with pytest.raises(ValueError, match="nowhere|cannot read the shape of a") as caught:
                outline(name)
            assert "\n" not in str(caught.value)
