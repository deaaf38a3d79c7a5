"""Networks that come and go: the same picture, and no weights where none should be."""

from pathlib import Path

import pytest
import torch

from sana.pipeline import SanaPipeline
from sana.runtime import offload
from sana.utils import mapped
from tests.factories import write_model
from tests.models.test_lora import factors, save, tensors

DRAW = {"num_inference_steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def exact(config):
    return SanaPipeline(config, device="cpu")("a red circle", **DRAW)


def there(pipeline) -> set[str]:
    return {name for name in offload.PARTS if not offload.is_dropped(getattr(pipeline, name))}


@pytest.mark.parametrize("mode", ["text", "model"])
def test_the_same_picture_with_networks_in_turn(config, exact, mode):
    pipeline = SanaPipeline(config, device="cpu", offload=mode)
    assert there(pipeline) == {"text_encoder"}
    seen = []
    for _ in range(2):  # what was dropped comes back
        picture = pipeline("a red circle", **DRAW, callback=lambda *_: seen.append(there(pipeline)))
        assert torch.equal(picture, exact)
    assert seen == [{"transformer"}] * 4
    together = {"text": {"transformer", "autoencoder"}, "model": {"autoencoder"}}[mode]
    assert there(pipeline) == together


def test_layers_in_turn(config, exact):
    pipeline = SanaPipeline(config, device="cpu", offload="sequential")
    on_meta = [p.device.type == "meta" for p in pipeline.transformer.blocks.parameters()]
    assert sum(on_meta) > 0.5 * len(on_meta)
    for _ in range(2):
        torch.testing.assert_close(pipeline("a red circle", **DRAW), exact, rtol=0, atol=1e-4)
    assert sum(p.device.type == "meta" for p in pipeline.transformer.blocks.parameters()) == sum(on_meta)


def test_features_made_before_spare_the_text_encoder(config, exact, tmp_path):
    pipeline = SanaPipeline(config, device="cpu", offload="model")
    features = pipeline.encode(["a red circle"], [""])
    features.save(tmp_path / "features.pt")
    features = type(features).load(tmp_path / "features.pt", pipeline.device)
    pipeline._need("transformer")
    pipeline.text_encoder = None  # nothing asks for it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "make_way", lambda *_: None)
        patch.setattr(offload, "PARTS", ("transformer", "autoencoder"))
        assert torch.equal(pipeline("a red circle", **DRAW, features=features), exact)


def test_adapters_are_there_again_when_the_weights_come_back(config, tmp_path, exact):
    stays, goes = (SanaPipeline(config, device="cpu", offload=mode) for mode in ("none", "model"))
    names = [name for name, _ in stays.transformer.named_modules() if name.endswith("attn.qkv")]
    pairs = factors({name: stays.transformer.get_submodule(name).weight for name in names})
    adapter = save(tmp_path / "lora", tensors(pairs, "{}"))
    pictures = []
    for pipeline in (stays, goes):
        pipeline.load_lora(adapter)
        pictures.append(pipeline("a red circle", **DRAW))
    assert torch.equal(*pictures)
    assert not torch.equal(pictures[0], exact)
    goes.unload_lora()
    assert torch.equal(goes("a red circle", **DRAW), exact)


def test_what_does_not_go_together(config):
    for settings, message in (
        ({"offload": "often"}, "unknown offload 'often'; choose from none, text, model, sequential"),
        ({"offload": "sequential", "quantize": "transformer=int8"}, "use offload model with quantize"),
        ({"offload": "model", "compile": True}, "compile needs a transformer that stays where it is"),
    ):
        with pytest.raises(ValueError, match=message):
            SanaPipeline(config, device="cpu", **settings)


def test_pages_of_a_mapped_file_are_given_back(tmp_path):
    file = tmp_path / "values"
    file.write_bytes(torch.arange(2**22, dtype=torch.int32).numpy().tobytes())  # 16 MiB
    view = torch.from_file(str(file), size=2**22, dtype=torch.int32)
    private = torch.ones(2**20)

    def resident() -> int:
        lines = Path("/proc/self/smaps").read_text().split("\n")
        start = next(number for number, line in enumerate(lines) if line.endswith(str(file)))
        return int(next(line for line in lines[start:] if line.startswith("Rss")).split()[1]) * 1024

    for forget in (lambda: mapped.forget([file]), lambda: mapped.forget_tensor(view)):
        total = int(view.sum(dtype=torch.int64))
        assert resident() == 2**24
        forget()
        assert resident() <= 8192
        assert int(view.sum(dtype=torch.int64)) == total == 2**21 * (2**22 - 1)
    mapped.forget_tensor(private)  # no file: nothing happens
    assert private.sum() == 2**20
