"""The smallest run of the whole trainer: a network of one narrow block on four latents, in a process of its own."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from sana.config import SanaConfig, load_config
from sana.models.transformer import TransformerConfig
from sana.models.zoo import TRANSFORMERS
from sana.training.trainer import Trainer
from tests.ports import free_port

NAME = "SanaMS_Micro_P1_D1"
CONFIG = TransformerConfig(depth=1, hidden_size=32, num_heads=2)

# The trainer is imported once, in a process that has never computed: its children start in no time.
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["tests.training.micro"])


def settings(model: Path, work_dir: Path, *more: str) -> list[str]:
    """Overrides of `model`, a config of tests/factories.py."""
    return [
        f"--work_dir={work_dir}",
        "--data.type=SanaShapes",
        "--data.num_scenes=10",
        f"--model.model={NAME}",
        "--model.multi_scale=false",
        "--model.mixed_precision=fp32",
        "--model.load_from=",
        "--model.image_size=64",
        "--model.aspect_ratio_type=",
        f"--train.feature_cache_dir={model.parent / 'features'}",
        "--train.train_batch_size=4",
        "--train.num_workers=0",
        "--train.optimizer={type: AdamW, lr: 1e-3}",
        "--train.auto_lr=",
        "--train.lr_schedule_args.num_warmup_steps=2",
        "--train.log_interval=2",
        "--train.heldout_samples=0",
        "--train.ema_update=true",
        "--train.ema_rate=0.9",
        "--train.max_steps=6",
        "--report_to=none",
        *more,
    ]


def config(model: Path, work_dir: Path, *more: str) -> SanaConfig:
    TRANSFORMERS[NAME] = CONFIG
    return load_config(model, settings(model, work_dir, *more))


def trainer(model: Path, work_dir: Path, *more: str, resume: str | None = None) -> Trainer:
    return Trainer(config(model, work_dir, *more), resume)


def run(
    model: Path,
    work_dir: Path,
    more: tuple[str, ...] = (),
    prepare: Callable[[Trainer], None] | None = None,
    began: object = None,
    environment: dict[str, str] | None = None,
) -> None:
    """A whole run, from its newest checkpoint on; `prepare` may spoil it, `began` is an event set when the steps begin."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a run of its own
    run_ = trainer(model, work_dir, *more, resume="latest")
    if prepare is not None:
        prepare(run_)
    if began is not None:
        began.set()
    raise SystemExit(0 if run_.train() else 128 + signal.SIGTERM)


def start(*arguments: object) -> BaseProcess:
    """`run` in a process."""
    process = SPAWN.Process(target=run, args=arguments)
    process.start()
    return process


def start_group(
    count: int, model: Path, work_dir: Path, more: tuple[str, ...] = (), prepare: Callable | None = None
) -> list[BaseProcess]:
    """`run` in `count` processes that share the work by gloo."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(model, work_dir, more, prepare, None, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def finish(processes: list[BaseProcess]) -> list[int]:
    """Wait for all; their exit codes."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
