"""tools/metrics/fid.py, clip_score.py, image_reward.py: reports, and what each says of bad input."""

import dataclasses
import json
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sana.loading  # noqa: F401 with it diffusers, whose first import may complain of optional packages on stderr
from sana.metrics import features, image_reward, inception
from sana.metrics.clip_score import ClipScorer
from sana.metrics.fid import Statistics, frechet_distance
from sana.metrics.image_reward import ImageReward
from tests.labellers import write_clip
from tests.scorers import (
    TINY_REWARD,
    prompts_path,
    published_reward_state,
    truncate,
    write_inception,
    write_pictures,
)

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("fid", "clip_score", "image_reward")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Flags of each tool that name its weights, and make it quick."""
    folder = tmp_path_factory.mktemp("weights")
    clip = write_clip(folder / "clip")
    torch.save(published_reward_state(), folder / "ImageReward.pt")
    reference = write_pictures(folder / "reference", 4, seed=1)
    inception = write_inception(folder / "inception.pth")
    return {
        "fid": ["--weights", inception, "--dims", 64, "--reference", reference],
        "clip_score": ["--weights", clip],
        "image_reward": ["--weights", folder / "ImageReward.pt", "--tokenizer", clip],
    }


@pytest.fixture
def call(monkeypatch, capsys, weights):
    """(exit status, output, errors) of a tool with its weights, run in this process: torch loads in seconds."""
    monkeypatch.setattr(image_reward, "RewardConfig", lambda: TINY_REWARD)
    unknown = dataclasses.replace(
        inception.WEIGHTS, sha256=""
    )  # else each run says that ours are not the published ones
    monkeypatch.setattr(inception, "WEIGHTS", unknown)

    def run(tool, *arguments):
        words = [tool, "--device", "cpu", *weights[tool], *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        capsys.readouterr()
        status = 0
        try:
            runpy.run_path(str(ROOT / f"tools/metrics/{tool}.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
        logging.getLogger("sana").handlers.clear()  # this one writes to what stderr is now
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "set", 5)


def refused(answer, *words):
    """One line on stderr, exit status 2, nothing on stdout."""
    status, output, errors = answer
    assert (status, output) == (2, ""), errors
    assert len(errors.splitlines()) == 1, errors
    for word in words:
        assert word in errors, errors


def kept(folder):
    """Names of the pictures whose results lie in a folder of partial results."""
    files = sorted(folder.rglob("manifest*.jsonl"))
    return sorted(json.loads(line)["file"] for file in files for line in file.read_text().splitlines())


def arguments(pictures, *more):
    return [pictures, "--prompts", prompts_path(pictures), "--batch_size", 1, *more]


@pytest.mark.parametrize("tool", TOOLS)
def test_bad_folders(tool, call, pictures, tmp_path):
    """An empty folder, a prompt without a picture, a picture without a prompt, no prompts where they are needed."""
    prompts = prompts_path(pictures)
    (tmp_path / "empty").mkdir()
    refused(call(tool, tmp_path / "empty", "--prompts", prompts), "empty: no picture in it")
    refused(call(tool, tmp_path / "nowhere"), "nowhere: no such folder")
    refused(call(tool, pictures, "--prompts", tmp_path / "nowhere.json"), "cannot read the prompts")
    (pictures / "id3.png").rename(pictures / "other.png")
    refused(call(tool, *arguments(pictures)), "1 of 5 pictures without a prompt", "other.png")
    (pictures / "other.png").unlink()
    refused(call(tool, *arguments(pictures)), "1 of 5 prompts without their picture", "id3")
    if tool != "fid":
        refused(call(tool, pictures), "4 of 4 pictures have no prompt, id0.png the first")


@pytest.mark.parametrize("tool", TOOLS)
def test_truncated_picture(tool, call, pictures, tmp_path, weights):
    """What was measured before is kept, and the run goes on once the picture is there again."""
    more = ["--reference", pictures] if tool == "fid" else []  # after the weights' own: the last one counts
    whole = (pictures / "id3.png").read_bytes()
    truncate(pictures / "id3.png")
    work = tmp_path / "work"
    refused(
        call(tool, *arguments(pictures, "--work", work, *more)),
        "id3.png: cannot be read as a picture, truncated",
    )
    assert kept(work) == ["id0.png", "id1.png", "id2.png"]
    (pictures / "id3.png").write_bytes(whole)
    status, output, _ = call(tool, *arguments(pictures, "--work", work, *more))
    assert status == 0 and json.loads(output)["n"] == 5
    assert sorted(set(kept(work))) == [f"id{number}.png" for number in range(5)]


@pytest.mark.parametrize("tool", TOOLS)
def test_not_a_number(tool, call, pictures, tmp_path, monkeypatch):
    """A network that answers NaN for the fourth picture."""

    calls = []

    def break_fourth(function):
        def broken(*values):
            calls.append(1)
            answer = function(*values)
            return answer * float("nan") if len(calls) == 4 else answer

        return broken

    for scorer in (ClipScorer, ImageReward):
        monkeypatch.setattr(scorer, "score_pixels", break_fourth(scorer.score_pixels))
    build = features._in_batches
    monkeypatch.setattr(features, "_in_batches", lambda *parts: break_fourth(build(*parts)))
    work = tmp_path / "work"
    more = ["--reference", pictures] if tool == "fid" else []
    refused(call(tool, *arguments(pictures, "--work", work, *more)), "id3.png: its", "is not finite")
    assert kept(work) == ["id0.png", "id1.png", "id2.png"]
    status, output, _ = call(tool, *arguments(pictures, "--work", work, *more))
    assert status == 0 and json.loads(output)["n"] == 5


def test_fid(call, pictures, tmp_path, weights):
    report, reference = tmp_path / "report.json", tmp_path / "reference.npz"
    status, output, errors = call(
        "fid",
        *arguments(
            pictures, "--output", report, "--save_stats", tmp_path / "own.npz", "--reference", pictures
        ),
    )
    assert status == 0 and json.loads(output) == json.loads(report.read_text())
    assert json.loads(output)["values"]["FID"] < 1e-9, "a set and itself"
    assert "far too large" in errors and f"written: {report}" in errors
    status, output, errors = call("fid", pictures, "--save_reference", reference)
    answer = json.loads(output)
    assert (tmp_path / "set.fid-64.json").exists() and (tmp_path / "set.fid-64.work").is_dir()
    expected = frechet_distance(Statistics.load(tmp_path / "own.npz"), Statistics.load(reference))
    assert answer["values"]["FID"] == pytest.approx(expected, rel=1e-6) and expected > 0.1
    assert answer["protocol"] == "inception pytorch-fid@512 64; 4 reference pictures"
    assert len(answer["weights"]["features"]) == 64 and answer["settings"]["formats"] == {"png": 5}
    assert f"FID  {answer['values']['FID']:.4f}" in errors
    again = json.loads(call("fid", pictures, "--reference", reference)[1])
    assert again["values"] == answer["values"]
    work = ["--work", tmp_path / "set.fid-64.work"]
    refused(call("fid", pictures, "--preset", "clean", *work), "other settings: features")
    refused(call("fid", pictures, "--reference", reference, "--preset", "clean"), "do not compare")
    assert call("fid", pictures, "--preset", "clean")[0] == 0
    assert (tmp_path / "set.fid-clean-64.work").is_dir(), "each preset has files of its own"
    refused(call("fid", pictures, "--preset", "bicubic"), "unknown preset 'bicubic'")
    refused(call("fid", pictures, "--reference", tmp_path / "no.npz"), "cannot be read as statistics")
    refused(call("fid", pictures, "--features", "clip-vit-b-32"), "belong to Inception")


def test_the_folder_one_is_in(call, pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    call("fid", ".")
    assert pictures.with_name("set.fid-64.json").is_file()


def test_fid_of_the_first_prompts(call, tmp_path):
    """Both sets are the pictures of the first ids: a subset of the reference, not all of it."""
    own, other = (write_pictures(tmp_path / name, 5, seed=seed) for name, seed in (("own", 0), ("other", 1)))
    common = ["--prompts", prompts_path(own), "--reference", other]
    first = json.loads(call("fid", own, *common, "--sample_nums", 3)[1])
    assert (first["n"], first["protocol"][-20:]) == (3, "3 reference pictures"[-20:])
    for folder in (own, other):
        for number in (3, 4):
            (folder / f"id{number}.png").unlink()
    refused(call("fid", own, "--reference", other, "--sample_nums", 2), "would not cut the reference")
    rest = json.loads(call("fid", own, "--reference", other, "--work", tmp_path / "rest")[1])
    assert rest["values"] == pytest.approx(first["values"], rel=1e-6)


@pytest.mark.parametrize("tool", TOOLS[1:])
def test_scores(tool, call, pictures):
    status, output, errors = call(tool, *arguments(pictures))
    answer = json.loads(output)
    name = {"clip_score": "CLIP score", "image_reward": "ImageReward"}[tool]
    categories = answer["values"]["categories"]
    assert status == 0 and answer["metric"] == name and answer["n"] == 5
    assert answer["values"][name] == pytest.approx((3 * categories["a"] + 2 * categories["b"]) / 5, rel=1e-9)
    assert f"{name}  {answer['values'][name]:.4f}" in errors and f"  a{' ' * (len(name) - 3)}" in errors
    assert answer["command"].startswith("python ") and answer["settings"]["prompts"] == 5
    assert (answer["dtype"], answer["settings"]["scorer_dtype"]) == (None, "float32")
    assert "/" not in answer["protocol"], "protocols compare on all machines"
    refused(
        call(tool, *arguments(pictures, "--dtype", "bf16")),
        "other settings: dtype 'float32' (now 'bfloat16')",
    )
    refused(call(tool, *arguments(pictures, "--dtype", "fp64")), "unknown dtype")


def test_models(call, pictures, weights):
    clip = weights["clip_score"][1]
    status, output, _ = call("image_reward", *arguments(pictures, "--model", "PickScore", "--weights", clip))
    answer = json.loads(output)
    assert status == 0 and answer["metric"] == "PickScore" and np.isfinite(answer["values"]["PickScore"])
    assert (pictures.parent / "set.pick_score.json").exists()
    refused(call("image_reward", pictures, "--model", "HPSv3"), "invalid choice: 'HPSv3'")
    refused(
        call("image_reward", *arguments(pictures, "--weights", pictures / "nowhere.pt")),
        "nowhere.pt",
        "to fetch it: hf download THUDM/ImageReward ImageReward.pt",
    )


@pytest.mark.slow
def test_two_processes(call, pictures, tmp_path, weights):
    """torchrun divides the work, and the number is the same to the last digit."""
    flags = [pictures, "--batch_size", 1]
    status, output, _ = call("fid", *flags, "--output", tmp_path / "one.json")
    assert status == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags += ["--device", "cpu", *weights["fid"], "--output", tmp_path / "two.json"]
    answer = subprocess.run(
        list(map(str, [*launcher, "tools/metrics/fid.py", *flags])),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["values"] == json.loads(output)["values"], (
        "one report, of the main process"
    )
    assert json.loads((tmp_path / "two.json").read_text())["n"] == 5
    assert not list((tmp_path / "two.work").rglob("*.rank*"))
    assert kept(tmp_path / "two.work") == kept(tmp_path / "one.work") != []
