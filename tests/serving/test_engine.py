"""The engine: batches, cancellation, time, limits, and that an image is its own request's."""

import re
import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sana import SanaPipeline
from sana.generation import Settings
from sana.serving.engine import Engine
from sana.serving.limits import Limits
from sana.serving.plan import plan_line
from sana.serving.ticket import Closed, Expired, QueueFull
from tests.factories import write_model

MAX_LEVELS = 1
"""How far a pixel may be from that of the image drawn alone: the order of summation differs between batches."""


def small(**changes):
    return Settings(
        **{"height": 64, "width": 64, "num_inference_steps": 2, "use_resolution_binning": False} | changes
    )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return SanaPipeline(write_model(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture
def start():
    """Make engines that are closed at the end of the test."""
    engines = []

    def make(pipeline, **settings):
        engines.append(Engine(pipeline, **{"timeout": 30} | settings))
        return engines[-1]

    yield make
    for engine in engines:
        if isinstance(engine.pipeline, Watched):
            engine.pipeline.gate.set()
        engine.close(drain=False)


class Watched:
    """A pipeline that notes its calls and, while `gate` is closed, waits in each step."""

    def __init__(self, pipeline):
        self._pipeline, self.calls, self.steps = pipeline, [], 0
        self.gate, self.stepped = threading.Event(), threading.Event()
        self.gate.set()

    def __getattr__(self, name):
        return getattr(self._pipeline, name)

    def __call__(self, prompts, *size, callback, **settings):
        self.calls.append((prompts, size, settings))

        def step(*arguments):
            self.steps += 1
            self.stepped.set()
            assert self.gate.wait(20)
            callback(*arguments)

        return self._pipeline(prompts, *size, callback=step, **settings)


def alone(pipeline, ticket):
    """The images of a request, each drawn in a call of its own."""
    settings = ticket.settings
    return [
        pipeline(
            task.prompt.text,
            *task.size,
            negative_prompt=settings.negative_prompt,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            seed=[task.seed],
            sampler=settings.sampler,
            use_resolution_binning=settings.use_resolution_binning,
            output_type="pil",
        )[0]
        for task in ticket.tasks
    ]


def levels_apart(one, other):
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def busy(engine, watched):
    """Let the engine begin a batch that waits in its first step; its request."""
    watched.gate.clear()
    watched.stepped.clear()
    ticket = engine.submit("it runs", small(guidance_scale=2.0))
    assert watched.stepped.wait(20)
    return ticket


# Batches


def test_mixed_requests_share_a_batch_and_keep_their_own_images(pipeline, start):
    watched = Watched(pipeline)
    engine = start(watched, max_batch=5)
    first = busy(engine, watched)
    tickets = [
        engine.submit("a red circle", small(seed=3)),
        engine.submit(
            "three blue stars and two green squares", small(seed=8, negative_prompt="a small heart"), 2
        ),
        engine.submit("a red circle", small(seed=4, negative_prompt="blue")),
        engine.submit("another size", small(width=96)),
        engine.submit("another scale", small(guidance_scale=3.0)),
        engine.submit("the same as the first two", small(seed=3)),
    ]
    watched.gate.set()
    results = [ticket.result() for ticket in [first, *tickets]]
    assert [len(prompts) for prompts, _, _ in watched.calls] == [1, 5, 1, 1]
    assert watched.calls[1][2]["negative_prompt"] == ["", "a small heart", "a small heart", "blue", ""]
    assert watched.calls[2][1] == (64, 96)
    for ticket, drawn in zip(tickets, results[1:], strict=True):
        for one, expected in zip(drawn, alone(pipeline, ticket), strict=True):
            assert levels_apart(one.picture, expected) <= MAX_LEVELS
    two = results[2]
    assert levels_apart(two[0].picture, two[1].picture) > 20, "two images of a request have their own noise"
    assert engine.counters.seconds_per_image > 0


def test_float_rounding_is_all_that_a_neighbour_does(pipeline):
    """The bound of MAX_LEVELS in the pixels before they are rounded. Sana-tiny: 4e-5 in 4 steps, 6e-6 in 20."""
    prompts = ["a red circle", "three blue stars and two green squares", "a heart", ""]
    settings = {"height": 64, "width": 64, "num_inference_steps": 4, "use_resolution_binning": False}
    together = pipeline(prompts, seed=[5, 6, 7, 8], **settings)
    for index, prompt in enumerate(prompts):
        own = pipeline(prompt, seed=[5 + index], **settings)[0]
        assert (together[index] - own).abs().max() < 1e-4
    assert (together[0] - together[1]).abs().max() > 0.1


def test_a_batch_waits_a_short_while_for_company(pipeline, start):
    watched = Watched(pipeline)
    engine = start(watched, max_batch=2, max_wait=30.0)
    one = engine.submit("a", small(seed=1))
    time.sleep(0.1)
    assert not watched.calls, "it waits"
    two = engine.submit("b", small(seed=2))  # a full batch waits no longer
    assert len(one.result()) == len(two.result()) == 1
    assert [prompts for prompts, _, _ in watched.calls] == [["a", "b"]]


def test_a_request_of_more_images_than_a_batch(pipeline, start):
    watched = Watched(pipeline)
    ticket = start(watched, max_batch=2).submit("a", small(), 3)
    pictures = [one.picture for one in ticket.result()]
    assert [len(prompts) for prompts, _, _ in watched.calls] == [2, 1]
    for picture, expected in zip(pictures, alone(pipeline, ticket), strict=True):
        assert levels_apart(picture, expected) <= MAX_LEVELS
    assert ticket.progress == 1


def test_one_that_fails_takes_no_other_with_it(pipeline, start):
    class Fragile(Watched):
        def __call__(self, prompts, *size, **settings):
            if "bad" in prompts:
                raise ArithmeticError("not finite")
            return super().__call__(prompts, *size, **settings)

    watched = Fragile(pipeline)
    engine = start(watched)
    busy(engine, watched)
    good, bad, after = (engine.submit(text, small()) for text in ("good", "bad", "after"))
    watched.gate.set()
    assert levels_apart(good.result()[0].picture, alone(pipeline, good)[0]) <= MAX_LEVELS
    with pytest.raises(ArithmeticError, match="not finite"):
        bad.result()
    assert len(after.result()) == 1
    assert engine.alive


# Leaving


def test_a_cancelled_request_does_not_stop_its_batch(pipeline, start):
    watched = Watched(pipeline)
    engine = start(watched, max_batch=2, max_wait=30.0)
    watched.gate.clear()
    tickets = [engine.submit("a", small(seed=1)), engine.submit("b", small(seed=2))]
    assert watched.stepped.wait(20)
    tickets[0].cancel()
    watched.gate.set()
    assert levels_apart(tickets[1].result()[0].picture, alone(pipeline, tickets[1])[0]) <= MAX_LEVELS
    with pytest.raises(CancelledError):
        tickets[0].result()


def test_a_batch_stops_between_steps_when_all_are_cancelled(pipeline, start):
    watched = Watched(pipeline)
    engine = start(watched, max_batch=2, max_wait=30.0)
    watched.gate.clear()
    tickets = [engine.submit(text, small(num_inference_steps=9)) for text in ("a", "b")]
    assert watched.stepped.wait(20)
    for ticket in tickets:
        ticket.cancel()
    watched.gate.set()
    deadline = time.monotonic() + 20
    while engine.drawing and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watched.steps == 1
    other = [engine.submit(text, small()) for text in ("c", "d")]
    assert [len(ticket.result()) for ticket in other] == [1, 1]


def test_a_request_that_is_cancelled_in_the_queue_is_never_drawn(pipeline, start):
    watched = Watched(pipeline)
    engine = start(watched)
    first = busy(engine, watched)
    lost, kept = engine.submit("lost", small(), 2), engine.submit("kept", small())
    assert engine.waiting == 3
    lost.cancel()
    assert engine.waiting == 1
    watched.gate.set()
    first.result()
    kept.result()
    assert [prompts for prompts, _, _ in watched.calls] == [["it runs"], ["kept"]]


def test_time_runs_out(pipeline, start):
    watched = Watched(pipeline)
    engine = start(watched, timeout=0.2)
    running = busy(engine, watched)
    queued = engine.submit("later", small(), timeout=0.1)
    for ticket, seconds in ((queued, "0.1"), (running, "0.2")):
        with pytest.raises(Expired, match=f"not finished within {seconds} s"):
            ticket.result()
    watched.gate.set()
    assert engine.submit("in time", small(), timeout=100).timeout == 0.2
    text = engine.counters.text({})
    assert 'sana_requests_total{outcome="expired"} 2' in text


# The queue and the end


def test_a_full_queue(pipeline, start):
    watched = Watched(pipeline)
    engine = start(watched, queue=3, max_wait=0)
    first = busy(engine, watched)
    waiting = engine.submit("a", small(), 2)
    with pytest.raises(
        QueueFull, match="the queue is full: 2 images are waiting; try again in about 2 s"
    ) as full:
        engine.submit("b", small(), 2)
    assert full.value.retry_after == 2
    engine.submit("c", small())  # one place was left
    with pytest.raises(ValueError, match="4 images were asked for, and the queue holds 3"):
        engine.submit("never", small(), 4)
    waiting.cancel()  # and now there are two again
    last = engine.submit("d", small(), 2)
    watched.gate.set()
    assert len(first.result()) + len(last.result()) == 3
    assert 'sana_requests_total{outcome="rejected"} 1' in engine.counters.text({})


@pytest.mark.parametrize("drain", [True, False])
def test_closing(pipeline, start, drain):
    watched = Watched(pipeline)
    engine = start(watched)
    running = busy(engine, watched)
    queued = engine.submit("queued", small())
    closing = threading.Thread(target=engine.close, kwargs={"drain": drain})
    closing.start()
    while engine.alive:
        time.sleep(0.01)
    with pytest.raises(Closed, match="no more requests"):
        engine.submit("late", small())
    watched.gate.set()
    closing.join(20)
    assert not closing.is_alive()
    assert len(running.result()) == 1
    if drain:
        assert len(queued.result()) == 1
    else:
        with pytest.raises(Closed, match="before it was drawn"):
            queued.result()


# Limits


@pytest.mark.parametrize(
    ("prompt", "settings", "count", "message"),
    [
        ("a" * 41, {}, 1, "the prompt has 41 characters, at most 40 are allowed"),
        ("a", {"negative_prompt": "b" * 41}, 1, "the negative prompt has 41 characters"),
        ("a", {}, 5, "the number of images must be from 1 to 4, got 5"),
        ("a", {}, 0, "the number of images must be from 1 to 4, got 0"),
        ("a", {"num_inference_steps": 51}, 1, "the number of steps must be from 1 to 50, got 51"),
        ("a", {"seed": -1}, 1, "the seed must be from 0 to 9223372036854775807, got -1"),
        ("a", {"guidance_scale": float("nan")}, 1, "the guidance scale must be from 1 to 30.0, got nan"),
        ("a", {"pag_guidance_scale": 31.0}, 1, "the PAG scale must be from 1 to 30.0, got 31.0"),
        (
            "a",
            {"height": 1024, "width": 1024},
            1,
            "1024 x 1024 is 1048576 pixels, at most 262144 are allowed",
        ),
        ("a --hw 1024:1024", {}, 1, "1024 x 1024 is 1048576 pixels"),
        (
            "a",
            {"height": 70},
            1,
            "must be positive multiples of 32, got 70 x 64; the nearest size is 64 x 64",
        ),
        (
            "a",
            {"height": 64, "width": 2048, "use_resolution_binning": True},
            1,
            "the nearest size is 128 x 512",
        ),
        ("a", {"height": 0}, 1, "got 0 x 64"),
        ("a --ar 0:1", {}, 1, "expected --ar height:width"),
        ("half \ud83e", {}, 1, "half of a character"),
        ("a", {"negative_prompt": "half \ud83e"}, 1, "half of a character"),
    ],
)
def test_what_is_too_much(pipeline, start, prompt, settings, count, message):
    engine = start(pipeline, limits=Limits(prompt=40, images=4, steps=50))
    with pytest.raises(ValueError, match=message) as error:
        engine.submit(prompt, small(**settings), count)
    assert "\n" not in str(error.value)
    assert engine.waiting == engine.drawing == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"queue": 0}, "queue must be at least 1, got 0"),
        ({"max_wait": float("nan")}, "max_wait must be at least 0, got nan"),
        ({"timeout": 0}, "timeout must be positive, got 0"),
    ],
)
def test_settings_of_the_engine(pipeline, settings, message):
    with pytest.raises(ValueError, match=message):
        Engine(pipeline, **settings)


