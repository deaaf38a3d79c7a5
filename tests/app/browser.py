"""A real browser on the real page: what the tests and the screenshot share."""

import asyncio
import gc
import io
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from sana import SanaPipeline
from sana.serving.engine import Engine
from sana.serving.page import CSS, Start, build

CHROMIUM = shutil.which("chromium")
SECONDS = 60_000  # the patience of playwright, in milliseconds


@contextmanager
def served(**settings) -> Iterator[tuple[str, Engine]]:
    """The page on the embedded model, in this process: (its address, its engine)."""
    engine = Engine(SanaPipeline(device="cpu"), **settings)
    start = Start(examples=["a red circle", "three blue stars", "a pink heart above a brown square"])
    page = None
    try:
        with gradios_loops_closed():
            page = build(engine, start)
            _, address, _ = page.launch(
                server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, css=CSS
            )
        yield address, engine
    finally:
        if page is not None:
            page.close(verbose=False)
        engine.close(drain=False)


@contextmanager
def gradios_loops_closed() -> Iterator[None]:
    """Gradio makes an event loop for every lock that it makes outside one, and closes none: the garbage must not warn later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        try:
            asyncio.get_running_loop()  # that of playwright, which is no garbage
        except RuntimeError:
            asyncio.set_event_loop(None)
        gc.collect()


@contextmanager
def opened_browser():
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


def visit(browser, address):
    """A visitor of their own, on the page, with nothing left from others."""
    page = browser.new_context(viewport={"width": 1200, "height": 820}).new_page()
    page.set_default_timeout(SECONDS)
    page.goto(address)
    page.wait_for_selector("#prompt textarea")
    return page


def fill(page, prompt, *, steps=None, seed=None, **numbers):
    """Type into the form; a seed also turns off that each run has another one."""
    page.fill("#prompt textarea", prompt)
    if seed is not None:
        page.uncheck("#randomise input")
        numbers["seed"] = seed
    if steps is not None:
        page.click("text=More")
        numbers["steps"] = steps
    for name, value in numbers.items():
        box = page.locator(f"#{name} input[type=number]")
        box.fill(str(value))
        box.blur()


def run(page):
    """Press Run and wait for the pictures."""
    page.click("#run")
    page.wait_for_selector("#status >> text=Drawn in")


def pictures(page):
    """The files behind the pictures in the gallery."""
    sources = dict.fromkeys(image.get_attribute("src") for image in page.locator("#gallery img").all())
    return [Image.open(io.BytesIO(page.request.get(source).body())) for source in sources]
