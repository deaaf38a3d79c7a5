"""The HTTP server, in this process and as a real one: answers, refusals, metrics, disconnects, shutdown."""

import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from sana import SanaPipeline
from sana.data.prompts import read_picture
from sana.serving.api import KEPT_IMAGES, make_app
from sana.serving.engine import Engine
from sana.serving.safety import Safety
from sana.utils.hub import ROOT
from tests.factories import make_tokenizer, write_model
from tests.ports import free_port

URL = "/v1/images/generations"
FAST = {"steps": 2, "size": "128x128"}  # drawn at 256 x 256, the only size of the model's table


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(config):
    return SanaPipeline(config, device="cpu")


@pytest.fixture
def serve(pipeline):
    """Make clients of applications; each is closed, and its engine with it, at the end of the test."""
    clients = []

    def make(**settings):
        client = TestClient(make_app(Engine(pipeline, **settings)), raise_server_exceptions=False)
        clients.append(client)
        return client.__enter__()

    yield make
    for client in clients:
        client.__exit__(None, None, None)


def pictures(answer):
    assert answer.status_code == 200, answer.text
    return [Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))) for entry in answer.json()["data"]]


def error(answer):
    body = answer.json()
    assert set(body) == {"error"}
    assert body["error"]["code"] == answer.status_code
    assert "\n" not in body["error"]["message"]
    return answer.status_code, body["error"]["message"]


# Answers


def test_images_are_those_of_the_pipeline(serve, pipeline, tmp_path):
    client = serve()
    body = {
        "prompt": "a red circle",
        "n": 2,
        "seed": 7,
        "negative_prompt": "blue",
        "guidance_scale": 3,
        **FAST,
    }
    answer = client.post(URL, json=body)
    drawn = pictures(answer)
    assert answer.json()["seed"] == 7
    assert abs(answer.json()["created"] - time.time()) < 60
    expected = pipeline(
        "a red circle",
        128,
        128,
        negative_prompt="blue",
        num_inference_steps=2,
        guidance_scale=3,
        num_images_per_prompt=2,
        seed=7,
        output_type="pil",
    )
    assert [np.array_equal(one, other) for one, other in zip(drawn, expected, strict=True)] == [True, True]
    (tmp_path / "image.png").write_bytes(base64.b64decode(answer.json()["data"][1]["b64_json"]))
    prompt, record = read_picture(tmp_path / "image.png")
    assert prompt.text == "a red circle"
    assert (record["seed"], record["guidance_scale"], record["width"]) == (7, 3, 128)


def test_defaults(serve):
    client = serve()
    first, second = (
        client.post(URL, json={"prompt": "a", "steps": 2, "size": "auto", "user": "me"}) for _ in "ab"
    )
    assert pictures(first)[0].size == (256, 256)
    assert first.json()["seed"] != second.json()["seed"], "without a seed each request has a new one"


def test_size_is_width_by_height(serve):
    (picture,) = pictures(serve().post(URL, json={"prompt": "a", "steps": 2, "size": "192x128"}))
    assert picture.size == (192, 128)


def test_url(serve):
    client = serve()
    answer = client.post(URL, json={"prompt": "a", "n": 2, "response_format": "url", **FAST})
    urls = [entry["url"] for entry in answer.json()["data"]]
    answers = [client.get(url) for url in urls]
    assert [answer.headers["content-type"] for answer in answers] == ["image/png"] * 2
    assert answers[0].content != answers[1].content
    assert Image.open(io.BytesIO(answers[0].content)).text["prompt"] == "a"
    assert error(client.get("/v1/images/none.png")) == (
        404,
        f"no such image: only the last {KEPT_IMAGES} are kept",
    )


def test_health_and_metrics(serve, pipeline):
    client = serve()
    health = client.get("/health").json()
    assert (health["status"], health["model"], health["waiting"]) == ("ok", "SanaMS_Tiny_P1_D8", 0)
    pictures(client.post(URL, json={"prompt": "a", "n": 3, **FAST, "model": health["model"]}))
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    values, types = {}, {}
    for (
        line
    ) in answer.text.splitlines():  # the text format: comments, and lines of a name, labels and a number
        if match := re.fullmatch(r"# TYPE (\w+) (counter|gauge|summary)", line):
            types[match[1]] = match[2]
        elif not line.startswith("# HELP "):
            name, labels, value = re.fullmatch(r'(\w+)(\{\w+="\w+"\})? ([0-9.]+)', line).groups()
            assert name.removesuffix("_sum").removesuffix("_count") in types
            values[name + (labels or "")] = float(value)
    assert answer.text.endswith("\n")
    assert values['sana_requests_total{outcome="ok"}'] == 1
    assert values["sana_images_total"] == 3
    assert values["sana_batch_seconds_count"] == 1
    assert 0 < values["sana_batch_seconds_sum"] <= values["sana_request_seconds_sum"]
    assert values["sana_images_waiting"] == 0


