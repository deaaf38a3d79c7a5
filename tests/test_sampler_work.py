"""What a sampler computes once, and what it never does inside its loop."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sana.diffusion.noise import starting_noise
from sana.models.caches import TextCache
from sana.pipeline import SanaPipeline
from tests.factories import write_model
from tests.numerics import assert_close

# Each waits for the device where there is one: a number or a shape is read from a tensor's values.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero"}
STEPS = 5


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return SanaPipeline(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def draw(pipeline):
    return partial(pipeline, height=64, width=64, use_resolution_binning=False, num_inference_steps=STEPS)


class Waits(TorchDispatchMode):
    """Counts operators that wait for the device, from `start` to `stop`."""

    def __init__(self):
        super().__init__()
        self.found, self.looking = Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        made = func(*args, **(kwargs or {}))
        if self.looking and name in WAITS:
            self.found[name] += 1
        return made


def test_the_detector_sees_what_waits():
    with Waits() as waits:
        waits.looking = True
        x = torch.ones(3)
        _ = float(x.sum()), x.nonzero(), bool(x[0] > 0)
    assert waits.found == {"_local_scalar_dense": 2, "nonzero": 1}


@pytest.mark.parametrize(
    "settings", [{}, {"pag_guidance_scale": 2.0}, {"interval_guidance": (0.2, 0.8)}], ids=str
)
@pytest.mark.parametrize("sampler", ["flow_dpm-solver", "flow_euler"])
def test_the_loop_does_not_wait_for_the_device(draw, settings, sampler):
    waits = Waits()

    def callback(step, total, x, x0):
        waits.looking = step < total  # from the first step's end to the last one's

    with waits:
        draw("a red circle", sampler=sampler, callback=callback, **settings)
    assert not waits.found
    assert not waits.looking


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("settings", [{}, {"interval_guidance": (0.2, 0.8)}], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "captured"])
def test_a_gpu_is_not_waited_for(tmp_path, settings, compiled):
    """PyTorch's own detector; what is compiled and captured draws the same, at several sizes and lengths of text."""
    pipeline = SanaPipeline(write_model(tmp_path), device="cuda", dtype="fp32")
    how = {"use_resolution_binning": False, "output_type": "latent", "num_inference_steps": STEPS, **settings}
    cases = [("a red circle", 64, 64), (["two blue stars and a heart", "one"], 64, 96), ("a ring", 64, 64)]
    exact = [pipeline(text, height, width, **how) for text, height, width in cases]
    if compiled:
        pipeline.compile()
        for text, height, width in cases:  # captures
            pipeline(text, height, width, **how)

    def callback(step, total, *_):
        torch.cuda.set_sync_debug_mode("error" if step < total else "default")

    try:
        for (text, height, width), expected in zip(cases, exact, strict=True):
            latents = pipeline(text, height, width, callback=callback, **how)
            assert_close(f"{text}", latents, expected, rel_rms=1e-4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_fresh_noise_does_not_wait_for_the_gpu():
    """That of Sprint's steps, drawn on the CPU."""
    (_, expected), (_, fresh) = (
        starting_noise(2, 1, (32, 4, 4), torch.device(kind)) for kind in ("cpu", "cuda")
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = fresh(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(drawn.cpu(), expected(1))


def test_text_and_time_are_encoded_once(draw, pipeline):
    """No product of the text, and no embedding of the time, is computed in a step."""
    calls = Counter()
    steps = []

    def count(name):
        return lambda *_: calls.update([name])

    network = pipeline.transformer
    hooks = [block.cross_attn.kv_linear.register_forward_hook(count("kv")) for block in network.blocks]
    hooks += [
        network.t_embedder.register_forward_hook(count("time")),
        network.t_block.register_forward_hook(count("time")),
        network.y_embedder.register_forward_hook(count("caption")),
    ]
    try:
        draw(["a red circle", "two stars"], callback=lambda step, *_: steps.append(dict(calls)))
    finally:
        for hook in hooks:
            hook.remove()
    depth = len(network.blocks)
    assert steps == [{"kv": depth, "time": 2, "caption": 1}] * STEPS


@pytest.mark.parametrize(
    "settings", [{"interval_guidance": (0.3, 0.9)}, {"pag_guidance_scale": 2.0}], ids=["interval", "pag"]
)
def test_the_prompts_alone_are_a_part_of_both_branches(draw, pipeline, monkeypatch, settings):
    """Text that steps need both with and without its null caption is encoded once; the picture stays."""
    encoded = []
    encode = pipeline.transformer.encode_text
    monkeypatch.setattr(pipeline.transformer, "encode_text", lambda *text: encoded.append(1) or encode(*text))
    once = draw(["a red circle", "two stars and a ring"], output_type="latent", **settings)
    assert len(encoded) == 1
    monkeypatch.delattr(TextCache, "last")
    twice = draw(["a red circle", "two stars and a ring"], output_type="latent", **settings)
    assert len(encoded) == 3
    assert_close("encoded once", once, twice, rel_rms=1e-5)


def test_steps_outside_the_interval_do_half_the_work(draw, pipeline, monkeypatch):
    batches = []
    forward = pipeline.transformer.forward

    def recorded(latents, *others, **settings):
        batches.append(len(latents))
        return forward(latents, *others, **settings)

    monkeypatch.setattr(pipeline.transformer, "forward", recorded)
    draw("a red circle", interval_guidance=(0.3, 0.9), num_inference_steps=10)
    assert set(batches) == {1, 2} and len(batches) == 10
