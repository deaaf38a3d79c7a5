"""Suites from drawing to results: on the small model, with small networks in place of the published ones."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sana.evaluation import published, suites
from sana.evaluation.suites import Sources, evaluate
from sana.generation import Settings
from sana.metrics import features, image_reward
from sana.metrics.alignment import Scorer
from sana.metrics.features import FeatureNetwork
from sana.pipeline import SanaPipeline
from sana.utils.manifest import Manifest
from scripts import evaluate as script
from tests.factories import write_model
from tests.labellers import write_captioner, write_clip
from tests.metrics.test_dpg import write_questions

PROMPTS = {"a1b2": "a red circle", "c3d4": "two stars", "e5f6": "a heart"}
FAST = Settings(num_inference_steps=2, guidance_scale=1.0, height=64, width=64)


class Brightness(Scorer):
    """Stands for the reward network, whose full size would take a minute."""

    metric, protocol, sha256, dtype = "ImageReward", "brightness", "1" * 64, torch.float32

    def prepare(self, picture):
        return torch.from_numpy(np.asarray(picture.resize((8, 8))).copy()).permute(2, 0, 1).float()

    def score_pixels(self, pixels, prompts):
        return pixels.mean((1, 2, 3))

    def is_cut(self, prompt):
        return False


def small_features(**settings):
    """Stands for the Inception: 12 numbers of a picture."""
    prepare = Brightness().prepare
    return FeatureNetwork(
        "FID", "tiny", prepare, lambda x: x.reshape(len(x), 3, -1)[..., :4].flatten(1), "2" * 64
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(model):
    return SanaPipeline(model, device="cpu")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Prompt files, reference pictures and networks of all suites, small."""
    root = tmp_path_factory.mktemp("sources")
    meta = {
        key: {"prompt": text, "category": "art" if key < "d" else "food"} for key, text in PROMPTS.items()
    }
    (root / "mjhq/imgs/art").mkdir(parents=True)
    (root / "mjhq/meta_data.json").write_text(json.dumps(meta))
    for place, key in enumerate(PROMPTS):
        Image.radial_gradient("L").rotate(30 * place).convert("RGB").save(root / f"mjhq/imgs/art/{key}.jpg")
    (root / "rewards.json").write_text(json.dumps([{"id": "x-1", "prompt": "a cat"}]))
    (root / "judge").mkdir()
    (root / "clip").mkdir()
    return Sources(
        mjhq=str(root / "mjhq"),
        geneval_prompts=str(Path(suites.hub.ROOT / suites.PROMPTS_FILE)),
        dpg_csv=str(write_questions(root / "dpg.csv")),
        image_reward_prompts=str(root / "rewards.json"),
        detector="shapes",
        clip=str(write_clip(root / "clip")),
        judge=str(write_captioner(root / "judge")),
        limit=1,
    )


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setattr(features, "feature_network", small_features)
    monkeypatch.setattr(image_reward.ImageReward, "from_file", lambda *_, **__: Brightness())


def test_every_suite(pipeline, sources, tmp_path):
    every = dataclasses.replace(sources, limit=None, dpg_grids=True)
    published_files = dataclasses.replace(FAST, image_format="jpg", jpeg_quality=75, jpeg_subsampling="4:2:0")
    said = []
    outcome = evaluate(
        pipeline, ["mjhq", "dpg", "image_reward"], every, published_files, tmp_path,
        batch_size=4, weights={"autoencoder": "3" * 64}, publish=said.append,
    )  # fmt: skip
    assert not outcome.failures and said == outcome.reports
    by_name = {report.metric: report for report in outcome.reports}
    assert list(by_name) == ["FID", "CLIP score", "DPG-Bench (judge)", "ImageReward"]
    assert [report.n for report in outcome.reports] == [3, 3, 8, 10]
    assert list(by_name["CLIP score"].values["categories"]) == ["art", "food"]
    for report in outcome.reports:
        made = report.settings["generation"]
        assert (made["weights_sha256"], made["dtype"]) == (pipeline.weights_sha256, "float32")
        assert (made["sampler"], made["num_inference_steps"]) == ("flow_dpm-solver", 2)
        assert (made["guidance_scale"], made["seed"]) == (1.0, 0)
        assert (made["jpeg_quality"], made["jpeg_subsampling"]) == (75, "4:2:0")
        assert report.weights["autoencoder"] == "3" * 64 and len(report.weights) == 2
    folders = {
        path.name.split("_")[0]: path
        for path in tmp_path.iterdir()
        if path.is_dir() and path.suffix not in (".work", ".grids")
    }
    assert {path.name for path in folders["MJHQ-30K"].glob("*.jpg")} == {f"{key}.jpg" for key in PROMPTS}
    with Image.open(folders["MJHQ-30K"] / "a1b2.jpg") as picture:
        assert picture.layer[0][1:3] == (2, 2), "colours at half resolution"
    assert len(list(folders["DPG"].glob("cat*.jpg"))) == len(list(folders["DPG"].glob("dog*.jpg"))) == 4
    grids = folders["DPG"].with_name(f"{folders['DPG'].name}.grids")
    assert {path.name for path in grids.iterdir()} == {"cat.png", "dog.png"}
    with Image.open(grids / "dog.png") as grid, Image.open(folders["DPG"] / "dog-s1.jpg") as second:
        assert grid.size == (128, 128)
        assert grid.crop((64, 0, 128, 64)).tobytes() == second.convert("RGB").tobytes(), "row by row"


