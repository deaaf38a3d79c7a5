"""Sampling of consistency models in TrigFlow coordinates (sCM, Lu & Song 2024, arXiv 2410.11081): SANA-Sprint.

Time is an angle tau, from 0 (data) to pi/2 (noise), with x_tau = cos(tau) x_0 + sin(tau) eps. A consistency model
jumps from any tau to the data; with several steps, each jump but the last is followed by fresh noise.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sana.diffusion.solvers import DEFAULT_STEPS, Callback

Network = Callable[[Tensor, float], Tensor]
"""F(x, tau), the tangent dx/dtau: x (B, ...) and a Python float -> a tensor like x."""

FreshNoise = Callable[[int], Tensor]
"""The noise after a step (counted from 1): independent standard normal values, of the shape of the first noise. Drawing
each image's part from that image's own generator makes the image independent of its batch."""

MAX_TIME = 1.5708
"""Where the published samplers start: pi/2, rounded up."""
INTERMEDIATE_TIME = 1.3
"""The published second time of two steps."""


def scm_schedule(num_steps: int, max_time: float = MAX_TIME, intermediate: float | None = None) -> Tensor:
    """Angles of an sCM sampler: uniform from `max_time` to 0, or `max_time`, `intermediate`, 0.

    Args:
        num_steps: N >= 1, the number of network evaluations.
        max_time: the first angle, at most `MAX_TIME`.
        intermediate: the second of two steps. None: 1.3 with two steps, and with any other number there is none.

    Returns:
        (N + 1,) float64, strictly decreasing to exactly 0.

    Raises:
        ValueError: no step, an intermediate time with another number of steps than two, or out of order.
    """
    if num_steps < 1:
        raise ValueError(f"the number of steps must be at least 1, got {num_steps}")
    if intermediate is not None and num_steps != 2:
        raise ValueError(f"an intermediate time ({intermediate}) needs two steps, got {num_steps}")
    if num_steps == 2:
        middle = INTERMEDIATE_TIME if intermediate is None else intermediate
        times = torch.tensor([max_time, middle, 0.0], dtype=torch.float64)
    else:
        times = torch.linspace(max_time, 0.0, num_steps + 1, dtype=torch.float64)
    _check(times.tolist())
    return times


def scm_times(
    steps: int | None, first: float | None, second: float | None, times: Sequence[float] | None
) -> Tensor:
    """The angles that a caller asks for: given one by one, or by their number and the first two.

    Args:
        steps: N; None: the usual number, or as many as `times` makes.
        first, second: `max_time` and `intermediate` of `scm_schedule`; None: its own.
        times: all N + 1 angles.

    Raises:
        ValueError: `times` beside what it makes superfluous.
    """
    if times is None:
        steps = DEFAULT_STEPS["scm"] if steps is None else steps
        return scm_schedule(steps, MAX_TIME if first is None else first, second)
    if (first, second) != (None, None) or steps not in (None, len(times) - 1):
        raise ValueError(
            f"timesteps are all {len(times)} angles of {len(times) - 1} steps: leave out num_inference_steps, "
            "max_timesteps and intermediate_timesteps"
        )
    return torch.tensor(times, dtype=torch.float64)


def scm(
    network: Network, noise: Tensor, times: Tensor, noise_like: FreshNoise, callback: Callback | None = None
) -> Tensor:
    """Sample a consistency model. From tau_i to tau_{i+1}, with eps_i = noise_like(i):

        x0_i    = cos(tau_i) x_i - sin(tau_i) F(x_i, tau_i)
        x_{i+1} = cos(tau_{i+1}) x0_i + sin(tau_{i+1}) eps_i

    and x0_i is the result after the last step. Published equations have x in units of the data with standard deviation
    sigma_data, and a network sigma_data F(x / sigma_data, tau); here x is x / sigma_data, so that it cancels.

    Args:
        network: F(x, tau), for example `sana.models.sprint.TrigFlow`.
        noise: standard normal, (B, ...).
        times: (N + 1,) angles that decrease strictly to 0, such as `scm_schedule` gives.
        noise_like: fresh noise, asked once after every step but the last, in order.
        callback: see `Callback`.

    Returns:
        The predicted data, of the shape of `noise`, float32 at least.

    Raises:
        ValueError: times that do not decrease from at most `MAX_TIME` to 0, or fresh noise of another shape.
    """
    angles = times.tolist()
    _check(angles)
    steps = len(angles) - 1
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for step, (tau, tau_next) in enumerate(pairwise(angles), start=1):
        x0 = math.cos(tau) * x - math.sin(tau) * network(x, tau).to(x.dtype)
        x = x0
        if step < steps:
            fresh = noise_like(step).to(x)
            if fresh.shape != x.shape:
                raise ValueError(f"fresh noise has shape {tuple(fresh.shape)}, the state {tuple(x.shape)}")
            x = math.cos(tau_next) * x0 + math.sin(tau_next) * fresh
        if callback is not None:
            callback(step, steps, x, x0)
    return x


def _check(times: list[float]) -> None:
    decreasing = all(a > b for a, b in pairwise(times))
    if len(times) < 2 or not (times[0] <= MAX_TIME and times[-1] == 0 and decreasing):
        raise ValueError(f"times must decrease strictly from at most {MAX_TIME} to 0, got {times}")
