"""The sCM sampler against diffusers' SCMScheduler on the same noise, and what it promises beside."""

import math

import pytest
import torch
from diffusers import SCMScheduler

from sana.diffusion.scm import INTERMEDIATE_TIME, MAX_TIME, scm, scm_schedule

SHAPE = (2, 4, 4)


def generators(batch=3):
    return [torch.Generator().manual_seed(seed) for seed in range(batch)]


def draw(sources):
    """Each image's noise from its own generator."""
    return torch.cat([torch.randn(1, *SHAPE, generator=source) for source in sources])


def nonlinear(x, tau):
    """A smooth network that depends on x and tau and mixes neighbouring elements of a sample."""
    return torch.sin(2 * x) * math.cos(3 * tau) + 0.3 * x.roll(1, dims=-1) + tau


def run(times, sources, network=nonlinear, **settings):
    return scm(network, draw(sources), times, lambda step: draw(sources), **settings)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("sigma_data", [0.5, 0.3])
def test_trajectory_agrees_with_diffusers(steps, sigma_data):
    """diffusers' states are sigma_data times ours; its scheduler draws once more, after the last step."""
    scheduler = SCMScheduler(sigma_data=sigma_data)
    scheduler.set_timesteps(steps, max_timesteps=MAX_TIME, intermediate_timesteps=1.3 if steps == 2 else None)
    times = scm_schedule(steps)
    torch.testing.assert_close(times.float(), scheduler.timesteps, rtol=0, atol=1e-7)
    sources, expected = generators(), []
    x = sigma_data * draw(sources)
    for tau in scheduler.timesteps[:-1]:
        output = sigma_data * nonlinear(x / sigma_data, tau.item())
        x, x0 = scheduler.step(output, tau, x, generator=sources, return_dict=False)
        expected += [x / sigma_data, x0 / sigma_data]
    seen = []
    result = run(times, generators(), callback=lambda step, total, *states: seen.extend(states))
    # Measured 7e-7 on values up to 4: diffusers has times, sines and cosines in float32.
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), rtol=0, atol=2e-6)
    assert torch.equal(result, seen[-1])


def test_schedules():
    assert scm_schedule(1).tolist() == [1.5708, 0]
    assert scm_schedule(2).tolist() == [1.5708, 1.3, 0] == [MAX_TIME, INTERMEDIATE_TIME, 0]
    assert scm_schedule(2, intermediate=1.0).tolist() == [1.5708, 1.0, 0]
    assert scm_schedule(4, max_time=1.2).tolist() == pytest.approx([1.2, 0.9, 0.6, 0.3, 0])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_perfect_network_gives_the_data(steps):
    """The tangent of the circle through the data, from any state: every step predicts the data itself."""
    data = draw(generators()) + 3
    result = run(scm_schedule(steps), generators(), lambda x, tau: (math.cos(tau) * x - data) / math.sin(tau))
    torch.testing.assert_close(result, data, rtol=0, atol=1e-6)  # measured 3e-7


def test_fresh_noise_is_asked_between_the_steps_only():
    asked, events = [], []

    def network(x, tau):
        assert isinstance(tau, float)
        events.append(tau)
        return nonlinear(x, tau)

    def noise_like(step):
        asked.append(step)
        return torch.randn(3, *SHAPE)

    times = scm_schedule(4)
    scm(network, draw(generators()), times, noise_like, lambda step, total, *_: events.append((step, total)))
    assert asked == [1, 2, 3]
    assert events == [event for i in range(4) for event in (times[i].item(), (i + 1, 4))]


def test_images_do_not_depend_on_their_neighbours():
    together = run(scm_schedule(4), generators())
    for i in range(3):
        assert torch.equal(together[i : i + 1], run(scm_schedule(4), generators()[i : i + 1]))
    assert not torch.equal(together[0], together[1])


def test_equal_calls_give_equal_results_and_leave_the_noise():
    noise = draw(generators())
    first, second = (scm(nonlinear, noise, scm_schedule(2), lambda step: 0.5 * noise) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(noise, draw(generators()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_state_is_float32_at_least(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    seen = []

    def half_precision(x, tau):
        seen.append(x.dtype)
        return nonlinear(x, tau).to(torch.bfloat16)

    noise = draw(generators()).to(dtype)
    result = scm(half_precision, noise, scm_schedule(2), lambda step: noise)
    assert {result.dtype, *seen} == {expected}


def test_an_exception_in_the_callback_ends_sampling():
    steps = []

    def cancel(step, *_):
        steps.append(step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(scm_schedule(3), generators(), callback=cancel)
    assert steps == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "at least 1, got 0"),
        ({"num_steps": 1, "intermediate": 1.3}, r"an intermediate time \(1.3\) needs two steps, got 1"),
        ({"num_steps": 2, "intermediate": 1.6}, "decrease strictly from at most 1.5708 to 0"),
        ({"num_steps": 2, "max_time": 1.0}, r"decrease strictly .*got \[1.0, 1.3, 0.0\]"),
        ({"num_steps": 4, "max_time": 2.0}, "at most 1.5708"),
        ({"num_steps": 4, "max_time": 0.0}, "decrease strictly"),
    ],
)
def test_impossible_schedules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        scm_schedule(**settings)


@pytest.mark.parametrize("times", [[0.0], [1.3, 0.1], [1.0, 1.0, 0.0], [1.6, 0.0], [float("nan"), 0.0]])
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match="times must decrease strictly"):
        run(torch.tensor(times), generators())


def test_fresh_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"fresh noise has shape \(1, 2, 4, 4\), the state \(3, 2, 4, 4\)"):
        scm(nonlinear, draw(generators()), scm_schedule(2), lambda step: draw(generators(1)))