def test_geneval_has_the_published_layout(pipeline, sources, tmp_path):
    outcome = evaluate(
        pipeline, ["geneval"], sources, dataclasses.replace(FAST, image_format="jpg"), tmp_path
    )
    assert not outcome.failures
    assert [report.metric for report in outcome.reports] == ["GenEval (shapes)"]
    assert outcome.reports[0].n == 24
    folder = next(path for path in tmp_path.iterdir() if path.is_dir() and path.suffix != ".work")
    first = sorted(path for path in folder.iterdir() if path.is_dir())[0]
    names = sorted(path.relative_to(first).as_posix() for path in first.rglob("*") if path.is_file())
    assert names == ["metadata.jsonl", *(f"samples/{sample:05d}.png" for sample in range(4))]
    assert json.loads((first / "metadata.jsonl").read_text())["tag"] == "single_object"
    assert len((tmp_path / f"{folder.name}.geneval.jsonl").read_text().splitlines()) == 24


def test_a_reference_is_computed_once(pipeline, sources, tmp_path, monkeypatch):
    every = dataclasses.replace(sources, limit=None)
    first = evaluate(pipeline, ["mjhq"], every, FAST, tmp_path).reports[0]
    pictures = [path.name for path in Path(sources.mjhq).rglob("*.jpg")]
    looked = []
    prepare = Brightness.prepare
    monkeypatch.setattr(
        Brightness, "prepare", lambda self, picture: looked.append(picture.size) or prepare(self, picture)
    )
    other = dataclasses.replace(FAST, seed=1)
    second = evaluate(pipeline, ["mjhq"], every, other, tmp_path).reports[0]
    assert looked == [(64, 64)] * 3 and len(pictures) == 3, "what was drawn, and no reference picture"
    assert second.values != first.values

    statistics = tmp_path / "reference.npz"
    items = suites.read_image_set(
        Path(sources.mjhq) / "imgs", suites.read_prompts(f"{sources.mjhq}/meta_data.json")
    )
    suites.fid.set_statistics(items, small_features(), tmp_path / "own").save(statistics)
    by_file = dataclasses.replace(every, reference=str(statistics))
    assert evaluate(pipeline, ["mjhq"], by_file, FAST, tmp_path).reports[0].values == pytest.approx(
        first.values
    )


def test_a_second_run_draws_and_scores_nothing(pipeline, sources, tmp_path, monkeypatch):
    first = evaluate(pipeline, ["mjhq"], sources, FAST, tmp_path)
    assert list(first.failures) == ["mjhq (fid)"], "one picture has no covariance"
    assert "at least two pictures" in first.failures["mjhq (fid)"]
    monkeypatch.setattr(SanaPipeline, "__call__", None)
    monkeypatch.setattr("sana.metrics.clip_score.ClipScorer.score_pixels", None)
    second = evaluate(pipeline, ["mjhq"], sources, FAST, tmp_path)
    assert second.reports[0].values == first.reports[0].values


def test_a_limit_uses_a_part_of_what_was_drawn(pipeline, sources, tmp_path):
    evaluate(pipeline, ["mjhq"], dataclasses.replace(sources, limit=None), FAST, tmp_path)
    outcome = evaluate(pipeline, ["mjhq"], dataclasses.replace(sources, limit=2), FAST, tmp_path)
    assert not outcome.failures and [report.n for report in outcome.reports] == [2, 2]
    assert "2 reference pictures" in outcome.reports[0].protocol, "the matching part"


def test_what_fails_costs_nothing_else(pipeline, sources, tmp_path, caplog):
    broken = dataclasses.replace(
        sources, mjhq=str(tmp_path / "none"), judge=str(tmp_path / "none"), geneval_prompts="none.jsonl"
    )
    outcome = evaluate(pipeline, ["mjhq", "geneval", "dpg", "image_reward"], broken, FAST, tmp_path)
    assert [report.metric for report in outcome.reports] == ["ImageReward"]
    assert list(outcome.failures) == ["mjhq", "geneval", "dpg (dpg)"]
    assert "to fetch it: hf download playgroundai/MJHQ-30K" in outcome.failures["mjhq"]
    assert "to fetch it: curl" in outcome.failures["geneval"]
    assert len(Manifest(next(tmp_path.glob("DPG*"))).rows()) == 4, "what was drawn is kept"
    with pytest.raises(ValueError, match="unknown suite 'fid'; choose from mjhq, geneval"):
        evaluate(pipeline, ["fid"], sources, FAST, tmp_path)


