import importlib.util
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from sana.config import dump_config, load_config
from sana.utils import hub, images
from sana.utils.hub import ROOT
from tests.factories import write_model
from tests.ports import free_port

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


def test_weights_alone_are_recognised(run, tmp_path):
    shutil.copy(ROOT / "asset/sana_tiny/transformer.safetensors", tmp_path / "unknown.safetensors")
    status, paths, err = run("--prompt=a", "--step=2", "--model_path=unknown.safetensors", model=())
    assert status == 0, err
    assert "unknown.safetensors has no config: its tensors are those of SanaMS_Tiny_P1_D8" in err
    status, own, err = run("--prompt=a", "--step=2", model=())
    assert Path(paths[0]).read_bytes() == Path(own[0]).read_bytes()


def test_adapters(run, tmp_path):
    module = "transformer_blocks.0.attn1.to_q"
    for name in ("one", "two"):
        factors = {"lora_A": torch.ones(1, 224), "lora_B": torch.ones(224, 1)}
        save_file({f"{module}.{key}.weight": value for key, value in factors.items()}, f"{name}.safetensors")
    flags = (
        "--lora",
        "one.safetensors",
        "two.safetensors",
        "--lora_scale=0.5",
        "--lowercase",
        "--null_mask=own",
    )
    status, paths, err = run(*FAST, "--prompt=A Red circle", *flags)
    assert status == 0, err
    settings = rows(Path(paths[0]).parent)[0]["settings"]
    assert settings["loras"] == [[hub.sha256(f"{name}.safetensors"), 0.5] for name in ("one", "two")]
    assert (settings["lowercase"], settings["null_mask"]) == (True, "own")
    status, plain, err = run(*FAST, "--prompt=A Red circle", *flags[4:])
    assert Path(plain[0]).parent != Path(paths[0]).parent
    assert images.load(plain[0]).tobytes() != images.load(paths[0]).tobytes()
    status, seen, err = run(*FAST, "--prompt=A Red circle", "--lowercase")
    assert images.load(seen[0]).tobytes() != images.load(plain[0]).tobytes()


def test_custom_image_size(run, config, tmp_path):
    dump_config(load_config(config), tmp_path / "dumped.yaml")  # as beside a run: every size is written out
    status, paths, err = run(
        "--prompt=a", "--step=2", "--custom_image_size=512", model=("--config=dumped.yaml",)
    )
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
        (["--null_mask=mine"], "unknown null_mask 'mine'; choose from prompt, own"),
        (["--sampling_algo=scm"], "sampler 'scm' does not fit SanaMS_Tiny_P1_D8"),
        (["--lora"], "--lora: expected at least one argument"),
        (["--lora=none.safetensors"], "none.safetensors"),
        (["--lora_scale=x"], "--lora_scale: invalid float value: 'x'"),
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


class Code:
    """What a pickle can do when it is read."""

    def __reduce__(self):
        return os.mkdir, ("was_run",)


@pytest.fixture
def bad_weights(config, tmp_path, monkeypatch):
    """Files that cannot be used, in the working folder."""
    state = load_file(config.parent / "transformer.safetensors")
    torch.save(state, tmp_path / "whole.pth")
    (tmp_path / "truncated.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:100_000])
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"state_dict": Code()}, protocol=2))
    save_file({key: value for key, value in state.items() if "blocks.7" not in key}, "short.safetensors")
    save_file({"a": torch.zeros(2)}, "other.safetensors")
    save_file({"controlnet.0.weight": torch.zeros(2)}, "controlnet.safetensors")
    torch.save(state, "Sana_1600M_1024px.pth")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(2)}, tmp_path / "shards" / "model-00001-of-00002.safetensors")

    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("several\nlines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model_path=truncated.pth"],
            "truncated.pth: truncated or corrupt (100,000 bytes): fetch it again",
        ),
        (["--model_path=code.pth"], "code.pth: refused, nothing of it was run"),
        (["--model_path=short.safetensors"], "blocks"),  # lacks blocks.7...; 7 blocks deep
        (["--model_path=other.safetensors"], ("the model has no a", "not the weights of a Sana transformer")),
        (["--model_path=controlnet.safetensors"], "ControlNet"),
        (
            ["--model_path=Sana_1600M_1024px.pth", "--dtype=bf16"],
            "these weights (Sana_1600M_1024px) do not run in bfloat16",
        ),
        (["--model_path=shards"], "model-00002-of-00002.safetensors"),
        (["--model_path=hf://owner/mispelt/a.pth"], "could not fetch hf://owner/mispelt/a.pth"),
        (["--model_path=owner/mispelt"], "could not fetch hf://owner/mispelt"),
        (["--model_path=hf://owner"], "malformed hub name 'hf://owner'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_weights_are_one_line(run, bad_weights, tmp_path, arguments, message, with_config):
    model = {} if with_config else {"model": ()}
    status, out, err = run("--prompt=a", *arguments, **model)
    assert (status, out) == (2, [])
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert (message if isinstance(message, str) else message[not with_config]) in lines[0]
    assert "Traceback" not in err
    assert not (tmp_path / "was_run").exists()
    assert not (tmp_path / "output").exists()


# Processes


def processes(*command, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_three_processes_write_the_files_of_one(config, tmp_path, batch_size):
    (tmp_path / "p.txt").write_text(
        "a red circle\nthree blue stars\na heart --ar 1:4\na ring\n\ntwo crosses\na star\n"
    )
    port = free_port()
    common = [str(SCRIPT), f"--config={config}", "--txt_file=p.txt", f"--bs={batch_size}"]
    common += ["--step=2", "--device=cpu"]
    one = processes(sys.executable, *common, "--work_dir=one", folder=tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", f"--master_port={port}"]
    three = processes(*launcher, *common, "--work_dir=three", folder=tmp_path)
    paths = one.stdout.splitlines()
    assert len(paths) == 7
    assert three.stdout.splitlines() == [path.replace("one/", "three/", 1) for path in paths]
    folders = [(tmp_path / path).parent for path in (paths[0], three.stdout.splitlines()[0])]
    files = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert files[0] == files[1]
    for name in files[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
