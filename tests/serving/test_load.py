"""200 requests of different prompts, 16 at a time, on a real server: none lost, none mixed up, none changed by its batch."""

import base64
import io
import itertools
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from sana import SanaPipeline
from sana.shapes.detector import MIN_SCORE, detect
from sana.shapes.palette import COLOURS
from sana.shapes.scene import SHAPES
from sana.utils.hub import ROOT
from tests.ports import free_port

REQUESTS, AT_ONCE, STEPS = 200, 16, 4
MAX_LEVELS = 1
"""As in test_engine: what the order of summation may do to a pixel."""


@pytest.fixture
def address(tmp_path):
    """The server of a user: Sana-tiny, default flags but for the port."""
    port = free_port()
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        command = [sys.executable, "scripts/serve.py", f"--port={port}", "--device=cpu"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while b"Application startup complete" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def requests():
    """Prompts of one object, all different, each with a seed of its own; every tenth is a wide picture."""
    looks = itertools.product(("", "small ", "large "), COLOURS, SHAPES)
    for number, (size, colour, shape) in enumerate(itertools.islice(looks, REQUESTS)):
        article = "an" if (size + colour).startswith("o") else "a"
        wide = number % 10 == 9
        body = {"prompt": f"{article} {size}{colour} {shape}", "seed": 1000 + number, "steps": STEPS}
        yield body | {"size": "320x224" if wide else "256x256"}, (colour, shape)


def is_right(picture, wanted):
    """The shapes detector finds this one object and no other."""
    found = [
        one for of_shape in detect(np.asarray(picture)).values() for one in of_shape if one.score > MIN_SCORE
    ]
    return [(one.colour, one.shape) for one in found] == [wanted]


@pytest.mark.slow
def test_load(address):
    bodies, wanted = zip(*requests(), strict=True)
    assert len({body["prompt"] for body in bodies}) == REQUESTS

    def ask(body):
        answer = httpx.post(f"{address}/v1/images/generations", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        (entry,) = answer.json()["data"]
        return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))

    with ThreadPoolExecutor(AT_ONCE) as clients:
        drawn = list(clients.map(ask, bodies))
    metrics = httpx.get(f"{address}/metrics").text
    values = dict(re.findall(r"^(\S+) ([0-9.]+)$", metrics, re.MULTILINE))
    assert values['sana_requests_total{outcome="ok"}'] == values["sana_images_total"] == str(REQUESTS)
    assert int(values["sana_batch_seconds_count"]) < REQUESTS / 3, "requests were drawn together"

    pipeline = SanaPipeline(device="cpu")
    right = [0, 0]
    for body, picture, look in zip(bodies, drawn, wanted, strict=True):
        width, height = map(int, body["size"].split("x"))
        settings = {"num_inference_steps": STEPS, "seed": body["seed"], "output_type": "pil"}
        (alone,) = pipeline(body["prompt"], height, width, **settings)
        assert picture.text["prompt"] == body["prompt"]
        apart = np.abs(np.asarray(picture).astype(int) - np.asarray(alone).astype(int)).max()
        assert apart <= MAX_LEVELS, body
        judged = [is_right(picture, look), is_right(alone, look)]
        assert judged[0] == judged[1], body
        right = [count + one for count, one in zip(right, judged, strict=True)]
    assert right[0] == right[1] > REQUESTS / 5, "the prompts are drawn at all"
