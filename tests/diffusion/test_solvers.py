"""The solvers against published trajectories, diffusers' schedulers and exact solutions."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from sana.diffusion import flow
from sana.diffusion.solvers import DEFAULT_STEPS, SOLVERS, flow_dpm_solver, flow_euler


def noise(batch=3, dtype=torch.float32):
    return torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


def nonlinear(x, t):
    """A smooth velocity that depends on x and t and mixes neighbouring elements of a sample."""
    return torch.sin(2 * x) * math.cos(3 * t) + 0.3 * x.roll(1, dims=-1) + t


def truncated(x, t):
    """`nonlinear` seen through the whole-number time of a network."""
    return nonlinear(x, flow.network_time(t) / 1000)


def states(solver, velocity, start, sigmas):
    """Every state of a run, the first included."""
    seen = [start]
    result = solver(velocity, start, sigmas, callback=lambda step, total, x, x0: seen.append(x))
    assert torch.equal(result, seen[-1])
    return seen


@pytest.mark.parametrize(
    ("steps", "expected", "final"),
    [
        (4, [1, 0.84999337, 0.65375513, 0.41613714, 0.062505567], 0.062505567),
        (20, [1, 0.97413536, 0.9470332, 0.91870277, 0.88898327, 0.85777408], 0.24314112),
    ],
)
def test_published_trajectory(steps, expected, final):
    sigmas = flow.sigma_schedule(steps, 3.0)
    seen = states(flow_dpm_solver, lambda x, t: 0.5 * x + t, torch.ones(1, dtype=torch.float64), sigmas)
    # Published to eight digits: half a unit of the last.
    assert [x.item() for x in seen[: len(expected)]] == pytest.approx(expected, rel=0, abs=5.1e-9)
    assert seen[-1].item() == pytest.approx(final, rel=0, abs=5.1e-9)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize(("steps", "shift"), [(2, 3.0), (4, 1.0), (14, 4.0), (20, 3.0), (37, 6.0)])
def test_dpm_solver_agrees_with_diffusers(steps, shift):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    start = x = noise()
    expected = [x]
    for time in scheduler.timesteps:
        x = scheduler.step(nonlinear(x, time.item() / 1000), time, x).prev_sample
        expected.append(x)
    seen = states(flow_dpm_solver, truncated, start, flow.sigma_schedule(steps, shift))
    # Measured 2.1e-6 on values up to 3: diffusers keeps sigma in float32, we in float64.
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=0, atol=6e-6)


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (4, 1.0), (28, 3.0)])
def test_euler_agrees_with_diffusers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    grid = flow.euler_schedule(steps, shift)
    torch.testing.assert_close(grid.float(), scheduler.sigmas, rtol=0, atol=1e-7)
    start = x = noise()
    expected = [x]
    for time in scheduler.timesteps:
        x = scheduler.step(nonlinear(x, time.item() / 1000), time, x).prev_sample
        expected.append(x)
    seen = states(flow_euler, nonlinear, start, grid)
    # Measured 6e-7: diffusers keeps sigma and time in float32.
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=0, atol=2e-6)


def orders_of_convergence(solver):
    """Measured on dx/dt = x^2 (cos 4t + 1), whose solution is 1 / (c - P(t)), from t = 0.9 to 0.1.

    Away from both ends, where h shrinks with N: the published grids stay coarse in lambda at both ends.
    """

    def primitive(t):
        return math.sin(4 * t) / 4 + t

    start = torch.tensor([0.5, 0.8, 1.0], dtype=torch.float64)
    exact = 1 / (1 / start + primitive(0.9) - primitive(0.1))
    errors = []
    for steps in (64, 128, 256, 512):
        sigmas = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        result = solver(lambda x, t: x.square() * (math.cos(4 * t) + 1), start, sigmas)
        errors.append((result - exact).abs().max().item())
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def test_dpm_solver_is_of_order_two():
    assert orders_of_convergence(flow_dpm_solver) == pytest.approx([2, 2, 2], abs=0.1)


def test_euler_is_of_order_one():
    assert orders_of_convergence(flow_euler) == pytest.approx([1, 1, 1], abs=0.02)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_perfect_velocity_gives_the_data(name):
    schedule, solver = SOLVERS[name]
    data = noise() + 3
    result = solver(lambda x, t: (x - data) / t, noise(), schedule(4, 3.0))
    # Exact in real arithmetic at any number of steps, because the path is a line. Measured 1.2e-7.
    torch.testing.assert_close(result, data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_and_callbacks(name):
    schedule, solver = SOLVERS[name]
    sigmas = schedule(7, 3.0)
    times, calls = [], []

    def velocity(x, t):
        assert isinstance(t, float)
        times.append(t)
        return nonlinear(x, t)

    start = noise()
    result = solver(velocity, start, sigmas, lambda step, total, x, x0: calls.append((step, total, x, x0)))
    assert times == sigmas[:-1].tolist()
    assert [call[:2] for call in calls] == [(i, 7) for i in range(1, 8)]
    assert torch.equal(calls[-1][2], result)
    # The first prediction of the data, and: a step to t = 0 lands on its prediction.
    assert torch.equal(calls[0][3], start - times[0] * nonlinear(start, times[0]))
    torch.testing.assert_close(calls[-1][3], result, rtol=0, atol=1e-6)


def test_dpm_solver_ends_exactly_on_its_last_prediction():
    calls = []
    flow_dpm_solver(nonlinear, noise(), flow.sigma_schedule(5, 3.0), lambda *call: calls.append(call))
    _, _, x, x0 = calls[-1]
    assert torch.equal(x, x0)


@pytest.mark.parametrize("name", SOLVERS)
def test_an_exception_in_the_callback_ends_sampling(name):
    schedule, solver = SOLVERS[name]
    evaluations = []

    def cancel(step, total, x, x0):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solver(lambda x, t: evaluations.append(t) or x, noise(), schedule(7, 3.0), cancel)
    assert len(evaluations) == 2


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_do_not_see_their_neighbours(name):
    schedule, solver = SOLVERS[name]
    sigmas = schedule(6, 3.0)
    together = solver(nonlinear, noise(batch=3), sigmas)
    alone = [solver(nonlinear, noise(batch=3)[i : i + 1], sigmas) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", SOLVERS)
def test_equal_calls_give_equal_results_and_leave_the_noise(name):
    schedule, solver = SOLVERS[name]
    start = noise()
    first = solver(nonlinear, start, schedule(6, 3.0))
    assert torch.equal(start, noise())
    assert torch.equal(solver(nonlinear, start, schedule(6, 3.0)), first)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_state_is_float32_at_least(name, dtype):
    schedule, solver = SOLVERS[name]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    seen = []

    def half_precision(x, t):
        seen.append(x.dtype)
        return nonlinear(x, t).to(torch.bfloat16)

    result = solver(half_precision, noise(dtype=dtype), schedule(4, 3.0))
    assert {result.dtype, *seen} == {expected}


def test_dpm_solver_starts_from_pure_noise_too():
    """At t = 1 the first h is infinite; the step is still the line through m_0, and the next of order 1."""
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.0], dtype=torch.float64)
    seen = states(flow_dpm_solver, nonlinear, noise(dtype=torch.float64), sigmas)
    for i in range(2):
        t, t_next = sigmas[i].item(), sigmas[i + 1].item()
        torch.testing.assert_close(seen[i + 1], seen[i] + (t_next - t) * nonlinear(seen[i], t))


def test_too_few_steps():
    with pytest.raises(ValueError, match="at least 2 steps, got 1"):
        flow_dpm_solver(nonlinear, noise(), flow.sigma_schedule(1, 3.0))
    with pytest.raises(ValueError, match="at least 1 steps, got 0"):
        flow_euler(nonlinear, noise(), torch.tensor([1.0]))


@pytest.mark.parametrize(
    "grid",
    [[0.0, 0.5, 1.0], [1.0, 0.5, 0.5, 0.0], [1.1, 0.5, 0.0], [1.0, float("nan"), 0.0], [1.0, 0.5, -0.1]],
)
@pytest.mark.parametrize("solver", [flow_dpm_solver, flow_euler])
def test_bad_grid(solver, grid):
    with pytest.raises(ValueError, match="decrease strictly"):
        solver(nonlinear, noise(), torch.tensor(grid))


def test_names_and_default_steps():
    assert SOLVERS["flow_dpm-solver"] == (flow.sigma_schedule, flow_dpm_solver)
    assert SOLVERS["flow_euler"] == (flow.euler_schedule, flow_euler)
    assert DEFAULT_STEPS == {"flow_dpm-solver": 20, "flow_euler": 28, "scm": 2}
