"""How a run is started: `train.sh`, torchrun behind it, two machines."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sana.training.tracker import read_history
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("ready", flush=True)
time.sleep(100)
"""


def launch(script: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "sana.training.launch",
        "--nproc_per_node=1",
        f"--master_port={free_port()}",
        script,
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_run_that_is_stopped_says_so_and_one_that_fails_too(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    process = launch(script)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Traceback" not in stderr
    script.write_text('import sys; print("what is wrong", file=sys.stderr); sys.exit(2)')
    process = launch(script)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and stderr.splitlines()[-1] == "what is wrong"


@pytest.mark.slow
def test_two_machines(tmp_path):
    """Two `train.sh` on this one, as two nodes: they share a run."""
    words = [
        *(
            "configs/sana_config/tiny/Sana_tiny_img256.yaml",
            "--np=1",
            "--model.load_from=",
            f"--work_dir={tmp_path}",
        ),
        *(
            "--data.num_scenes=8",
            "--train.train_batch_size=2",
            "--train.max_steps=2",
            "--train.heldout_samples=0",
        ),
        *("--train.feature_cache_dir=", "--train.ema_update=false", "--report_to=none"),
    ]
    shared = {
        "NNODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    nodes = [
        subprocess.Popen(
            ["bash", "train_scripts/train.sh", *words],
            cwd=ROOT,
            env={**os.environ, **shared, "NODE_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert [row["step"] for row in read_history(tmp_path / "history.jsonl")] == [1, 2]
    assert "8 samples, 2 steps an epoch, 2 steps" in told[0]  # a global batch of 4


def test_a_wrong_number_of_processes_is_one_line():
    command = ["bash", "train_scripts/train.sh", "--np=none"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "train.sh: error: --np: expected a number of at least 1, got none\n"
