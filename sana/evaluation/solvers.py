"""The checks of `sana.evaluation.verify` that need no weights: do the solvers do what the published ones do?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from diffusers import DPMSolverMultistepScheduler, SCMScheduler
from torch import Tensor

from sana.evaluation.checks import REINSTALL, Check, bounded, relative_rms, worst
from sana.pipeline import SOLVERS, scm, scm_schedule
from sana.utils import seeding

BOUND = 1e-5  # relative RMS in float32

# Spec of the published solver: v(x, t) = 0.5 x + t from x = 1, shift 3; steps -> first states, final state.
TRAJECTORIES = {
    4: ((1, 0.84999337, 0.65375513, 0.41613714, 0.062505567), 0.062505567),
    20: ((1, 0.97413536, 0.9470332, 0.91870277, 0.88898327, 0.85777408), 0.24314112),
}


def check_solver(sampler: str, shift: float) -> Iterator[Check]:
    """Flow-DPM-Solver against published trajectories, and against diffusers' scheduler at the model's flow shift.

    Of a model that is sampled by scm (Sprint): that, against diffusers' scheduler.
    """
    if sampler == "scm":
        yield _check_scm()
        return
    schedule, solver = SOLVERS["flow_dpm-solver"]
    part = {"part": "solver", "where": "float64 cpu"}
    error = 0.0
    for steps, (expected, final) in TRAJECTORIES.items():
        states = [torch.ones(1, dtype=torch.float64)]
        keep = lambda step, total, x, x0, states=states: states.append(x)  # noqa: E731
        solver(lambda x, t: 0.5 * x + t, states[0], schedule(steps, 3.0), keep)
        pairs = [*zip(states, expected, strict=False), (states[-1], final)]
        error = worst(error, *(abs(x.item() - value) for x, value in pairs))
    yield bounded("published", error, 6e-9, advice=REINSTALL, **part)

    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    scheduler.set_timesteps(20)
    start = x = torch.randn(2, 4, 8, 8, generator=seeding.generator("solver"))
    for time in scheduler.timesteps:
        x = scheduler.step(_nonlinear(x, time.item()), time, x).prev_sample
    ours = solver(lambda x, t: _nonlinear(x, math.trunc(1000 * t)), start, schedule(20, shift))
    part["where"] = "float32 cpu"
    yield bounded("diffusers", relative_rms(ours, x), BOUND, advice=REINSTALL, **part)


def _check_scm() -> Check:
    """Four steps, with fresh noise after each but the last; diffusers' states are in units of the data, times 0.5."""
    start, sigma = torch.randn(2, 4, 8, 8, generator=seeding.generator("solver")), 0.5
    theirs, ours = (torch.Generator().manual_seed(1) for _ in range(2))
    scheduler, x = SCMScheduler(), sigma * start
    scheduler.set_timesteps(4, max_timesteps=1.5708, intermediate_timesteps=None)
    for angle in scheduler.timesteps[:-1]:
        tangent = sigma * _nonlinear(x / sigma, 1000 * angle.item())
        x, x0 = scheduler.step(tangent, angle, x, generator=theirs, return_dict=False)

    def network(x: Tensor, angle: float) -> Tensor:
        return _nonlinear(x, 1000 * angle)

    latents = scm(network, start, scm_schedule(4), lambda step: torch.randn(start.shape, generator=ours))
    error = relative_rms(latents, x0 / sigma)
    return bounded("diffusers", error, BOUND, advice=REINSTALL, part="solver", where="float32 cpu")


def _nonlinear(x: Tensor, time: float) -> Tensor:
    """A smooth velocity of state and network time, in [0, 1000]."""
    return torch.sin(2 * x) * math.cos(0.003 * time) + 0.3 * x.roll(1, dims=-1) + time / 1000
