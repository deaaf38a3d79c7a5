"""Solvers of the flow ODE dx/dt = v(x, t) from noise (t near 1) to data (t = 0), as functions of a callable.

A velocity is a callable v(x, t) with x (B, ...) and t a Python float in [0, 1], the same for the whole
batch; it returns a tensor like x. Each solver evaluates it exactly N times on a grid of N + 1 decreasing
times. States are float32 (float64 when the noise is), whatever the velocity computes in; the coefficients of
a step are float64.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from sana.diffusion.flow import euler_schedule, sigma_schedule

Velocity = Callable[[Tensor, float], Tensor]

Callback = Callable[[int, int, Tensor, Tensor], object]
"""Called after every step as callback(step, total, x, x0): step counts from 1 to total = N; x is the state
after the step, x0 the prediction of the data made in it (a preview). Both are to be read, not changed. What
it returns is ignored; an exception that it raises ends the sampling and reaches the caller, so it cancels."""


def flow_dpm_solver(
    velocity: Velocity, noise: Tensor, sigmas: Tensor, callback: Callback | None = None
) -> Tensor:
    """Flow-DPM-Solver: DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) on the linear path.

    With alpha_t = 1 - t, sigma_t = t, lambda_t = log(alpha_t / sigma_t), m_i = x_i - t_i v(x_i, t_i) the
    prediction of x_0, h_i = lambda_{i+1} - lambda_i and r_i = h_{i-1} / h_i, a step from t_i to t_{i+1} is

        D_i     = m_i + (m_i - m_{i-1}) / (2 r_i)
        x_{i+1} = (sigma_{i+1} / sigma_i) x_i - alpha_{i+1} (exp(-h_i) - 1) D_i

    The first and the last step use D_i = m_i (order 1). On a grid that ends at 0, h is infinite in the last
    step, and the result is m_i itself.

    Args:
        velocity: v(x, t).
        noise: the state at sigmas[0], (B, ...).
        sigmas: (N + 1,) strictly decreasing times in [0, 1], N >= 2, such as `sigma_schedule` gives.
        callback: see `Callback`.

    Returns:
        The state at sigmas[-1], of the shape of `noise`.

    Raises:
        ValueError: fewer than two steps, or a grid that does not decrease within [0, 1].
    """
    times = _checked_times(sigmas, min_steps=2)
    lambdas = (torch.log1p(-sigmas.double()) - torch.log(sigmas.double())).tolist()
    steps = len(times) - 1
    x, previous = _initial_state(noise), None
    for i, (t, t_next) in enumerate(pairwise(times)):
        x0 = x - t * velocity(x, t).to(x.dtype)
        h = lambdas[i + 1] - lambdas[i]
        if 0 < i < steps - 1:
            r = (lambdas[i] - lambdas[i - 1]) / h
            direction = x0 + (x0 - previous) / (2 * r)
        else:
            direction = x0
        x = (t_next / t) * x - (1 - t_next) * math.expm1(-h) * direction
        previous = x0
        if callback is not None:
            callback(i + 1, steps, x, x0)
    return x


def flow_euler(velocity: Velocity, noise: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Euler's method: x_{i+1} = x_i + (t_{i+1} - t_i) v(x_i, t_i), of order 1.

    Arguments, result and errors as for `flow_dpm_solver`, with N >= 1 and `euler_schedule` for the grid.
    """
    times = _checked_times(sigmas, min_steps=1)
    steps = len(times) - 1
    x = _initial_state(noise)
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x, t).to(x.dtype)
        x0 = x - t * v
        x = x + (t_next - t) * v
        if callback is not None:
            callback(i + 1, steps, x, x0)
    return x


def _checked_times(sigmas: Tensor, *, min_steps: int) -> list[float]:
    """The grid as Python floats, or ValueError."""
    times = sigmas.tolist()
    if len(times) <= min_steps:
        raise ValueError(f"this solver needs at least {min_steps} steps, got {len(times) - 1}")
    if not (times[0] <= 1 and times[-1] >= 0 and all(a > b for a, b in pairwise(times))):
        raise ValueError(f"times must decrease strictly within [0, 1], got {times}")
    return times


def _initial_state(noise: Tensor) -> Tensor:
    """A half type would lose the small updates of the last steps, so the state is float32 at least."""
    return noise.to(torch.promote_types(noise.dtype, torch.float32))


SOLVERS = {
    "flow_dpm-solver": (sigma_schedule, flow_dpm_solver),
    "flow_euler": (euler_schedule, flow_euler),
}
"""Name in the configs -> (schedule(num_steps, shift), solver(velocity, noise, sigmas, callback))."""

DEFAULT_STEPS = {"flow_dpm-solver": 20, "flow_euler": 28, "scm": 2}
"""Name in the configs -> number of steps when none is asked for. `scm` is in `sana.diffusion.scm`: it solves no flow."""
