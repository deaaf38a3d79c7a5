import io
import logging
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sana.utils import distributed, hub, images, seeding
from sana.utils.files import write_atomic
from sana.utils.logging import configure, get_logger


def test_seeds_are_fixed_forever():
    """A changed value would silently change every published picture."""
    assert seeding.derive_seed(0, 3, 1) == 548815577452202644
    assert seeding.derive_seed("validation", 7) == 2607266749217575581


def test_seeds_tell_parts_apart():
    seeds = {
        seeding.derive_seed(*parts)
        for parts in [(0, 1), (1, 0), (0,), (0, "1"), (0, 1, 0), (11,), (1, 1), ("0", 1)]
    }
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generator_depends_on_its_parts_only():
    first = torch.randn(4, generator=seeding.generator("a", 1))
    torch.manual_seed(random.randrange(1000))
    torch.randn(3)
    assert torch.equal(first, torch.randn(4, generator=seeding.generator("a", 1)))
    assert not torch.equal(first, torch.randn(4, generator=seeding.generator("a", 2)))


def test_process_numbers(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (
        distributed.rank(),
        distributed.local_rank(),
        distributed.world_size(),
        distributed.is_main(),
    ) == (0, 0, 1, True)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (
        distributed.rank(),
        distributed.local_rank(),
        distributed.world_size(),
        distributed.is_main(),
    ) == (5, 1, 8, False)
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ValueError, match=r"RANK='one'"):
        distributed.rank()


def test_barrier_alone_starts_nothing():
    distributed.barrier()
    assert not torch.distributed.is_initialized()


def test_uint8_rounds_to_the_nearest_level():
    values = torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0, 2.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert images.to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]
    levels = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16).expand(1, 3, 16, 16) / 127.5 - 1
    assert torch.equal(
        images.to_uint8(levels)[0, ..., 1].flatten().int(), torch.arange(256, dtype=torch.int32)
    )


def test_uint8_puts_channels_last():
    image = torch.full((1, 3, 2, 4), -1.0)
    image[0, 1, 0, 3] = 1.0
    result = images.to_uint8(image)
    assert result.shape == (1, 2, 4, 3)
    assert result.dtype == torch.uint8
    assert result.nonzero().tolist() == [[0, 0, 3, 1]]


def test_uint8_refuses_values_that_are_no_colour():
    with pytest.raises(ValueError, match="1 of 12 pixel values are not finite"):
        images.to_uint8(torch.tensor([float("nan")] + [0.0] * 11).reshape(1, 3, 2, 2))


def test_png_keeps_pixels_and_text(tmp_path):
    picture = images.to_pil(torch.rand(1, 3, 8, 5) * 2 - 1)[0]
    prompt = "ein \u2603/🦊 on\ntwo lines " + "x" * 10_000
    path = images.save_png(picture, tmp_path / "new" / "a.png", {"prompt": prompt, "seed": 7})
    with Image.open(path) as read:
        assert np.array_equal(np.asarray(read), np.asarray(picture))
        assert read.text == {"prompt": prompt, "seed": "7"}
    assert os.listdir(path.parent) == ["a.png"]


def test_png_bytes_repeat(tmp_path):
    picture = images.to_pil(torch.zeros(1, 3, 8, 8))[0]
    a, b = (
        images.save_png(picture, tmp_path / name, {"prompt": "a"}).read_bytes() for name in ("a.png", "b.png")
    )
    assert a == b


def test_jpeg_quality(tmp_path):
    picture = images.to_pil(torch.rand(1, 3, 32, 32) * 2 - 1)[0]
    small, large = (images.save_jpeg(picture, tmp_path / f"{q}.jpg", q).stat().st_size for q in (20, 95))
    assert small < large


def test_grid_places_row_by_row():
    colours = ["red", "lime", "blue"]
    sheet = images.grid([Image.new("RGB", (4, 4), colour) for colour in colours], columns=2)
    assert sheet.size == (8, 8)
    assert [sheet.getpixel(xy) for xy in [(0, 0), (4, 0), (0, 4), (4, 4)]] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]