def test_in_a_group_a_failure_ends_all(pipeline, sources, tmp_path, monkeypatch):
    """The others would wait for this process."""
    monkeypatch.setattr(suites.distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="to fetch it"):
        evaluate(pipeline, ["mjhq"], dataclasses.replace(sources, mjhq="none"), FAST, tmp_path)


def test_a_picture_that_is_spoiled(pipeline, sources, tmp_path):
    every = dataclasses.replace(sources, limit=None)
    evaluate(pipeline, ["image_reward"], every, FAST, tmp_path)
    folder = next(path for path in tmp_path.glob("ImageReward*") if (path / "manifest.jsonl").exists())
    spoiled = folder / "x-1-s3.png"
    spoiled.write_bytes(spoiled.read_bytes()[:200])
    shutil.rmtree(next(tmp_path.glob("*.work")))
    outcome = evaluate(pipeline, ["image_reward"], every, FAST, tmp_path)
    assert "x-1-s3.png: cannot be read as a picture" in outcome.failures["image_reward (image_reward)"]
    spoiled.unlink()
    assert not evaluate(pipeline, ["image_reward"], every, FAST, tmp_path).failures, "drawn again"


# The command


def run(arguments, capsys):
    parser, status = script.make_parser(), 0
    try:
        parser.run(script.run, *parser.parse_known_args([str(word) for word in arguments]))
    except SystemExit as left:
        status = left.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command(model, sources, tmp_path, capsys):
    flags = [
        f"--{name}={getattr(sources, name)}" for name in script.SOURCES if getattr(sources, name) is not None
    ]
    drawing = ["--step=2", "--cfg_scale=1", "--bs=4", "--device=cpu", "--model.image_size=256"]
    arguments = [
        model,
        model.parent / "transformer.safetensors",
        "--suite=mjhq,image_reward",
        *flags,
        *drawing,
    ]
    status, out, err = run([*arguments, f"--work_dir={tmp_path}", "--limit=1", "--compare"], capsys)
    assert status == 2 and "failed: mjhq (fid) (reasons above); what is done is kept" in err
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["metric"] for line in lines] == ["CLIP score", "ImageReward"]
    assert out.splitlines()[:2] == lines
    assert {"transformer", "autoencoder", "text_encoder"} <= json.loads(lines[0])["weights"].keys()
    row = next(line for line in out.splitlines() if line.startswith("SanaMS_Tiny_P1_D8"))
    clip = json.loads(lines[0])["values"]["CLIP score"]
    assert row.split()[1:] == ["-", "-", "-", "-", "-", f"{clip:.2f}", "-", "-"]
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    scalars = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    assert scalars["metrics/CLIP score/CLIP score"] == pytest.approx(clip, rel=1e-5)
    assert "metrics/CLIP score/categories/art" in scalars


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to measure"),
        (["a.pth", "b.yaml", "--compare"], "expected CONFIG.yaml and CHECKPOINT"),
        (["--suite=fid", "--device=cpu"], "unknown suite 'fid'"),
    ],
)
def test_command_says_what_is_wrong(arguments, message, capsys, tmp_path):
    status, out, err = run([*arguments, f"--work_dir={tmp_path}"], capsys)
    assert (status, out) == (2, "") and message in err.strip().splitlines()[-1]


# The paper's table


def report(metric, values, weights="a"):
    generation = {"weights_sha256": weights}
    return {
        "metric": metric,
        "values": values,
        "n": 7,
        "protocol": "p",
        "settings": {"generation": generation},
    }


def test_comparison(tmp_path):
    ours = [
        report("FID", {"FID": 9.0}),
        report("FID", {"FID": 5.8049}),
        report("GenEval", {"overall": 0.666}),
        report("GenEval (shapes)", {"overall": 1.0}),
        report("DPG-Bench (blip)", {"overall": 81.25}),
        report("CLIP score", {"CLIP score": 20.0}, weights="b"),
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in ours))
    assert published.read_results(path) == ours and published.read_results(tmp_path / "none") == []
    lines = published.comparison(published.read_results(path, "a"), 1024, "mine").splitlines()
    assert lines[0].split() == [
        "images/s",
        "latency",
        "s",
        "params",
        "B",
        "speed-up",
        "FID",
        "CLIP",
        "GenEval",
        "DPG",
    ]
    table = {line[:15].strip(): line[15:].split() for line in lines[1:]}
    assert table["Sana-1.6B"] == ["1.00", "1.2", "1.6", "23.3x", "5.76", "28.67", "0.66", "84.8"]
    assert table["DALLE3"] == ["-", "-", "-", "-", "-", "-", "0.67", "83.5"]
    assert table["mine"] == ["-", "-", "-", "-", "5.80", "-", "0.67", "81.2"]
    assert "  DPG: DPG-Bench (blip), n=7; p" in lines
    small = published.comparison([], 512)
    assert "PixArt-alpha" in small and "FLUX-dev" not in small
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1 is no report"):
        published.read_results(path)