# What the page shows


def test_previews_and_progress(pipeline, start):
    watched = Watched(pipeline)
    engine = start(watched, max_batch=2, max_wait=30.0)
    watched.gate.clear()
    seen = engine.submit("a", small(seed=1, num_inference_steps=3), previews=5)
    unseen = engine.submit("b", small(seed=2, num_inference_steps=3))
    assert watched.stepped.wait(20)
    assert seen.progress == 0
    watched.gate.set()
    (drawn,) = seen.result()
    unseen.result()
    assert unseen.previews == {}
    (preview,) = seen.previews.values()
    assert preview.size == drawn.picture.size
    assert levels_apart(preview, drawn.picture) < 128, "the prediction before the last step is near the end"
    assert seen.progress == 1


def test_previews_cost_little(pipeline, start, monkeypatch):
    engine = start(pipeline)
    assert engine.submit("a", small(num_inference_steps=20), previews=5).preview_every == 4
    assert engine.submit("a", small(num_inference_steps=20)).preview_every == 0
    monkeypatch.setattr("sana.serving.engine.PREVIEW_PIXELS", 96 * 64 - 1)
    assert engine.submit("a", small(), previews=5).preview_every == 1
    assert engine.submit("a --hw 64:96", small(), previews=5).preview_every == 0


