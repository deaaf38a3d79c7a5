"""Ours and diffusers with our weights: the same function at every stage, of networks whose weights hide nothing."""

from dataclasses import asdict
from functools import partial

import pytest
import torch
from diffusers import AutoencoderDC

from sana.benchmarks import baseline, comparison
from sana.benchmarks.comparison import Bench, Work, call, judge, psnr
from sana.config import load_config
from sana.models.autoencoder import PUBLISHED, Autoencoder
from sana.models.zoo import build_transformer
from sana.pipeline import SanaPipeline
from tests.numerics import assert_close

CPU = torch.device("cpu")
SIZE, STEPS = 64, 3
BOUNDS = {"text": 1e-5, "denoise": 5e-6, "decode": 1e-5, "all": 1e-5}  # measured in float32: at most 1e-6

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"  # diffusers' scheduler under numpy 2
)


@pytest.fixture(scope="module")
def config():
    return load_config(baseline.CONFIGS[512], ["--model.model=SanaMS_600M_P1_D28"])


@pytest.fixture(scope="module")
def pipeline(config):
    """The parts of a full-size model as the benchmark makes them, but narrow."""
    with torch.device("meta"):
        transformer = build_transformer("SanaMS_600M_P1_D28", depth=2, hidden_size=64, num_heads=2)
        narrow = {f"{side}_block_out_channels": (8, 8, 16, 32, 32, 32) for side in ("encoder", "decoder")}
        autoencoder = Autoencoder(AutoencoderDC(**asdict(PUBLISHED) | narrow, attention_head_dim=8))
    with pytest.MonkeyPatch.context() as patch:
        small = {"num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 400}
        small |= {"num_key_value_heads": 1, "head_dim": 16}
        patch.setattr(baseline, "Gemma2Config", partial(baseline.Gemma2Config, **small))
        encoder = baseline.random_text_encoder(config, torch.float32, CPU)
    networks = (baseline.with_random_weights(part, torch.float32, CPU) for part in (transformer, autoencoder))
    return SanaPipeline.from_components(config, *networks, encoder)


@pytest.mark.parametrize("stage", baseline.STAGES)
def test_ours_is_what_diffusers_is(pipeline, stage):
    work = Work.of(pipeline, SIZE, 2, STEPS)
    theirs = call(baseline.build_diffusers(pipeline), work, stage)()
    assert_close(stage, call(pipeline, work, stage)(), theirs, rel_rms=BOUNDS[stage])


def test_memory_is_shared(pipeline):
    """But for the matrices that are one here and several in diffusers: queries, keys and values."""
    theirs = baseline.build_diffusers(pipeline)
    assert theirs.vae is not pipeline.autoencoder.model
    states = (pipeline.transformer.state_dict(), pipeline.autoencoder.state_dict())
    ours = {value.data_ptr() for state in states for value in state.values()}
    parts = dict(theirs.transformer.named_parameters(prefix="transformer")) | dict(
        theirs.vae.named_parameters()
    )
    copied = {name.split(".")[-2] for name, value in parts.items() if value.data_ptr() not in ours}
    assert copied <= {"to_q", "to_k", "to_v"}


def test_prompts_have_forty_valid_tokens(pipeline):
    work = Work.of(pipeline, SIZE, 2, STEPS)
    for encoder in (work.features, pipeline.text_encoder):
        features = encoder.encode(work.prompts)
        assert features.embeds.shape == (2, 300, 2304) and features.mask.sum(1).tolist() == [40, 40]
    assert len(set(baseline.prompts_of(64, 7))) == 64


def test_tiny_is_the_embedded_model():
    ours = baseline.build_pipeline("tiny", 256, dtype=torch.bfloat16, device=CPU)
    assert ours.weights.name == "transformer.safetensors" and len(ours.config.text_encoder.chi_prompt)
    dtypes = {part.dtype for part in (ours.transformer, ours.autoencoder, ours.text_encoder.model)}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("name", ["0.6B", "1.6B"])
def test_full_size_models_are_those_of_their_names(name, monkeypatch):
    monkeypatch.setattr(baseline, "with_random_weights", lambda module, dtype, device: module)
    monkeypatch.setattr(SanaPipeline, "from_components", lambda config, *parts: parts)
    transformer, autoencoder, _ = baseline.build_pipeline(
        name, 4096, dtype=torch.bfloat16, device=CPU, stages=["denoise", "decode"]
    )
    count = {"0.6B": 591_747_872, "1.6B": 1_604_462_752}  # the published ones
    assert sum(value.numel() for value in transformer.parameters()) == count[name]
    assert transformer.config.use_pe and transformer.config.pe_interpolation == 2
    assert sum(value.numel() for value in autoencoder.parameters()) == pytest.approx(312.25e6, rel=1e-4)


def wrong(ours):
    """A pipeline of which one matrix is off by a percent."""
    state = {key: value.clone() for key, value in ours.transformer.state_dict().items()}
    state["blocks.1.mlp.point_conv.conv.weight"] *= 1.01
    transformer = type(ours.transformer)(ours.transformer.config).eval()
    transformer.load_state_dict(state)
    return SanaPipeline.from_components(ours.config, transformer, ours.autoencoder, ours.text_encoder)


def test_a_wrong_implementation_is_refused(pipeline, monkeypatch):
    monkeypatch.setitem(comparison.IMPLEMENTATIONS, "ours_compiled", wrong)
    monkeypatch.setattr(comparison, "CHECK_SIZE", SIZE // 2)
    bench = Bench(pipeline, ["ours", "ours_compiled", "diffusers"])
    found = bench.measure("denoise", SIZE, 1, STEPS, repeats=1, ceiling=1e12)
    assert set(found.figures) == {"ours", "diffusers"}
    assert len(found.failed) == 1 and "ours_compiled: relative RMS error" in found.failed[0]
    ours, theirs = found.figures["ours"], found.figures["diffusers"]
    assert ours["seconds"] > 0 and ours["first_call"] > 0 and theirs["speedup"] == 1
    assert ours["speedup"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    assert ours["share_of_matmul"] * ours["seconds"] == pytest.approx(
        theirs["share_of_matmul"] * theirs["seconds"]
    )


def test_few_of_many_images_are_compared(pipeline, monkeypatch):
    """A whole batch of large ones may not fit in float32."""
    compared = []
    monkeypatch.setattr(comparison, "CHECK_SIZE", 2 * SIZE)
    monkeypatch.setattr(comparison, "judge", lambda *given: compared.append(given[2].shape) or judge(*given))
    for batch in (3, 6):
        row = Bench(pipeline, ["ours"]).measure("denoise", SIZE, batch, 2, repeats=1).figures["ours"]
        assert row["images_per_second"] == pytest.approx(batch / row["seconds"])
    assert [shape[0] for shape in compared] == [3, 4]


def test_compiled_is_what_a_user_compiles(pipeline, monkeypatch):
    """On a GPU that means captured steps, which denoising alone takes too."""
    compiled, calls, encoder = [], [], pipeline.text_encoder
    monkeypatch.setattr(
        "sana.runtime.compile.compile_blocks", lambda transformer, rows: compiled.append(transformer)
    )

    def wrap(self):
        def wrapped(*given, **settings):
            calls.append(len(given[0]))
            return self.transformer(*given, **settings)

        self._wrapped = wrapped

    monkeypatch.setattr(SanaPipeline, "_wrap_transformer", wrap)
    ours = baseline.compiled_ours(pipeline)
    assert compiled == [ours.transformer] and ours.transformer is not pipeline.transformer
    weights = (part.transformer.x_embedder.proj.weight for part in (ours, pipeline))
    assert len({weight.data_ptr() for weight in weights}) == 2  # what is packed must not be packed for both
    work = Work.of(pipeline, SIZE, 2, STEPS)
    found = call(ours, work, "denoise")()
    assert calls == [4] * STEPS
    assert_close("denoise", found, call(pipeline, work, "denoise")(), rel_rms=1e-6)
    assert ours.text_encoder is encoder is pipeline.text_encoder


def test_half_types_may_round_twice_as_much_as_diffusers():
    exact = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    own = exact * 1.01
    verdicts = judge(
        "denoise",
        {"same": own, "worse": exact * 1.019, "wrong": exact * 1.03, "broken": exact * torch.nan},
        exact,
        own,
        torch.bfloat16,
    )
    assert [name for name, verdict in verdicts.items() if verdict.wrong] == ["wrong", "broken"]
    blurred = judge("decode", {"blurred": exact * 1.05}, exact, exact * 1.05, torch.bfloat16)["blurred"]
    assert blurred.wrong.startswith("PSNR 38")


def test_psnr_has_the_peak_of_a_picture():
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) / 2
    error = 0.01 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    assert psnr(picture + error, picture) == pytest.approx(
        20 * torch.log10(torch.tensor(200.0)).item(), abs=0.1
    )
    assert psnr(picture, picture) == 200
