"""Long runs: flat memory, files written in the background, prompts encoded first, failures that cost nothing else."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from sana.data.prompts import Prompt
from sana.generation import IncompleteError, Settings, generate
from sana.models.text_encoder import TextEncoder
from sana.pipeline import NonFiniteError, SanaPipeline
from sana.runtime import plan
from sana.runtime.streaming import Background
from tests.factories import write_model

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = Settings(num_inference_steps=2)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def prompts(count: int) -> list[Prompt]:
    return [Prompt(text=f"{number} red circles", index=number) for number in range(count)]


def test_jobs_run_in_order_beside_the_block_and_few_wait():
    done, threads, gate = [], set(), threading.Event()

    def job(number: int) -> None:
        gate.wait(10)
        threads.add(threading.current_thread())
        done.append(number)

    with Background(waiting=2) as background:
        background.submit(lambda: job(0))
        background.submit(lambda: job(1))
        third = threading.Thread(target=lambda: background.submit(lambda: job(2)))
        third.start()
        time.sleep(0.05)
        assert third.is_alive() and done == []  # there is no room for it
        gate.set()
        third.join(10)
    assert done == [0, 1, 2]
    assert len(threads) == 1 and threading.current_thread() not in threads


def test_the_thread_is_there_before_the_first_job():
    """Later there may be no memory for it, which Python would wait for ever."""
    before = set(threading.enumerate())
    with Background():
        [thread] = set(threading.enumerate()) - before
        assert thread.name.startswith("background")


def test_a_job_that_raises_ends_the_block():
    ran = []
    with pytest.raises(KeyError, match="broken"), Background() as background:
        background.submit(lambda: {}["broken"])
        background.submit(lambda: ran.append(1))
    assert not ran


def test_one_image_that_is_not_finite_costs_no_other(config, monkeypatch, tmp_path):
    pipeline = SanaPipeline(config, device="cpu")
    usual = SanaPipeline._require_finite

    def check(self, what, values):
        if len(values) == 1 and seen.pop(0) == 1:
            raise NonFiniteError("the latents of image(s) 0 are not finite")
        if len(values) > 1:
            raise NonFiniteError("the latents of image(s) 1 are not finite")
        usual(self, what, values)

    seen = [0, 0, 1, 0, 0]  # of each image alone: latents, then pixels
    monkeypatch.setattr(SanaPipeline, "_require_finite", check)
    with pytest.raises(
        IncompleteError, match="1 of 3 images failed, see .*: the latents of image.* are not finite"
    ):
        generate(pipeline, prompts(3), tmp_path, SETTINGS, batch_size=3)
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [("error" in row, (tmp_path / row["file"]).exists()) for row in rows] == [
        (False, True),
        (True, False),
        (False, True),
    ]


def test_all_prompts_are_encoded_once_and_first(config, monkeypatch, tmp_path):
    """Same files as with the text encoder there all the time, to the byte."""
    generate(SanaPipeline(config, device="cpu"), prompts(4), tmp_path / "stays", SETTINGS, batch_size=2)
    order, encode, decode = [], TextEncoder.encode, SanaPipeline.decode
    monkeypatch.setattr(
        TextEncoder, "encode", lambda self, texts: order.append("text") or encode(self, texts)
    )
    monkeypatch.setattr(SanaPipeline, "decode", lambda self, *a: order.append("decode") or decode(self, *a))
    goes = SanaPipeline(config, device="cpu", offload="text")
    generate(goes, prompts(4), tmp_path / "goes", SETTINGS, batch_size=2)
    assert order == ["text", "text", "decode", "decode"]
    for file in (tmp_path / "stays").glob("*.png"):
        assert file.read_bytes() == (tmp_path / "goes" / file.name).read_bytes()


class Stub:
    """A pipeline whose networks take no time."""

    def __init__(self, config: str) -> None:
        real = SanaPipeline(config, device="cpu")
        self.__dict__ |= {
            name: getattr(real, name) for name in ("config", "buckets", "text_encoder", "autoencoder")
        }
        self.quantize, self.offload, self.loras, self.weights_sha256 = {}, "none", (), "0"
        self.dtype, self.flow_shift, self.device, self.sizes = (
            torch.float32,
            3.0,
            torch.device("cpu"),
            real.sizes,
        )

    def __call__(self, texts, *size, callback, **settings) -> torch.Tensor:
        latents = torch.zeros(len(texts), 32, 8, 8)
        callback(1, 1, latents, latents)
        return latents

    def decode(self, latents, size, output_type) -> list:
        return [Image.new("RGB", (64, 64)) for _ in latents]


def draw_many(config: str, folder: str, count: int) -> None:
    """Print the memory of this process after 5, 50 and 100 % of the images, and how many are there."""
    held = []
    pipeline, usual = Stub(config), Stub.decode

    def decode(self, latents, *rest):
        decode.count += len(latents)
        if decode.count in (count // 20, count // 2, count):
            held.append(plan.held())
        return usual(self, latents, *rest)

    decode.count = 0
    Stub.decode = decode
    rows = generate(pipeline, prompts(count), folder, Settings(image_format="jpg"), batch_size=4)
    sys.stdout.write(json.dumps([held, len(rows)]))


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_prompts(config, tmp_path):
    code = f"from tests.test_streaming import draw_many; draw_many({str(config)!r}, {str(tmp_path)!r}, 10000)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    (early, half, late), rows = json.loads(done.stdout.splitlines()[-1])
    assert rows == 10000
    assert late - early < 16 * 2**20 and late - half < 8 * 2**20