def test_grid_centres_smaller_pictures():
    sheet = images.grid([Image.new("RGB", (2, 2), "red"), Image.new("RGB", (4, 6), "blue")])
    assert sheet.size == (8, 6)
    assert sheet.getpixel((1, 2)) == (255, 0, 0)
    assert sheet.getpixel((1, 1)) == sheet.getpixel((0, 2)) == (255, 255, 255)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 3), (6, 3), (7, 3), (8, 4), (12, 4)])
def test_grid_has_no_holes_where_that_is_possible(count, columns):
    assert images.grid([Image.new("RGB", (2, 2))] * count).width == 2 * columns


def test_grid_refuses_nothing():
    with pytest.raises(ValueError, match="at least one image"):
        images.grid([])
    with pytest.raises(ValueError, match="at least one column, got 0"):
        images.grid([Image.new("RGB", (2, 2))], columns=0)


def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path):
    path = write_atomic(tmp_path / "deep" / "file", b"old")

    def fail(handle: io.BufferedWriter) -> None:
        handle.write(b"half of the n")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]
    write_atomic(path, lambda handle: handle.write(b"new"))
    assert path.read_bytes() == b"new"


def test_write_atomic_gives_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    assert write_atomic(tmp_path / "a", b"").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_write_atomic_takes_the_longest_name(tmp_path):
    assert write_atomic(tmp_path / ("n" * 255), b"x").exists()


def test_resolve_prefers_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("pyproject.toml") == hub.ROOT / "pyproject.toml"
    (tmp_path / "pyproject.toml").write_text("")
    assert hub.resolve("pyproject.toml").resolve() == tmp_path / "pyproject.toml"
    for wrong in ("no/such/file", ""):
        with pytest.raises(ValueError, match="no such file or folder"):
            hub.resolve(wrong)


def test_resolve_downloads_only_what_is_named(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(repo, allow_patterns=None):
        calls.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.pth").write_bytes(b"")
    assert hub.resolve("hf://owner/repo/inner/a.pth") == tmp_path / "inner" / "a.pth"
    assert hub.resolve("hf://owner/repo/") == tmp_path
    assert calls == [("owner/repo", ["inner/a.pth", "inner/a.pth/**"]), ("owner/repo", None)]
    with pytest.raises(ValueError, match="holds no 'b.pth'"):
        hub.resolve("hf://owner/repo/b.pth")


@pytest.mark.parametrize(
    "name", ["hf://", "hf://owner", "hf://owner/", "hf:///repo/file", "hf://owner/repo/../../x"]
)
def test_resolve_refuses_malformed_hub_names(name):
    with pytest.raises(ValueError, match="malformed hub name"):
        hub.resolve(name)


def test_resolve_says_why_a_download_failed(monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise OSError("no route to host\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"could not fetch hf://a/b/c: no route to host; without a network"):
        hub.resolve("hf://a/b/c")


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hub.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    before = hub.sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = hub.sha256(tmp_path)
    (tmp_path / "b").write_bytes(b"abd")
    assert len({before, renamed, hub.sha256(tmp_path)}) == 3


def test_log_lines_go_to_stderr(capsys, monkeypatch):
    logger = logging.getLogger("sana")
    monkeypatch.setattr(logger, "handlers", [])
    level = logger.level
    try:
        configure()
        configure()
        get_logger("sana.pipeline").info("hello")
        assert capsys.readouterr().err.count("hello") == 1
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr(logger, "handlers", [])
        configure()
        get_logger("train").info("quiet")
        get_logger("train").warning("loud")
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "quiet" not in captured.err
        assert "[rank 1] WARNING sana.train: loud" in captured.err
    finally:
        logger.setLevel(level)


def test_light_modules_do_not_import_torch():
    code = (
        "import sys, sana.utils.logging, sana.utils.seeding, sana.utils.hub, sana.utils.files, sana.data.prompts;"
        "sana.utils.seeding.derive_seed(1); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=hub.ROOT, check=False).returncode == 0
