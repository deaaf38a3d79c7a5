"""Settings for every test. Nothing here is imported by the package."""

import logging
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated: Triton reads it at @triton.jit

# Tiny tensors gain nothing from threads, and one thread makes sums equal on every machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_log():
    """The log as a new process has it: commands that run in this process set its level and write to the stderr of their time."""
    logger = logging.getLogger("sana")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()
