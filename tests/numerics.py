"""Numerical comparison for tests: one measure of error, stated with the name of the tensor."""

import torch


def assert_close(name: str, actual: torch.Tensor, reference: torch.Tensor, *, rel_rms: float) -> None:
    """Fail unless rms(actual - reference) / rms(reference) <= rel_rms, in float64, with no NaN on either side."""
    assert actual.shape == reference.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    )
    actual, reference = actual.detach().double().cpu(), reference.detach().double().cpu()
    assert reference.isfinite().all(), f"{name}: the reference is not finite"
    assert actual.isfinite().all(), (
        f"{name}: {(~actual.isfinite()).sum()} of {actual.numel()} values are not finite"
    )
    error = (actual - reference).square().mean().sqrt() / reference.square().mean().sqrt().clamp_min(1e-12)
    assert error <= rel_rms, f"{name}: relative RMS error {error:.2e} > {rel_rms:.0e}"