# Refusals


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 422, "prompt: Field required"),
        ({"prompt": 3}, 422, "prompt: Input should be a valid string"),
        ({"prompt": "a", "seeds": 3}, 422, "seeds: Extra inputs are not permitted"),
        ({"prompt": "a", "size": "0x64"}, 422, "size: String should match pattern"),
        ({"prompt": "a", "size": "big"}, 422, "size: String should match pattern"),
        ([], 422, "the body: Input should be a valid dictionary"),
        ({"prompt": "a", "n": "many"}, 422, "n: Input should be a valid integer"),
        ({"prompt": "a", "n": True}, 422, "n: Input should be a valid integer"),
        ({"prompt": "a", "seed": 1.5}, 422, "seed: Input should be a valid integer"),
        (
            {"prompt": "a", "response_format": "jpeg"},
            422,
            "response_format: Input should be 'b64_json' or 'url'",
        ),
        ({"prompt": "a", "n": 0}, 400, "the number of images must be from 1 to 8, got 0"),
        ({"prompt": "a", "n": 9}, 400, "the number of images must be from 1 to 8, got 9"),
        ({"prompt": "a" * 2001}, 400, "the prompt has 2001 characters, at most 2000 are allowed"),
        (
            {"prompt": "a", "size": "2048x2048"},
            400,
            "2048 x 2048 is 4194304 pixels, at most 262144 are allowed",
        ),
        ({"prompt": "a", "size": "2048x64"}, 400, "the nearest size is"),
        ({"prompt": "a", "steps": 0}, 400, "the number of steps must be at least 1, got 0"),
        ({"prompt": "a", "steps": 1}, 400, "this solver needs at least 2 steps, got 1"),
        ({"prompt": "a", "steps": 101}, 400, "the number of steps must be from 1 to 100, got 101"),
        ({"prompt": "a", "seed": -1}, 400, "the seed must be from 0 to"),
        ({"prompt": "a", "guidance_scale": 0}, 400, "the guidance scale must be from 1 to 30.0, got 0.0"),
        ({"prompt": "a", "sampler": "ddim"}, 400, "unknown sampler 'ddim'; choose from flow_dpm-solver"),
        ({"prompt": "a", "sampler": "scm"}, 400, "sampler 'scm' does not fit SanaMS_Tiny_P1_D8"),
        (
            {"prompt": "a", "model": "dall-e-3"},
            404,
            "this server draws with 'SanaMS_Tiny_P1_D8', not with 'dall-e-3'",
        ),
    ],
)
def test_wrong_input(serve, body, status, message):
    got, text = error(serve().post(URL, json=body))
    assert (got, message in text) == (status, True), text


def test_what_is_not_json(serve):
    client = serve()
    status, message = error(client.post(URL, content=b"{", headers={"content-type": "application/json"}))
    assert (status, message) == (422, "the body: JSON decode error")
    assert error(client.post(URL)) == (422, "the body: Field required")
    assert error(client.get("/nowhere")) == (404, "Not Found")
    assert error(client.delete(URL)) == (405, "Method Not Allowed")


class Slow:
    """A pipeline that waits in every step until `gate` is set."""

    def __init__(self, pipeline):
        self._pipeline, self.gate, self.steps = pipeline, threading.Event(), 0

    def __getattr__(self, name):
        return getattr(self._pipeline, name)

    def __call__(self, *arguments, callback, **settings):
        def step(*state):
            self.steps += 1
            assert self.gate.wait(20)
            callback(*state)

        return self._pipeline(*arguments, callback=step, **settings)


def test_a_full_queue_and_time(pipeline):
    slow = Slow(pipeline)
    engine = Engine(slow, queue=1, timeout=0.5, max_wait=0)
    with TestClient(make_app(engine)) as client:
        answers = []

        def ask():
            answers.append(client.post(URL, json={"prompt": "a", **FAST}))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread, enough in zip(threads, (lambda: engine.drawing, lambda: engine.waiting), strict=True):
            thread.start()
            while not enough():
                time.sleep(0.01)
        answer = client.post(URL, json={"prompt": "b", **FAST})
        assert error(answer)[0] == 429
        assert "the queue is full: 1 images are waiting" in error(answer)[1]
        assert int(answer.headers["Retry-After"]) >= 1
        for thread in threads:
            thread.join()
        assert [error(answer) for answer in answers] == [(504, "not finished within 0.5 s")] * 2
        slow.gate.set()


