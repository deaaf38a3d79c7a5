"""What every test of an operation shares."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    """On a GPU cuDNN would round the reference's float32 convolutions to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch):
    """A kernel that leaves one element of its output unwritten must fail, not pass by luck."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
