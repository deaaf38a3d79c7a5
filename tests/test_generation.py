import json
import re
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image

from sana import generation
from sana.data.prompts import Prompt
from sana.generation import Settings, file_stem, folder_name, generate, generate_folder
from sana.pipeline import SanaPipeline, image_seed
from sana.utils import distributed, hub, images
from tests.factories import write_model

SETTINGS = Settings(height=64, width=64, use_resolution_binning=False, num_inference_steps=2)
PROMPTS = [
    Prompt(text=text, index=index)
    for index, text in enumerate(
        ["a red circle", "three blue stars", "a red circle", "", "../etc/pass\nwd 🦊"]
    )
]
FILES = [
    "00000_a-red-circle",
    "00001_three-blue-stars",
    "00002_a-red-circle",
    "00003_image",
    "00004_etc-pass-wd",
]


class Counting:
    """A pipeline that counts the images it draws, and can fail after so many."""

    def __init__(self, pipeline, limit=None):
        self.pipeline, self.limit, self.drawn = pipeline, limit, 0

    def __getattr__(self, name):
        return getattr(self.pipeline, name)

    def __call__(self, prompts, *args, **settings):
        if self.limit is not None and self.drawn + len(prompts) > self.limit:
            raise KeyboardInterrupt
        self.drawn += len(prompts)
        return self.pipeline(prompts, *args, **settings)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return SanaPipeline(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def reference(pipeline, tmp_path_factory):
    """One run in batches of two."""
    folder = tmp_path_factory.mktemp("reference")
    rows = generate(pipeline, PROMPTS, folder, SETTINGS, batch_size=2)
    return folder, rows


def contents(folder):
    """File name -> bytes; in the manifest, lines in any order."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["manifest.jsonl"] = sorted(files["manifest.jsonl"].splitlines())
    return files


# Files and manifest


def test_files_and_manifest(reference, pipeline):
    folder, rows = reference
    assert [row["file"] for row in rows] == [f"{stem}.png" for stem in FILES]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(row["file"] for row in rows), "manifest.jsonl"]
    )
    lines = [
        json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert lines == rows
    assert rows[4] | {"settings": None, "versions": None} == {
        "file": "00004_etc-pass-wd.png",
        "index": 4,
        "key": None,
        "prompt": "../etc/pass\nwd 🦊",
        "sample": 0,
        "seed": image_seed(0, 4, 0),
        "height": 64,
        "width": 64,
        "settings": None,
        "versions": None,
    }
    assert rows[0]["settings"]["weights_sha256"] == hub.sha256(pipeline.weights)
    assert rows[0]["settings"]["num_inference_steps"] == 2
    assert rows[0]["settings"]["sampler"] == "flow_dpm-solver"
    assert rows[0]["settings"]["dtype"] == "float32"
    assert rows[0]["settings"]["flow_shift"] == 3.0
    assert rows[0]["settings"]["null_mask"] == "prompt"
    assert rows[0]["settings"]["loras"] == []
    assert rows[0]["settings"]["lowercase"] is False
    assert rows[0]["versions"]["torch"] == version("torch")


def test_the_seed_in_the_manifest_draws_the_file_again(reference, pipeline):
    folder, rows = reference
    for row in rows[1::3]:
        settings = row["settings"]
        names = (
            "guidance_scale",
            "num_inference_steps",
            "use_resolution_binning",
            "sampler",
            "negative_prompt",
        )
        picture = pipeline(
            row["prompt"],
            64,
            64,
            seed=[row["seed"]],
            output_type="pil",
            **{name: settings[name] for name in names},
        )[0]
        assert_same_picture(picture, images.load(folder / row["file"]))


def test_png_holds_prompt_seed_and_settings(reference):
    folder, rows = reference
    text = images.load(folder / rows[4]["file"]).text
    assert text["prompt"] == rows[4]["prompt"]
    assert text["seed"] == str(rows[4]["seed"])
    assert json.loads(text["settings"]) == rows[4]["settings"]


def test_equal_prompts_get_different_pictures(reference):
    folder, rows = reference
    first, third = (np.asarray(images.load(folder / rows[i]["file"])).astype(int) for i in (0, 2))
    assert np.abs(first - third).mean() > 5


def assert_same_picture(a, b):
    """Equal but for rounding: batch mates change the last bit of float32, so a level of 255 here and there."""
    difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3  # measured: 0 to 2e-4


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_mates_do_not_matter(reference, pipeline, tmp_path, batch_size):
    folder, rows = reference
    generate(pipeline, PROMPTS, tmp_path, SETTINGS, batch_size=batch_size)
    for row in rows:
        assert_same_picture(images.load(folder / row["file"]), images.load(tmp_path / row["file"]))


def test_a_part_of_the_list_gives_the_same_files(reference, pipeline, tmp_path):
    generate(pipeline, PROMPTS[2:4], tmp_path, SETTINGS, batch_size=2)
    for name in (f"{FILES[2]}.png", f"{FILES[3]}.png"):
        assert (tmp_path / name).read_bytes() == (reference[0] / name).read_bytes()


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 2), (3, 1), (3, 2)])
def test_processes_divide_the_work(reference, pipeline, tmp_path, monkeypatch, processes, batch_size):
    """Processes played one inside the other: where one first waits for the others, the next does its share.

    With one batch size the files are those of a single process, to the byte.
    """
    shares = [Counting(pipeline) for _ in range(processes)]
    state = {"rank": 0}
    waits = []

    def barrier():
        rank = state["rank"]
        waits.append(rank)
        if waits.count(rank) == 1 and rank + 1 < processes:
            state["rank"] = rank + 1
            assert [row["file"] for row in run()] == [f"{stem}.png" for stem in FILES]
            state["rank"] = rank

    def run():
        share = shares[state["rank"]]
        return generate(share, PROMPTS, tmp_path / "parts", SETTINGS, batch_size=batch_size)

    if batch_size == 2:
        folder, rows = reference
    else:
        folder, rows = tmp_path / "one", generate(pipeline, PROMPTS, tmp_path / "one", SETTINGS, batch_size=1)
    monkeypatch.setattr(distributed, "rank", lambda: state["rank"])
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setattr(distributed, "barrier", barrier)
    assert run() == rows
    assert waits == [*range(processes), *range(processes - 1, 0, -1), 0]
    assert sum(share.drawn for share in shares) == len(PROMPTS)
    assert min(share.drawn for share in shares) > 0
    assert contents(tmp_path / "parts") == contents(folder)
    manifests = [(place / "manifest.jsonl").read_bytes() for place in (tmp_path / "parts", folder)]
    assert manifests[0] == manifests[1]


# Resume


def test_a_second_run_draws_nothing(pipeline, tmp_path):
    first = generate(pipeline, PROMPTS, tmp_path, SETTINGS, batch_size=2)
    before = contents(tmp_path)
    counting = Counting(pipeline)
    assert generate(counting, PROMPTS, tmp_path, SETTINGS, batch_size=3) == first
    assert counting.drawn == 0
    assert contents(tmp_path) == before


def test_an_interrupted_run_is_resumed_to_the_same_bytes(reference, pipeline, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate(Counting(pipeline, limit=2), PROMPTS, tmp_path, SETTINGS, batch_size=2)
    assert len(list(tmp_path.glob("*.png"))) == 2
    counting = Counting(pipeline)
    assert generate(counting, PROMPTS, tmp_path, SETTINGS, batch_size=2) == reference[1]
    assert counting.drawn == 3
    assert contents(tmp_path) == contents(reference[0])


def test_a_run_killed_while_it_wrote_is_resumed_to_the_same_bytes(reference, pipeline, tmp_path, monkeypatch):
    save, saved = images.save_png, []

    def killed(*args):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(save(*args))

    monkeypatch.setattr(images, "save_png", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, PROMPTS, tmp_path, SETTINGS, batch_size=2)
    monkeypatch.undo()
    part = next(tmp_path.glob("manifest.rank0*"))
    part.write_bytes(part.read_bytes()[:-20])  # the third line is cut short
    counting = Counting(pipeline)
    generate(counting, PROMPTS, tmp_path, SETTINGS, batch_size=2)
    assert counting.drawn == 3  # the second batch as a whole, and the third
    assert contents(tmp_path) == contents(reference[0])


def test_a_lost_file_is_drawn_again(reference, pipeline, tmp_path):
    generate(pipeline, PROMPTS, tmp_path, SETTINGS, batch_size=2)
    lost = tmp_path / f"{FILES[4]}.png"
    lost.unlink()
    counting = Counting(pipeline)
    generate(counting, PROMPTS, tmp_path, SETTINGS, batch_size=2)
    assert counting.drawn == 1
    assert lost.read_bytes() == (reference[0] / lost.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 3}, r"other settings: num_inference_steps 2 \(now 3\)"),
        ({"negative_prompt": "blue"}, r"negative_prompt '' \(now 'blue'\)"),
        ({"seed": 1}, r"seed 0 \(now 1\)"),
        ({"image_format": "jpg"}, r"image_format 'png' \(now 'jpg'\)"),
    ],
)
def test_other_settings_in_one_folder_are_refused(reference, pipeline, change, message):
    before = contents(reference[0])
    with pytest.raises(ValueError, match=message):
        generate(pipeline, PROMPTS, reference[0], replace(SETTINGS, **change))
    assert contents(reference[0]) == before


def test_other_weights_in_one_folder_are_refused(reference, pipeline, tmp_path):
    other = SanaPipeline.from_components(
        pipeline.config, pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder
    )
    with pytest.raises(ValueError, match=r"weights_sha256 '\w{64}' \(now None\)"):
        generate(other, PROMPTS, reference[0], SETTINGS)


def test_a_changed_prompt_is_drawn(pipeline, tmp_path):
    old = [Prompt(text="a red circle", index=0, key="k"), Prompt(text="a red circle?", index=1)]
    new = [Prompt(text="a blue circle", index=0, key="k"), Prompt(text="a red circle!", index=1)]
    before = generate(pipeline, old, tmp_path, SETTINGS)
    counting = Counting(pipeline)
    after = generate(counting, new, tmp_path, SETTINGS)
    assert (
        [row["file"] for row in before]
        == [row["file"] for row in after]
        == ["k.png", "00001_a-red-circle.png"]
    )
    assert counting.drawn == 2
    assert [row["prompt"] for row in after] == ["a blue circle", "a red circle!"]
    assert images.load(tmp_path / "k.png").text["prompt"] == "a blue circle"


def test_more_samples_are_added(pipeline, tmp_path):
    generate(pipeline, PROMPTS[:1], tmp_path, SETTINGS)
    counting = Counting(pipeline)
    rows = generate(counting, PROMPTS[:1], tmp_path, SETTINGS, num_images_per_prompt=3)
    assert [row["file"] for row in rows] == [f"{FILES[0]}{end}.png" for end in ("", "-s1", "-s2")]
    assert [row["seed"] for row in rows] == [image_seed(0, 0, sample) for sample in range(3)]
    assert counting.drawn == 2


def test_runs_on_parts_share_a_folder(reference, pipeline, tmp_path):
    generate(pipeline, PROMPTS[2:], tmp_path, SETTINGS, batch_size=2)
    generate(pipeline, PROMPTS[:2], tmp_path, SETTINGS, batch_size=2)
    rows = generate(Counting(pipeline, limit=0), PROMPTS, tmp_path, SETTINGS)
    assert rows == reference[1]


# Names


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        (Prompt(text="A Red  circle!", index=3), "00003_a-red-circle"),
        (Prompt(text="../../a/b\\c\x00\n", index=0), "00000_a-b-c"),
        (Prompt(text="🦊", index=1), "00001_image"),
        (Prompt(text="Ünïcödé ﬁsh", index=2), "00002_unicode-fish"),
        (Prompt(text="word " * 2000, index=100000), "100000_" + ("word-" * 12)[:-1]),
        (Prompt(text="x", index=4, key="005695-0057"), "005695-0057"),
        (Prompt(text="x", index=4, key="cat_1.v2"), "cat_1.v2"),
        (Prompt(text="x", index=4, key="00000"), "00000"),
        (Prompt(text="x", index=4, key="a/b"), "00004_x"),
        (Prompt(text="x", index=4, key=".."), "00004_x"),
        (Prompt(text="x", index=4, key=".hidden"), "00004_x"),
        (Prompt(text="x", index=4, key=""), "00004_x"),
        (Prompt(text="x", index=4, key="a\n"), "00004_x"),
        (Prompt(text="x", index=4, key="k" * 101), "00004_x"),
        (Prompt(text="x", index=4, key="00007_x"), "00004_x"),  # could be the name of another prompt
        (Prompt(text="x", index=4, key="cat-s1"), "00004_x"),  # could be another sample of "cat"
        (Prompt(text="x", index=4, key="é"), "00004_x"),
    ],
)
def test_file_names(prompt, stem):
    assert file_stem(prompt) == stem


def test_two_prompts_with_one_name_are_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="two prompts would be written to k.png"):
        generate(pipeline, [Prompt(text="a", key="k"), Prompt(text="b", key="k")], tmp_path / "new", SETTINGS)
    assert not (tmp_path / "new").exists()


def test_ten_thousand_characters(pipeline, tmp_path):
    text = "a very long prompt 🦊 " * 500
    (row,) = generate(pipeline, [Prompt(text=text.strip())], tmp_path, SETTINGS)
    assert images.load(tmp_path / row["file"]).text["prompt"] == row["prompt"] == text.strip()


def test_folder_names_tell_settings_apart(pipeline):
    changes = [
        {},
        {"seed": 1},
        {"guidance_scale": 3.0},
        {"pag_guidance_scale": 2.0},
        {"negative_prompt": "x"},
        {"width": 128},
        {"sampler": "flow_euler"},
        {"num_inference_steps": 3},
        {"interval_guidance": (0.1, 0.9)},
        {"image_format": "jpg"},
        {"null_mask": "own"},
    ]
    names = [folder_name(pipeline, replace(SETTINGS, **change), "custom") for change in changes]
    assert len(set(names)) == len(changes)
    stem = r"custom_epochunknown_stepunknown_scale4.5_step2_size64_sampflow_dpm-solver_seed0_float32_flowshift3.0"
    assert re.fullmatch(stem + "_[0-9a-f]{8}", names[0])
    assert names[0] + "-x" == folder_name(pipeline, SETTINGS, "custom", "-x")
    assert "_pagscale2.0_" in names[3]
    assert "_size64x128_" in names[5]
    assert "_intervalguidance0.10.9_" in names[8]
    explicit = replace(SETTINGS, sampler="flow_dpm-solver")
    assert folder_name(pipeline, explicit, "custom") == names[0]


# Sizes


def test_sizes_inside_prompts(pipeline, tmp_path):
    texts = [
        "a red circle --ar 1:4",
        "a red circle",
        "a blue star --hw 96:64",
        "--aspect_ratio 4:1 a heart",
        "a ring",
    ]
    prompts = [Prompt(text=text, index=index) for index, text in enumerate(texts)]
    rows = generate(pipeline, prompts, tmp_path, replace(SETTINGS, height=None, width=None), batch_size=2)
    assert [(row["height"], row["width"]) for row in rows] == [
        (128, 512),
        (256, 256),
        (96, 64),
        (512, 128),
        (256, 256),
    ]
    assert [row["prompt"] for row in rows] == [
        "a red circle",
        "a red circle",
        "a blue star",
        "a heart",
        "a ring",
    ]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows:
        assert images.load(tmp_path / row["file"]).size == (row["width"], row["height"])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(text="a --ar wide", index=3), "prompt 3: .*--ar"),
        (
            Prompt(text="a --hw 100:64", index=0, key="k"),
            "prompt 'k': .*100 x 64; the nearest size is 96 x 64",
        ),
    ],
)
def test_impossible_sizes_are_found_before_drawing(pipeline, tmp_path, prompt, message):
    counting = Counting(pipeline)
    with pytest.raises(ValueError, match=message):
        generate(counting, [Prompt(text="a", index=9), prompt], tmp_path, SETTINGS)
    assert counting.drawn == 0


# Settings and extras


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "ddim"}, "unknown sampler 'ddim'"),
        ({"null_mask": "mine"}, "unknown null_mask 'mine'; choose from prompt, own"),
        ({"num_inference_steps": 0}, "at least 1, got 0"),
        ({"image_format": "webp"}, "unknown image format 'webp'"),
        ({"jpeg_quality": 0}, "from 1 to 100, got 0"),
        ({"jpeg_subsampling": "4:2:2"}, "4:4:4 or 4:2:0, got '4:2:2'"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


@pytest.mark.parametrize("counts", [{"batch_size": 0}, {"num_images_per_prompt": 0}])
def test_wrong_counts(pipeline, tmp_path, counts):
    with pytest.raises(ValueError, match="must be at least 1, got"):
        generate(pipeline, PROMPTS, tmp_path, SETTINGS, **counts)


def test_jpeg(reference, pipeline, tmp_path):
    (row,) = generate(pipeline, PROMPTS[:1], tmp_path, replace(SETTINGS, image_format="jpg"))
    assert row["file"] == "00000_a-red-circle.jpg"
    lossy, exact = (
        np.asarray(images.load(path)).astype(int)
        for path in (tmp_path / row["file"], reference[0] / f"{FILES[0]}.png")
    )
    assert 0 < np.abs(lossy - exact).mean() < 10


def test_jpeg_with_colours_at_half_resolution(pipeline, tmp_path):
    for sampling, factor in (("4:4:4", 1), ("4:2:0", 2)):
        settings = replace(SETTINGS, image_format="jpg", jpeg_subsampling=sampling)
        (row,) = generate(pipeline, PROMPTS[:1], tmp_path / str(factor), settings)
        with Image.open(tmp_path / str(factor) / row["file"]) as picture:
            assert picture.layer[0][1:3] == (factor, factor)
        # What was drawn before there was a choice is gone on with.
        assert row["settings"].get("jpeg_subsampling") == (None if factor == 1 else "4:2:0")


def test_files_named_by_the_caller(reference, pipeline, tmp_path):
    rows = generate(
        pipeline,
        PROMPTS[:2],
        tmp_path,
        SETTINGS,
        num_images_per_prompt=2,
        stem=lambda prompt, sample: f"{prompt.index}/in/{sample}",
    )
    assert [row["file"] for row in rows] == ["0/in/0.png", "0/in/1.png", "1/in/0.png", "1/in/1.png"]
    assert all((tmp_path / row["file"]).is_file() for row in rows)
    with pytest.raises(ValueError, match="two prompts would be written to same.png"):
        generate(pipeline, PROMPTS[:2], tmp_path / "b", SETTINGS, stem=lambda prompt, sample: "same")


def test_archive_grid_and_name(reference, pipeline, tmp_path, capsys):
    folder, grid = tmp_path / "run", tmp_path / "sheets" / "grid.png"
    extras = {"batch_size": 2, "tar_and_del": True, "save_name": True}
    counting = Counting(pipeline)
    paths = generate_folder(counting, PROMPTS[:3], folder, SETTINGS, grid=grid, **extras)
    assert paths == [tmp_path / "run.tar", grid]
    assert images.load(grid).size == (192, 64)
    assert (tmp_path / "metrics" / "tmp_run.txt").read_text() == "run\n"
    assert not folder.exists()
    generate_folder(counting, PROMPTS, folder, SETTINGS, **extras)
    assert counting.drawn == 3 + 3  # the batch of the third prompt has changed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics", "run.tar", "sheets"]
    generation.unpack(folder)
    assert contents(folder).keys() == contents(reference[0]).keys()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "3/3" in captured.err
    with pytest.raises(ValueError, match=r"name it \.png, not .*grid\.jpg"):
        generate_folder(counting, PROMPTS, folder, SETTINGS, grid=tmp_path / "grid.jpg")
