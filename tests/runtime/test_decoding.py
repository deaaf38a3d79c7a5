"""Out of memory while decoding: what is tried, in which order, and what is left when nothing helps."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sana.models.autoencoder import Autoencoder
from sana.runtime.decoding import DecodeError, decode
from sana.runtime.latents import Picture, latents_path, load_latents, save_latents
from sana.utils.oom import is_out_of_memory
from tests.factories import make_autoencoder

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


class Poor:
    """An autoencoder that can only do what `affords` allows, and notes what it is asked for."""

    downsample = 32

    def __init__(self, affords, error=None):
        self.affords, self.asked = affords, []
        self.error = error or RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
        )

    def decode(self, latents, *, max_bytes, tile):
        asked = (len(latents), max_bytes, tile)
        self.asked.append(asked)
        if not self.affords(*asked):
            raise self.error
        return latents.repeat_interleave(32, 2).repeat_interleave(32, 3)[:, :3]


def latents(count=1, side=64):
    return torch.randn(count, 4, side, 2, generator=torch.Generator().manual_seed(0))


def test_strips_are_halved_until_they_fit():
    poor = Poor(lambda count, max_bytes, tile: (max_bytes or 2**31) <= 300 * MIB)
    assert torch.equal(
        decode(poor, latents()), Poor(lambda *_: True).decode(latents(), max_bytes=None, tile=None)
    )
    assert poor.asked == [(1, None, None), (1, 1024 * MIB, None), (1, 512 * MIB, None), (1, 256 * MIB, None)]


def test_a_batch_is_divided_first():
    poor = Poor(lambda count, max_bytes, tile: count == 1)
    pixels = decode(poor, latents(3))
    assert torch.equal(pixels, Poor(lambda *_: True).decode(latents(3), max_bytes=None, tile=None))
    assert poor.asked == [(3, None, None)] + 3 * [(1, None, None)]


def test_tiles_come_last(caplog):
    poor = Poor(lambda count, max_bytes, tile: tile == 512)
    decode(poor, latents(), max_bytes=100 * MIB)
    assert poor.asked == [(1, 100 * MIB, None), (1, 64 * MIB, 1024), (1, 64 * MIB, 512)]
    assert "decoding 2048 x 64" in caplog.text and "tiles of 512 pixels" in caplog.text


def test_when_nothing_helps_the_error_has_the_latents():
    poor = Poor(lambda *_: False)
    with pytest.raises(DecodeError, match="2048 x 64, at last with one image, tiles of 256") as caught:
        decode(poor, latents(2), max_bytes=64 * MIB)
    assert torch.equal(caught.value.latents, latents(2))
    assert poor.asked[-1] == (1, 64 * MIB, 256)
    poor = Poor(lambda *_: False)
    with pytest.raises(DecodeError):
        decode(poor, latents(side=8), tile=256)  # no smaller tile
    assert poor.asked == [(1, None, 256)]


def test_another_error_is_not_tried_again():
    poor = Poor(lambda *_: False, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        decode(poor, latents())
    assert len(poor.asked) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_out_of_memory_is_recognised(error, expected):
    assert is_out_of_memory(error) is expected


def decode_under_a_limit(extra: int) -> None:
    """In a process of its own: a picture of 2048 x 2048 where only `extra` bytes of addresses are left."""
    torch.set_num_threads(1)
    autoencoder = Autoencoder(make_autoencoder()).requires_grad_(False)
    latents = torch.randn(1, 32, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        autoencoder.decode(latents[..., :2, :2])  # libraries have their buffers
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))
        try:
            pixels, kept = decode(autoencoder, latents, max_bytes=64 * MIB), None
        except DecodeError as error:
            pixels, kept = None, error.latents
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if kept is None:
            exact = autoencoder.decode(latents)
            result = {"error": ((pixels - exact).norm() / exact.norm()).item()}
        else:
            result = {"latents": torch.equal(kept, latents)}
        sys.stdout.write(json.dumps(result))


def run_under_a_limit(extra: int) -> dict:
    code = f"from tests.runtime.test_decoding import decode_under_a_limit; decode_under_a_limit({extra})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return json.loads(answer.stdout.splitlines()[-1]) | {"log": answer.stderr}


def test_without_memory_the_latents_are_kept():
    """For real: the allocator, or oneDNN, raises."""
    answer = run_under_a_limit(10 * MIB)
    assert answer["latents"] is True
    assert answer["log"].count("out of memory while decoding 2048 x 2048") == 3, answer["log"]


@pytest.mark.slow
def test_with_little_memory_it_is_tiles():
    answer = run_under_a_limit(150 * MIB)
    assert "tiles of" in answer["log"]
    assert 0 < answer["error"] < 0.3  # measured: 0.07


# What is left of a picture that could not be decoded


def picture(**changes):
    values = {"file": "a.png", "size": (60, 100), "autoencoder": "somewhere", "dtype": "float32"}
    return Picture(**values | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_of_latents_is_read_back(dtype, tmp_path):
    path = latents_path(tmp_path / "new" / "a.b.png")
    assert path.name == "a.b.latents.safetensors"
    whole = picture(
        text={"prompt": "ein Bär, \U0001f43b"}, row={"file": "a.b.png", "seed": 3}, jpeg_quality=80
    )
    values = torch.randn(1, 32, 2, 3).to(dtype)
    save_latents(path, values, whole)
    read, known = load_latents(path)
    assert torch.equal(read, values) and read.dtype == dtype
    assert known == whole


def test_a_file_of_latents_holds_one_picture(tmp_path):
    with pytest.raises(ValueError, match=r"one picture: latents \(1, C, h, w\), not \(2, 32, 2, 2\)"):
        save_latents(tmp_path / "a", torch.zeros(2, 32, 2, 2), picture())


def test_another_file_is_one_clear_error(tmp_path):
    path = tmp_path / "a.latents.safetensors"
    with pytest.raises(ValueError, match="is no file of latents"):
        load_latents(path)
    save_file({"latents": torch.zeros(1, 32, 2, 2)}, path)
    with pytest.raises(ValueError, match="is no file of latents: KeyError: 'picture'"):
        load_latents(path)
    save_latents(path, torch.zeros(1, 32, 2, 2), picture())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is no file of latents"):
        load_latents(path)
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        picture(dtype="int8")
