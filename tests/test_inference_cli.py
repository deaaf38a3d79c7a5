import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from sana.utils import images
from sana.utils.hub import ROOT
from tests.factories import write_model

SCRIPT = ROOT / "scripts/inference.py"
FAST = ("--step=2", "--height=64", "--width=64")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("inference_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(script, config, tmp_path, capsys, monkeypatch):
    """Run the script in this process on the small model; returns (status, paths or other stdout, stderr)."""
    monkeypatch.setattr(logging.getLogger("sana"), "handlers", [])
    monkeypatch.chdir(tmp_path)

    def call(*arguments, model=(f"--config={config}",)):
        parser = script.make_parser()
        status = 0
        try:
            parser.run(script.run, *parser.parse_known_args([*model, *arguments]))
        except SystemExit as left:
            status = left.code
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err

    return call


def rows(folder):
    return [
        json.loads(line)
        for line in (Path(folder) / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    ]


# What it makes


def test_txt(run, tmp_path):
    (tmp_path / "mine.txt").write_text(
        "a red circle\nthree/blue stars 🦊\n\na heart --ar 1:4\n", encoding="utf-8"
    )
    status, paths, err = run("--txt_file=mine.txt", "--bs=3", "--step=2", "--grid=out/sheet.png")
    assert status == 0, err
    assert [Path(path).name for path in paths] == [
        "00000_a-red-circle.png",
        "00001_three-blue-stars.png",
        "00002_image.png",
        "00003_a-heart.png",
        "sheet.png",
    ]
    folder = Path(paths[0]).parent
    assert folder.parent == Path("output/inference")
    assert folder.name.startswith(
        "mine_epochunknown_stepunknown_scale4.5_step2_size256_sampflow_dpm-solver_seed0_float32"
    )
    assert [images.load(path).size for path in paths[2:]] == [(256, 256), (512, 128), (1024, 512)]
    assert [row["prompt"] for row in rows(folder)] == ["a red circle", "three/blue stars 🦊", "", "a heart"]
    assert "4/4" in err
    before = Path(paths[0]).stat().st_mtime_ns
    status, again, err = run("--txt_file=mine.txt", "--bs=3", "--step=2")
    assert (status, again) == (0, paths[:4])
    assert Path(paths[0]).stat().st_mtime_ns == before


def test_json(run, tmp_path):
    entries = {"a-1": {"prompt": "a red circle"}, "b/2": {"prompt": "a blue\nstar"}}
    (tmp_path / "ids.json").write_text(json.dumps(entries), encoding="utf-8")
    status, paths, err = run("--json_file=ids.json", "--work_dir=w", "--add_label=-x", *FAST)
    assert status == 0, err
    assert [Path(path).name for path in paths] == ["a-1.png", "00001_a-blue-star.png"]
    folder = Path(paths[0]).parent
    assert folder.name.startswith("ids_")
    assert folder.name.endswith("-x")
    assert folder.parent == Path("w")
    assert [(row["key"], row["prompt"]) for row in rows(folder)] == [
        ("a-1", "a red circle"),
        ("b/2", "a blue\nstar"),
    ]


def test_flags_reach_the_image(run):
    flags = (
        "--prompt=a red circle",
        "--cfg_scale=3",
        "--seed=4",
        "--negative_prompt=blue",
        "--interval_guidance=[0.1,0.9]",
    )
    more = (
        "--sampling_algo=flow_euler",
        "--image_format=jpg",
        "--jpeg_quality=80",
        "--num_images_per_prompt=2",
    )
    status, paths, err = run(
        *FAST, *flags, *more, "--dtype=bf16", "--scheduler.flow_shift", "5", "--gpu_id=1"
    )
    assert status == 0, err
    assert [Path(path).name for path in paths] == ["00000_a-red-circle.jpg", "00000_a-red-circle-s1.jpg"]
    settings = rows(Path(paths[0]).parent)[0]["settings"]
    expected = {
        "seed": 4,
        "height": 64,
        "width": 64,
        "negative_prompt": "blue",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "sampler": "flow_euler",
        "interval_guidance": [0.1, 0.9],
        "image_format": "jpg",
        "jpeg_quality": 80,
        "dtype": "bfloat16",
        "flow_shift": 5.0,
    }
    assert {name: settings[name] for name in expected} == expected
    assert err.count("accepted, but without effect: --gpu_id") == 1
    status, paths, err = run(*FAST, "--prompt=a red circle", "--pag_scale=2")
    assert rows(Path(paths[0]).parent)[0]["settings"]["pag_guidance_scale"] == 2.0


def test_parts_of_a_list_keep_their_indices(run, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i}" for i in range(5)))
    status, paths, err = run(
        *FAST, "--txt_file=p.txt", "--sample_nums=4", "--start_index=2", "--end_index=30"
    )
    assert status == 0, err
    assert [Path(path).name for path in paths] == ["00002_prompt-2.png", "00003_prompt-3.png"]
    status, paths, err = run(*FAST, "--txt_file=p.txt", "--end_index=1")
    assert [Path(path).name for path in paths] == ["00000_prompt-0.png"]


def test_model_path_with_and_without_a_config_beside_it(run, config, tmp_path):
    weights = config.parent / "transformer.safetensors"
    status, paths, err = run(*FAST, "--prompt=a", f"--model_path={weights}", model=())
    assert status == 0, err
    (tmp_path / "epoch_3_step_50.safetensors").write_bytes(weights.read_bytes())
    status, paths, err = run(*FAST, "--prompt=a", "--model_path=epoch_3_step_50.safetensors")
    assert status == 0, err
    assert Path(paths[0]).parent.name.startswith("prompt_epoch3_step50_")
    status, _, err = run("--prompt=a", "--model_path=epoch_3_step_50.safetensors", model=())
    assert status == 2
    assert "there is no config.yaml beside epoch_3_step_50.safetensors" in err


def test_custom_image_size(run):
    status, paths, err = run("--prompt=a", "--step=2", "--custom_image_size=512")
    assert status == 0, err
    assert images.load(paths[0]).size == (512, 512)
    assert "enlarged" not in err


def test_archive(run):
    status, paths, err = run(*FAST, "--prompt=a", "--tar_and_del", "--if_save_dirname=true", "--work_dir=w")
    assert status == 0, err
    name = Path(paths[0]).name.removesuffix(".tar")
    with tarfile.open(paths[0]) as archive:
        assert archive.getnames() == [name, f"{name}/00000_a.png", f"{name}/manifest.jsonl"]
    assert (Path("w/metrics") / f"tmp_{name}.txt").read_text() == f"{name}\n"


def test_ablation(run):
    status, paths, err = run(*FAST, "--prompt=a", "--ablation_key=cfg_scale", "--ablation_selections=[1.0,6]")
    assert status == 0, err
    assert [rows(Path(path).parent)[0]["settings"]["guidance_scale"] for path in paths] == [1.0, 6.0]


def test_the_embedded_model_is_the_default(run):
    """A fresh clone draws without a flag and without a network."""
    status, paths, err = run("--prompt=a red circle", "--step=2", model=())
    assert status == 0, err
    assert images.load(paths[0]).size == (256, 256)
    assert rows(Path(paths[0]).parent)[0]["settings"]["model"] == "SanaMS_Tiny_P1_D8"


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--txt_file=none.txt"], "no such file or folder: 'none.txt'"),
        (["--txt_file=empty.txt"], "empty.txt holds no prompt"),
        (["--txt_file=fine.txt", "--start_index=7"], "fine.txt has 1 prompts, none in [7, 30000)"),
        (["--json_file=broken.json"], "broken.json, line 2, column 1: not valid JSON"),
        (["--json_file=list.json"], "list.json is not of the form"),
        (["--txt_file=fine.txt", "--prompt=a"], "not allowed with argument"),
        (["--sampling_algo=ddim"], "unknown sampler 'ddim'; choose from flow_dpm-solver, flow_euler"),
        (["--step=-2"], "--step: expected an integer of at least 1, got '-2'"),
        (["--step=0"], "got '0'"),
        (["--bs=0"], "--bs: expected an integer of at least 1, got '0'"),
        (["--seed=x"], "--seed: invalid int value: 'x'"),
        (["--cfg_scale=-1"], "guidance scale must be"),
        (["--interval_guidance=[0.9,0.1]"], "guidance interval must"),
        (["--interval_guidance=[a]"], "expected numbers such as [0.2,0.8]"),
        (["--height=64", "--width=4096"], "the nearest size is 128 x 512"),
        (["--prompt=a --ar 0:1"], "prompt 0: "),
        (["--custom_image_size=100"], "image_size"),
        (["--image_format=webp"], "unknown image format 'webp'"),
        (["--grid=sheet.jpg"], "name it .png, not sheet.jpg"),
        (["--dtype=int8"], "unknown dtype 'int8'"),
        (["--device=abacus"], "no device 'abacus'"),
        (["--no_such_flag=1"], "no_such_flag"),
        (["--model.no_such_key=1"], "no_such_key"),
        (["--config=none.yaml"], "none.yaml"),
        (["--model_path=none.pth"], "none.pth"),
        (
            ["--ablation_key=cfg_scale"],
            "give --ablation_key (cfg_scale, pag_scale, step, seed) with --ablation_selections",
        ),
        (["--ablation_key=step", "--ablation_selections=[x]"], "expected an integer of at least 1, got 'x'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(run, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "fine.txt").write_text("a red circle")
    (tmp_path / "broken.json").write_text('{"a": {"prompt": "x"}\n"b"}')
    (tmp_path / "list.json").write_text("[1]")
    source = (
        [] if any(word.startswith(("--txt", "--json", "--prompt")) for word in arguments) else ["--prompt=a"]
    )
    status, out, err = run(*source, *arguments)
    assert status == 2
    assert out == []
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "output").exists()


# Processes


def processes(*command, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(config, tmp_path):
    (tmp_path / "p.txt").write_text(
        "a red circle\nthree blue stars\na heart --ar 1:4\na ring\n\ntwo crosses\na star\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = [str(SCRIPT), f"--config={config}", "--txt_file=p.txt", "--bs=2", "--step=2", "--device=cpu"]
    one = processes(sys.executable, *common, "--work_dir=one", folder=tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    two = processes(*launcher, *common, "--work_dir=two", folder=tmp_path)
    paths = one.stdout.splitlines()
    assert len(paths) == 7
    assert two.stdout.splitlines() == [path.replace("one/", "two/", 1) for path in paths]
    folders = [(tmp_path / path).parent for path in (paths[0], two.stdout.splitlines()[0])]
    files = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert files[0] == files[1]
    for name in files[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
