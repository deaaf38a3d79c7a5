"""Settings for every test. Nothing here is imported by the package."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated: Triton reads it at @triton.jit

# Tiny tensors gain nothing from threads, and one thread makes sums equal on every machine.
torch.set_num_threads(1)