@pytest.mark.parametrize(("of_pictures", "every"), [(True, 0), (False, 1)])
def test_a_picture_that_nobody_looked_at_is_not_shown(pipeline, start, of_pictures, every):
    safety = SimpleNamespace(
        of_pictures=of_pictures, require_harmless=lambda prompt: None, objection=lambda picture: "withheld"
    )
    ticket = start(pipeline, safety=safety).submit("a", small(), previews=5)
    assert ticket.preview_every == every
    assert ticket.result()[0].picture is None
    assert bool(ticket.previews) == (not of_pictures)


@pytest.mark.parametrize(("error", "traceback"), [(TypeError("ours"), True), (MemoryError("full"), False)])
def test_our_own_mistakes_keep_their_traceback(pipeline, start, caplog, error, traceback):
    class Broken(Watched):
        def __call__(self, *arguments, **settings):
            raise error

    with pytest.raises(type(error)):
        start(Broken(pipeline)).submit("a --hw 64:96", small()).result()
    (record,) = caplog.records
    assert ("96 x 64 failed" in record.message, bool(record.exc_info)) == (True, traceback)


def test_plan_counts_what_a_run_makes(pipeline):
    """Of decoding, which is most of it: as much as when it is done and its pixels become a picture."""
    from sana.runtime.memory import GIB, peak_of
    from sana.utils.images import to_uint8

    line = plan_line(pipeline, (1024, 1024), 24)  # drawn at 256 x 256
    latents = torch.zeros(24, 32, 8, 8)
    measured = peak_of(lambda: to_uint8(pipeline.autoencoder.decode(latents)))
    assert line.startswith("about 0.")
    assert "for 24 of 1024 x 1024: weights 0." in line
    stages = re.search(r"and for encoding the text ([\d.]+), denoising ([\d.]+), decoding ([\d.]+)$", line)
    assert float(stages[3]) == pytest.approx(measured / GIB, abs=0.01)
