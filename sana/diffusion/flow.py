"""Flow matching with a linear path: the training pair (x_t, velocity), timestep densities, time grids.

Time t runs from 0 (data) to 1 (noise). Along the path

    x_t = (1 - t) x_0 + t eps,        v = dx_t/dt = eps - x_0        (Lipman et al. 2022, Liu et al. 2022)

so the signal is alpha_t = 1 - t, the noise sigma_t = t, and a velocity gives the data back: x_0 = x_t - t v.
A time is a Python float, or a tensor (B,) with one time per sample; networks see `network_time(t)`.
"""

import functools
import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

NUM_LEVELS = 1000
"""Noise levels that training visits, and the length of the network's time axis."""

Time = TypeVar("Time", float, Tensor)


def interpolate(latents: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps.

    Args:
        latents: x_0, (B, ...).
        noise: eps, of the same shape.
        t: a float, or (B,) on any device, in [0, 1].

    Returns:
        x_t of the same shape, in float32 at least: t keeps only three digits in a half type.
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    t = torch.as_tensor(t, dtype=dtype, device=latents.device).reshape(-1, *[1] * (latents.ndim - 1))
    return (1 - t) * latents + t * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """v = eps - x_0, what the network is trained to predict; it does not depend on t."""
    return noise - latents


def loss(prediction: Tensor, target: Tensor, *, per_sample: bool = False) -> Tensor:
    """Mean squared error in float32, with no weight over t.

    Args:
        prediction: velocity from the network, (B, ...), any float type.
        target: `velocity_target`, of the same shape.
        per_sample: mean over each sample alone, (B,), instead of over everything, a scalar.

    Raises:
        ValueError: the shapes differ, which would broadcast into a plausible number.
    """
    if prediction.shape != target.shape:
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"prediction and target must have one shape, got {shapes}")
    squared = (prediction.float() - target.float()).square()
    return squared.flatten(1).mean(1) if per_sample else squared.mean()


def network_time(t: Time) -> Time:
    """trunc(1000 t): the time that a network is given, a whole number stored as float.

    Published weights saw integers in training; with the fraction, a 20-step sample moves by 0.2 %.
    A tensor gives float32, which holds these integers exactly; bfloat16 would not.
    """
    if isinstance(t, Tensor):
        return torch.trunc(NUM_LEVELS * t).float()
    return float(math.trunc(NUM_LEVELS * t))


def shift_time(t: Time, shift: float) -> Time:
    """t' = s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23): noisier times for s > 1, the same for s = 1.

    Raises:
        ValueError: shift is not a positive finite number.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"flow shift must be positive and finite, got {shift}: published models use 1 to 6")
    return shift * t / (1 + (shift - 1) * t)


def sigma_schedule(num_steps: int, shift: float) -> Tensor:
    """Time grid of Flow-DPM-Solver: shift_time(1 - b), b uniform from 1 to 1/1000, from the noisy end down.

    Args:
        num_steps: N >= 1, the number of network evaluations (the solver itself wants two).
        shift: flow shift s of `shift_time`.

    Returns:
        (N + 1,) float64, strictly decreasing from shift_time(0.999) to exactly 0.
    """
    _check_steps(num_steps)
    b = _linspace(1.0, 1 / NUM_LEVELS, num_steps + 1)
    return shift_time(1 - b, shift).flip(0)


def euler_schedule(num_steps: int, shift: float) -> Tensor:
    """Time grid of Flow-Euler: uniform from 1 to shift_time(1/1000), shifted again, then 0.

    The second shift is a quirk of diffusers' `FlowMatchEulerDiscreteScheduler`; published samples have it.

    Returns:
        (N + 1,) float64, strictly decreasing from exactly 1 to exactly 0.
    """
    _check_steps(num_steps)
    grid = _linspace(1.0, shift_time(1 / NUM_LEVELS, shift), num_steps)
    return torch.cat([shift_time(grid, shift), grid.new_zeros(1)])


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"the number of steps must be at least 1, got {num_steps}")


def _linspace(start: float, end: float, points: int) -> Tensor:
    """`points` float64 values from `start` to `end`, rounded as numpy's linspace rounds them.

    torch.linspace differs in the last bit, and a level just below 0.1 has network time 99, not 100: at
    shift 1 the network time of 125 training levels would not be the published one.
    """
    values = torch.arange(points, dtype=torch.float64) * ((end - start) / max(points - 1, 1)) + start
    if points > 1:
        values[-1] = end
    return values


@dataclass(frozen=True)
class TimestepDensity:
    """How often training visits each noise level, before the shift.

    Raises:
        ValueError: an unknown scheme, or a std that is not positive.
    """

    scheme: str = "logit_normal"
    """`logit_normal`: u = sigmoid(mean + std n), n normal (Esser et al. 2024, eq. 19); or `uniform`."""
    mean: float = 0.0
    """Mean of logit(u); ignored by `uniform`. Higher means noisier."""
    std: float = 1.0
    """Standard deviation of logit(u); ignored by `uniform`."""

    def __post_init__(self) -> None:
        if self.scheme not in ("logit_normal", "uniform"):
            raise ValueError(f"unknown timestep density {self.scheme!r}: choose logit_normal or uniform")
        if not self.std > 0:
            raise ValueError(f"the std of a timestep density must be positive, got {self.std}")


@functools.lru_cache(maxsize=8)  # training asks for them for every sample
def training_levels(shift: float) -> Tensor:
    """The 1000 noise levels of training: t_i = shift_time(i / 1000), (1000,) float64, increasing from 0.

    They are the sampler's grid at 999 steps; `network_time` of them is the published integer table. The tensor is shared
    by all callers: read it, do not write to it.
    """
    return sigma_schedule(NUM_LEVELS - 1, shift).flip(0)


def sample_timesteps(
    n: int, density: TimestepDensity, shift: float, generator: torch.Generator | None
) -> Tensor:
    """Draw n training times: u from `density`, level i = trunc(1000 u), t = training_levels(shift)[i].

    Args:
        n: how many, usually the batch size.
        density: of u in (0, 1).
        shift: flow shift; it acts in training as in sampling.
        generator: a CPU generator, or None for torch's default one.

    Returns:
        (n,) float64 on the CPU: float32 would round 0.25 - 6e-17 up to 0.25, which is another network time.
    """
    if density.scheme == "uniform":
        u = torch.rand(n, generator=generator)
    else:
        u = torch.sigmoid(density.mean + density.std * torch.randn(n, generator=generator))
    # The sigmoid of a number above 17 is 1.0 in float32; the last level is the nearest there is.
    level = (NUM_LEVELS * u).long().clamp(max=NUM_LEVELS - 1)
    return training_levels(shift)[level]