# The safety model


def write_classifier(folder, kind):
    """A random classifier of pictures or texts that says `nsfw` of everything, or nearly."""
    labels = {"id2label": {0: "normal", 1: "nsfw"}, "label2id": {"normal": 0, "nsfw": 1}}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "pictures":
        model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **shape, **labels))
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        tokenizer = make_tokenizer()
        model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **shape, **labels))
        tokenizer.save_pretrained(folder)
    model.classifier.bias.data[:] = model.classifier.bias.data.new_tensor([0.0, 3.0])
    model.save_pretrained(folder)
    return folder


def test_safety_of_pictures(serve, tmp_path):
    folder = write_classifier(tmp_path / "pictures", "pictures")
    status, message = error(serve(safety=Safety(folder)).post(URL, json={"prompt": "a", **FAST}))
    assert status == 400
    assert re.fullmatch(r"the safety model withheld this image \(nsfw: 0\.\d\d\)", message)
    client = serve(safety=Safety(folder, label="Normal", threshold=0.999))
    assert len(pictures(client.post(URL, json={"prompt": "a", **FAST}))) == 1

    class Second:
        of_pictures = True
        require_harmless = staticmethod(lambda prompt: None)
        seen = 0

        def objection(self, picture):
            self.seen += 1
            return "withheld: it is the second" if self.seen == 2 else ""

    data = serve(safety=Second()).post(URL, json={"prompt": "a", "n": 2, **FAST}).json()["data"]
    assert [set(entry) for entry in data] == [{"b64_json"}, {"withheld"}]


def test_safety_of_prompts(serve, tmp_path):
    folder = write_classifier(tmp_path / "texts", "texts")
    status, message = error(serve(safety=Safety(folder)).post(URL, json={"prompt": "a", **FAST}))
    assert status == 400
    assert re.fullmatch(r"the safety model refuses this prompt \(nsfw: 0\.\d\d\)", message)
    assert (
        len(pictures(serve(safety=Safety(folder, label="normal")).post(URL, json={"prompt": "a", **FAST})))
        == 1
    )


def test_what_is_no_safety_model(tmp_path, config):
    folder = write_classifier(tmp_path / "pictures", "pictures")
    for path, settings, message in (
        (folder, {"label": "cat"}, "has no label 'cat'; choose from normal, nsfw"),
        (folder, {"threshold": 0}, "must be above 0 and at most 1, got 0"),
        (
            config.parent / "text_encoder",
            {},
            "classifies neither pictures nor texts: it is Gemma2ForCausalLM",
        ),
        (tmp_path / "none", {}, "none"),
    ):
        with pytest.raises(ValueError, match=message):
            Safety(path, **settings)


# A real server


@pytest.fixture
def server(config, tmp_path):
    """`scripts/serve.py` in a process of its own: (its address, the process, its log)."""
    port = free_port()
    log = tmp_path / "log.txt"
    flags = (
        f"--config={config}",
        f"--port={port}",
        "--device=cpu",
        "--max_batch=4",
        "--max_wait_ms=50",
        "--queue=8",
    )
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "scripts/serve.py", *flags],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: process.poll() is not None or is_up(address))
        assert process.poll() is None, log.read_text()
        yield address, process, log
    finally:
        process.kill()
        process.wait()


def is_up(address):
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def metric(address, line):
    text = httpx.get(f"{address}/metrics").text
    return float(re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)[1])


@pytest.mark.slow  # starting a process takes about 10 s of an idle core
def test_a_client_that_leaves_and_a_shutdown_that_drains(server):
    """One process for all: it takes seconds to start."""
    address, process, log = server
    slow = {"prompt": "a", "steps": 100, "size": "256x256", "n": 4}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(address + URL, json=slow, timeout=0.3)
    wait_for(lambda: metric(address, 'sana_requests_total{outcome="cancelled"}') == 1)
    wait_for(lambda: metric(address, "sana_images_drawing") == 0)
    assert metric(address, "sana_images_total") == 0, "the batch was stopped between two steps"

    answers = []
    body = {"prompt": "a", "steps": 20, "size": "256x256"}
    threads = [
        threading.Thread(target=lambda: answers.append(httpx.post(address + URL, json=body, timeout=60)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: metric(address, "sana_images_drawing") + metric(address, "sana_images_waiting") == 3)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert [pictures(answer)[0].size for answer in answers] == [(256, 256)] * 3
    assert process.wait(20) in (0, -signal.SIGTERM)
    assert "Traceback" not in log.read_text()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")
