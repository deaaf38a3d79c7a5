"""The demo page, as its visitors use it: in a headless Chromium, and through gradio_client."""

import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from sana.data.prompts import read_picture
from sana.utils import images
from sana.utils.hub import ROOT
from tests.app import browser as web
from tests.ports import free_port

# Gradio's queue counts its calls with options that pandas is giving up.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]
needs_browser = pytest.mark.skipif(
    web.CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"
)


@pytest.fixture(scope="module")
def served():
    with web.served() as (address, engine):
        yield address, engine


@pytest.fixture(scope="module")
def browser():
    with web.opened_browser() as browser:
        yield browser


@pytest.fixture
def visit(browser, served):
    """Open the page as somebody new."""
    pages = []

    def open_page():
        pages.append(web.visit(browser, served[0]))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()


def expected(engine, prompt, seed, **settings):
    """The image that the library draws."""
    return engine.pipeline(prompt, seed=seed, output_type="pil", **settings)[0]


def levels_apart(one, other):
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


# In the page: a busy machine may show this process a later moment.
NOTE_FIRST_PICTURE = """() => new MutationObserver(() => {
    if (!window.atFirst && document.querySelector('#gallery img'))
        window.atFirst = document.querySelector('#status').innerText
}).observe(document.body, {subtree: true, childList: true, attributes: true})"""


@needs_browser
def test_a_prompt_becomes_its_picture(visit, served):
    page = visit()
    web.fill(page, "a red circle", seed=3, steps=40)
    page.evaluate(NOTE_FIRST_PICTURE)
    page.click("#run")
    page.wait_for_selector("#status progress[value]")
    page.wait_for_selector("#gallery img")
    assert "Step" in page.evaluate("window.atFirst"), "the first picture is a preview, long before the end"
    page.wait_for_selector("#status >> text=Drawn in")
    (picture,) = web.pictures(page)
    assert levels_apart(picture, expected(served[1], "a red circle", 3, num_inference_steps=40)) == 0
    assert picture.text["prompt"] == "a red circle"
    assert "seed 3 · CFG 4.5 · 40 steps · 256 x 256 · flow_dpm-solver" in page.content()


@needs_browser
def test_a_bad_size_is_one_line(visit, served):
    page = visit()
    web.fill(page, "a red circle", width=5000)
    page.click("#run")
    page.wait_for_selector("text=the nearest size is")
    web.fill(page, "a red circle", width=2000, height=2000)
    page.click("#run")
    page.wait_for_selector("text=2000 x 2000 is 4000000 pixels, at most 262144 are allowed")
    assert "2000 x 2000" in page.inner_text("#plan")
    web.fill(page, "a red circle", width=128, height=128, steps=4)
    web.run(page)
    assert web.pictures(page)[0].size == (128, 128)


@needs_browser
def test_two_visitors_at_once(visit, served):
    prompts = {"three blue stars": 5, "a pink heart above a brown square": 6}
    pages = [visit() for _ in prompts]
    for page, (prompt, seed) in zip(pages, prompts.items(), strict=True):
        web.fill(page, prompt, seed=seed, steps=12, count=2)
    for page in pages:
        page.click("#run")
    for page, (prompt, seed) in zip(pages, prompts.items(), strict=True):
        page.wait_for_selector("#status >> text=Drawn in")
        drawn = web.pictures(page)
        assert len(drawn) == 2
        own = expected(served[1], prompt, seed, num_inference_steps=12)
        assert levels_apart(drawn[0], own) <= 1


@needs_browser
def test_cancel_stops_the_work(visit, served):
    _, engine = served
    page = visit()
    web.fill(page, "a red circle", steps=100, count=8)
    page.click("#run")
    page.wait_for_selector("#status >> text=/Step [1-9]/")
    assert engine.drawing == 8
    page.click("#cancel")
    page.wait_for_selector("#status >> text=Cancelled")
    wait_for(lambda: engine.drawing == 0, 5)
    assert 'sana_requests_total{outcome="cancelled"} 1' in engine.counters.text({})


@needs_browser
def test_who_leaves_cancels(visit, served):
    _, engine = served
    page = visit()
    web.fill(page, "a red circle", steps=100, count=8)
    page.click("#run")
    page.wait_for_selector("#status >> text=/Step [1-9]/")
    page.close()
    wait_for(lambda: engine.drawing == 0, 10)


# Without a browser


def test_api(served, tmp_path, monkeypatch):
    """The documented call; and --from_image repeats what it returns."""
    import runpy

    address, engine = served
    client = Client(address, verbose=False, download_files=tmp_path)
    drawn, status, files, settings, seed = client.predict(
        prompt="a red circle", style="Ink", negative_prompt="blue", steps=3, count=2, api_name="/run"
    )
    assert [entry["caption"].split(" · ")[:2] for entry in drawn] == [
        [f"seed {seed}", "image 1"],
        [f"seed {seed}", "image 2"],
    ]
    assert status.startswith("Drawn in ")
    assert settings["num_inference_steps"] == 3
    prompt, record = read_picture(files[1])
    assert prompt.text.startswith("a red circle, drawn with pen")
    assert record["negative_prompt"].endswith(", blue")
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(ROOT / "scripts/inference.py"))
    script["run"](*script["make_parser"]().parse_known_args([f"--from_image={files[1]}", "--work_dir=again"]))
    (again,) = tmp_path.glob("again/*/*.png")
    assert levels_apart(images.load(again), images.load(files[1])) <= 1
    assert images.load(drawn[1]["image"]).tobytes() == images.load(files[1]).tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 70000}, "at most|the nearest size"),
        ({"count": 2.5}, "the number of images must be a whole number, got 2.5"),
        ({"seed": -1, "randomise": False}, "the seed must be from 0 to"),
        ({"prompt": "a" * 2001}, "2001 characters|at most|maximum"),
        ({"steps": 1}, "at least 2 steps, got 1"),
    ],
)
def test_the_server_keeps_the_bounds(served, change, message):
    with pytest.raises(AppError, match=message):
        Client(served[0], verbose=False).predict(**{"prompt": "a", "api_name": "/run"} | change)


def test_a_withheld_image_is_said_to_be_withheld(served, monkeypatch):
    answers = iter(["", "withheld: <it> is the second"])
    safety = SimpleNamespace(
        of_pictures=True, require_harmless=lambda prompt: None, objection=lambda picture: next(answers)
    )
    address, engine = served
    monkeypatch.setattr(engine, "safety", safety)
    drawn, status, files, *_ = Client(address, verbose=False).predict(
        prompt="a", steps=2, count=2, api_name="/run"
    )
    assert len(drawn) == len(files) == 1
    assert "<b>Image 2: withheld: &lt;it&gt; is the second</b>" in status


@pytest.mark.slow  # starting takes about 10 s of an idle core
def test_entry_point(tmp_path):
    """No arguments: the embedded model, on the port in the environment; Ctrl-C ends it."""
    port = free_port()
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        environment = os.environ | {"DEMO_PORT": str(port), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            [sys.executable, "app/app_sana.py", "--host=127.0.0.1"],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            env=environment,
            # Tests that run in the background of a shell would hand on that Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        wait_for(lambda: "up in" in log.read_text() or process.poll() is not None, 120)
        assert re.search(rf"^up in [0-9.]+ s: http://localhost:{port}$", log.read_text(), re.MULTILINE), (
            log.read_text()
        )
        drawn, *_ = Client(f"http://127.0.0.1:{port}", verbose=False).predict(
            prompt="a", steps=2, api_name="/run"
        )
        assert len(drawn) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()
