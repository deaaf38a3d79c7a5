"""The benchmark from prompts to report: with a flawless model, with a random one, and on folders that do not
fit."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from sana.evaluation import shapes_benchmark
from sana.generation import Settings
from sana.metrics.geneval import TAGS, GenEvalPrompt, load_prompts, sample_stem, table
from sana.metrics.geneval_folder import read_pixels
from sana.resolution import TABLES
from sana.shapes.benchmark import PROMPTS_FILE, benchmark_prompts
from sana.shapes.render import render
from sana.utils.images import save_png
from scripts.evaluate_shapes import load_averaged
from tests import factories

ROOT = Path(__file__).resolve().parents[2]


class FlawlessPipeline:
    """Stands for a `SanaPipeline` that draws exactly what is asked, and counts its images."""

    def __init__(self):
        self.config = SimpleNamespace(
            model=SimpleNamespace(model="flawless", image_size=256),
            scheduler=SimpleNamespace(vis_sampler="flow_dpm-solver"),
            vae=SimpleNamespace(vae_pretrained="none"),
        )
        self.autoencoder = SimpleNamespace(dtype=torch.float32)
        self.buckets = TABLES["ASPECT_RATIO_256"]
        self.weights, self.weights_sha256, self.loras = None, "0" * 64, ()
        self.quantize, self.offload, self.device = {}, "none", torch.device("cpu")
        self.text_encoder = SimpleNamespace(lowercase=False)
        self.dtype, self.flow_shift = torch.float32, 1.0
        self.scenes = {prompt.record["prompt"]: prompt.scene for prompt in benchmark_prompts()}
        self.drawn = []

    def sizes(self, height, width, binning):
        return (height, width), (height, width)

    def __call__(self, prompt, height, width, *, seed, **settings):
        self.drawn += prompt
        scenes = (self.scenes[text](random.Random(s)) for text, s in zip(prompt, seed, strict=True))
        return [Image.fromarray(render(scene, height)) for scene in scenes]

    def decode(self, pictures, size, output_type):
        return pictures


@pytest.fixture(scope="module")
def prompts():
    return shapes_benchmark.subset(load_prompts(ROOT / PROMPTS_FILE), 2)


@pytest.fixture(scope="module")
def drawn(prompts, tmp_path_factory):
    """(folder, pipeline) after drawing two prompts of each tag."""
    folder, pipeline = tmp_path_factory.mktemp("images"), FlawlessPipeline()
    shapes_benchmark.draw(pipeline, prompts, folder, Settings(guidance_scale=3.0), batch_size=7)
    return folder, pipeline


def test_subset_takes_each_tag_evenly_and_keeps_indices():
    everything = load_prompts(ROOT / PROMPTS_FILE)
    assert list(shapes_benchmark.subset(everything, None).values()) == everything
    assert shapes_benchmark.subset(everything, 10**6) == shapes_benchmark.subset(everything, None)
    chosen = shapes_benchmark.subset(everything, 8)
    assert Counter(prompt.tag for prompt in chosen.values()) == dict.fromkeys(TAGS, 8)
    assert all(everything[index] == prompt for index, prompt in chosen.items())
    colours = {p.include[0].class_name for p in chosen.values() if p.tag == "colors"}
    assert len(colours) == 8, "spread over the list, not its first eight"
    with pytest.raises(ValueError, match="0"):
        shapes_benchmark.subset(everything, 0)


def test_flawless_model_scores_one(drawn, prompts):
    folder, pipeline = drawn
    assert Counter(pipeline.drawn) == Counter({prompt.prompt: 4 for prompt in prompts.values()})
    records = shapes_benchmark.score(shapes_benchmark.find_images(folder, prompts))
    report = shapes_benchmark.report(records, folder, extra={"ema": False})
    assert report.values["overall"] == 1
    assert report.values["tags"] == dict.fromkeys(TAGS, 1.0)
    assert report.n == len(records) == 48
    assert (report.settings["prompts"], report.settings["images_per_prompt"]) == (12, 4)
    assert report.settings["generation"]["guidance_scale"] == 3.0
    assert report.settings["generation"]["num_inference_steps"] == 20
    assert report.settings["ema"] is False
    assert (report.weights, report.dtype) == ({"transformer": "0" * 64}, "float32")
    lines = table(records).splitlines()
    assert [line.split() for line in lines[1:7]] == [[tag, "1.000", "8"] for tag in TAGS]
    assert lines[7].split() == ["overall", "1.000", "48"]


def test_a_second_run_draws_nothing(drawn, prompts):
    folder, pipeline = drawn
    before = len(pipeline.drawn)
    shapes_benchmark.draw(pipeline, prompts, folder, Settings(guidance_scale=3.0), batch_size=7)
    assert len(pipeline.drawn) == before


def test_one_wrong_image_lowers_its_tag(drawn, prompts, tmp_path):
    folder, _ = drawn
    samples = shapes_benchmark.find_images(folder, prompts)
    blank = tmp_path / "blank.png"
    Image.new("RGB", (256, 256), "gray").save(blank)
    place = next(i for i, (_, prompt) in enumerate(samples) if prompt.tag == "counting")
    samples[place] = (blank, samples[place][1])
    records = shapes_benchmark.score(samples)
    values = shapes_benchmark.report(records, folder).values
    assert values["tags"] == dict.fromkeys(TAGS, 1.0) | {"counting": 7 / 8}
    assert values["overall"] == pytest.approx(1 - 1 / 48)
    assert values["correct_prompts"] == 1
    assert [r["filename"] for r in records if not r["correct"]] == [str(blank)]


def test_geneval_folders_are_scored_too(drawn, prompts, tmp_path):
    folder, _ = drawn
    seen = Counter()
    for path, prompt in shapes_benchmark.find_images(folder, prompts):
        index = list(prompts.values()).index(prompt)
        with Image.open(path) as image:
            save_png(image, tmp_path / f"{sample_stem(index, seen[prompt])}.png")
        seen[prompt] += 1
        (tmp_path / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(prompt.to_record()) + "\n")
    records = shapes_benchmark.score(shapes_benchmark.find_images(tmp_path, prompts))
    report = shapes_benchmark.report(records, tmp_path)
    assert (report.n, report.values["overall"]) == (48, 1)
    assert (report.weights, report.dtype, report.settings["generation"]) == ({}, None, {})


def test_rotation_in_the_file_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = read_pixels(tmp_path / "turned.png")
    assert pixels.shape == (4, 2, 3)
    assert pixels[0, 1].tolist() == [255, 0, 0]


def test_folders_that_do_not_fit_are_refused(drawn, prompts, tmp_path):
    folder, _ = drawn
    more = shapes_benchmark.subset(load_prompts(ROOT / PROMPTS_FILE), 3)
    with pytest.raises(ValueError, match=r"no image of \d+ of 18 prompts"):
        shapes_benchmark.find_images(folder, more)
    index = min(prompts)
    other = prompts | {
        index: GenEvalPrompt.from_record(prompts[index].to_record() | {"prompt": "something else"})
    }
    with pytest.raises(ValueError, match="something else"):
        shapes_benchmark.find_images(folder, other)
    with pytest.raises(ValueError, match="no numbered prompt folder"):
        shapes_benchmark.find_images(tmp_path, prompts)

    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="from 3 to 4 images a prompt"):
        shapes_benchmark.find_images(tmp_path, prompts)
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        shapes_benchmark.score([(tmp_path / "gone.png", prompts[index])])


def test_averaged_weights_are_those_of_the_checkpoint(tmp_path):
    trained, averaged = (factories.make_transformer(seed=seed).state_dict() for seed in (0, 1))
    pipeline = SimpleNamespace(
        weights=tmp_path / "epoch_1_step_2.pth", transformer=factories.make_transformer(seed=0)
    )
    torch.save({"state_dict": trained, "state_dict_ema": averaged}, pipeline.weights)
    load_averaged(pipeline)
    assert all(
        torch.equal(value, averaged[name]) for name, value in pipeline.transformer.state_dict().items()
    )
    torch.save({"state_dict": trained}, pipeline.weights)
    with pytest.raises(ValueError, match="state_dict_ema"):
        load_averaged(pipeline)


def run(*arguments):
    command = [sys.executable, "scripts/evaluate_shapes.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_program_draws_scores_and_reports(tmp_path):
    """With random weights: a table with zeros, a report, a line for every image; then the same folder by
    --images."""
    config = factories.write_model(tmp_path / "model")
    report, records = tmp_path / "report.json", tmp_path / "records.jsonl"
    flags = ("--limit", 1, "--steps", 2, "--cfg_scale", 1, "--bs", 24, "--work_dir", tmp_path / "out")
    done = run("--config", config, *flags, "--output", report, "--records", records)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "overall" in done.stderr
    read = json.loads(report.read_text(encoding="utf-8"))
    assert (read["n"], read["values"]["overall"]) == (24, 0)
    assert set(read["weights"]) == {"transformer", "autoencoder", "text_encoder"}
    assert all(len(digest) == 64 for digest in read["weights"].values())
    assert read["settings"]["generation"]["guidance_scale"] == 1
    assert len(records.read_text(encoding="utf-8").splitlines()) == 24

    (folder,) = (tmp_path / "out").iterdir()
    again = run("--images", folder, "--limit", 1)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["values"] == read["values"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ema",), "error: --ema needs --model_path"),
        (("--prompts", "nowhere.jsonl"), "error: no such file or folder: 'nowhere.jsonl'"),
        (("--images", "nowhere"), "error: nowhere holds no numbered prompt folder"),
        (("--images", "asset", "--config", "my.yaml"), "error: --images scores a folder as it is"),
    ],
)
def test_program_explains_mistakes_in_a_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
