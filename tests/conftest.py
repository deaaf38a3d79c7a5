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
def log_as_it_was():
    """Commands that a test runs in this process set the level of the log; the next test would find it so."""
    logger = logging.getLogger("sana")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
