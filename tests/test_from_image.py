"""`--from_image`: a PNG holds all that it takes to draw it again."""

import logging
import runpy

import numpy as np
import pytest
from PIL import Image

from sana.data.prompts import read_picture
from sana.utils import images
from sana.utils.hub import ROOT
from tests.factories import write_model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(config, tmp_path, capsys, monkeypatch):
    """Run the script in this process on the small model; returns (status, paths, stderr)."""
    monkeypatch.setattr(logging.getLogger("sana"), "handlers", [])
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(ROOT / "scripts/inference.py"))

    def call(*arguments, model=config):
        parser = script["make_parser"]()
        status = 0
        try:
            parser.run(script["run"], *parser.parse_known_args([f"--config={model}", *arguments]))
        except SystemExit as left:
            status = left.code
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err

    return call


def pixels(path):
    return np.asarray(images.load(path))


FLAGS = (
    "--num_images_per_prompt=2",
    "--step=3",
    "--height=64",
    "--width=96",
    "--seed=5",
    "--cfg_scale=3",
    "--sampling_algo=flow_euler",
    "--negative_prompt=blue",
    "--interval_guidance=[0.1,0.9]",
    "--null_mask=own",
)


def test_a_picture_is_drawn_again(run, tmp_path):
    """Any of them: also the second sample of the second prompt, and one whose size stood in its prompt."""
    (tmp_path / "two.txt").write_text("a red circle\nthree/blue stars 🦊 --hw 128:64\n", encoding="utf-8")
    status, paths, err = run("--txt_file=two.txt", *FLAGS)
    assert status == 0, err
    assert len(paths) == 4
    for path in paths:
        status, again, err = run(f"--from_image={path}", "--work_dir=again")
        assert status == 0, err
        assert "drawn with other settings" not in err
        assert np.array_equal(pixels(again[0]), pixels(path))
        assert images.load(again[0]).text["seed"] == images.load(path).text["seed"]


def test_flags_come_before_the_picture(run):
    _, paths, _ = run("--prompt=a red circle", "--step=2", "--height=64", "--width=64")
    status, other, err = run(f"--from_image={paths[0]}", "--step=3", "--work_dir=w")
    assert status == 0, err
    assert "num_inference_steps 2 (now 3)" in err
    _, expected, _ = run("--prompt=a red circle", "--step=3", "--height=64", "--width=64", "--work_dir=v")
    assert np.array_equal(pixels(other[0]), pixels(expected[0]))
    status, seeded, err = run(f"--from_image={paths[0]}", "--seed=9", "--work_dir=w")
    _, expected, _ = run("--prompt=a red circle", "--step=2", "--height=64", "--width=64", "--seed=9")
    assert np.array_equal(pixels(seeded[0]), pixels(expected[0]))
    assert not np.array_equal(pixels(seeded[0]), pixels(paths[0]))


def test_other_weights_are_refused(run):
    _, paths, _ = run("--prompt=a red circle", "--step=2", "--height=64", "--width=64")
    status, out, err = run(
        f"--from_image={paths[0]}", model=ROOT / "configs/sana_config/tiny/Sana_tiny_img256.yaml"
    )
    assert (status, out) == (2, [])
    assert "was drawn with other weights: weights_sha256" in err


def test_what_is_no_such_picture(run):
    Image.new("RGB", (8, 8)).save("plain.png")
    Image.new("RGB", (8, 8)).save("plain.jpg")
    images.save_png(Image.new("RGB", (8, 8)), "broken.png", {"prompt": "a", "seed": "x", "settings": "{}"})
    for name in ("none.png", "plain.png", "plain.jpg", "broken.png"):
        with pytest.raises(ValueError, match=f"^{name} is no PNG that holds prompt, seed and settings"):
            read_picture(name)
        status, _, err = run(f"--from_image={name}")
        assert status == 2
        assert len(err.splitlines()) == 1
