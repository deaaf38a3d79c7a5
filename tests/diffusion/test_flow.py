"""Path, target, time grids, published time tables and timestep densities."""

import numpy as np
import pytest
import torch

from sana.diffusion import flow
from sana.diffusion.flow import TimestepDensity

# (N, shift) -> points, six decimals as published; a list that stops at None goes on after it.
GRIDS = {
    (4, 3): ".999666 .89964 .749625 .499667 0",
    (14, 4): ".99975 .980873 .959731 .935891 .908801 .877749 .841795 .79968 .749672 .689322 .615053 .521421 "
    ".39972 .2351 0",
    (20, 3): ".999666 .98242 .963941 .944094 .922722 .89964 .874635 .847457 .81781 .78534 .749625 .710152 "
    ".666296 .617284 .562148 .499667 .428265 .345888 .249792 .13624 0",
    (20, 6): ".999833 .991132 .98164 .971243 .959808 .947169 .933126 .917431 .899775 .879765 .856898 .830513 "
    ".799733 .763359 .719712 .66637 .5997 .513992 .399733 .239808 0",
}


def batch(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, 4, 4, generator=generator).to(dtype) for _ in range(2)]


def test_path_ends_and_middle():
    latents, noise = batch()
    assert torch.equal(flow.interpolate(latents, noise, 0.0), latents)
    assert torch.equal(flow.interpolate(latents, noise, 1.0), noise)
    torch.testing.assert_close(flow.interpolate(latents, noise, 0.25), 0.75 * latents + 0.25 * noise)


def test_path_takes_one_time_per_sample():
    latents, noise = batch()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    mixed = flow.interpolate(latents, noise, t)
    assert mixed.dtype == torch.float32
    for i in range(3):
        one = flow.interpolate(latents[i : i + 1], noise[i : i + 1], t[i].item())
        assert torch.equal(mixed[i : i + 1], one)


def test_path_of_half_latents_is_float32():
    latents, noise = batch(dtype=torch.bfloat16)
    expected = flow.interpolate(latents.float(), noise.float(), 0.1234)
    assert torch.equal(flow.interpolate(latents, noise, 0.1234), expected)


def test_velocity_is_the_derivative_of_the_path():
    latents, noise = batch(dtype=torch.float64)
    difference = flow.interpolate(latents, noise, 0.75) - flow.interpolate(latents, noise, 0.25)
    torch.testing.assert_close(flow.velocity_target(latents, noise), difference / 0.5)


def test_data_from_velocity():
    latents, noise = batch(dtype=torch.float64)
    x = flow.interpolate(latents, noise, 0.8)
    torch.testing.assert_close(x - 0.8 * flow.velocity_target(latents, noise), latents)


def test_loss_is_the_mean_square_in_float32():
    prediction, target = batch(dtype=torch.bfloat16)
    expected = (prediction.double() - target.double()).square()
    total = flow.loss(prediction, target)
    each = flow.loss(prediction, target, per_sample=True)
    assert total.dtype == each.dtype == torch.float32
    torch.testing.assert_close(total.double(), expected.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(each.double(), expected.mean((1, 2, 3)), rtol=1e-6, atol=0)


def test_loss_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"\(3, 2, 4, 4\).*\(1, 2, 4, 4\)"):
        flow.loss(torch.zeros(3, 2, 4, 4), torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("t", [0.0, 0.0009, 0.28999, 0.999666, 1.0])
def test_network_time_truncates(t):
    expected = int(1000 * t)
    assert flow.network_time(t) == expected
    assert isinstance(flow.network_time(t), float)
    many = flow.network_time(torch.tensor([t, 0.5], dtype=torch.float64))
    assert many.dtype == torch.float32
    assert many.tolist() == [expected, 500]


def test_shift_time():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(flow.shift_time(t, 1.0), t)
    torch.testing.assert_close(flow.shift_time(flow.shift_time(t, 3.0), 1 / 3), t)
    assert flow.shift_time(0.5, 3.0) == 0.75


@pytest.mark.parametrize("shift", [0.0, -3.0, float("inf"), float("nan")])
@pytest.mark.parametrize("function", [flow.sigma_schedule, flow.euler_schedule])
def test_impossible_shift(function, shift):
    with pytest.raises(ValueError, match=f"positive and finite, got {shift}"):
        function(20, shift)


@pytest.mark.parametrize("function", [flow.sigma_schedule, flow.euler_schedule])
def test_no_steps(function):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        function(0, 3.0)


@pytest.mark.parametrize(("steps", "shift"), GRIDS)
def test_published_grids(steps, shift):
    expected = [float(word) for word in GRIDS[steps, shift].split()]
    grid = flow.sigma_schedule(steps, shift)
    # Published to six digits: half a unit of the last.
    assert grid.tolist() == pytest.approx(expected, abs=5.1e-7)


def test_grid_without_shift_is_uniform():
    expected = [0.04995 * (20 - i) for i in range(21)]
    assert flow.sigma_schedule(20, 1.0).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 11, 20, 37])
def test_grid_is_that_of_numpy_in_float64(steps, shift):
    # At 11 steps without shift, the last bits of b decide between the first network times 999 and 998.
    sigma = 1 - np.linspace(1, 0.001, steps + 1)
    expected = (shift * sigma / (1 + (shift - 1) * sigma))[::-1]
    grid = flow.sigma_schedule(steps, shift)
    assert grid.dtype == torch.float64
    assert grid.tolist() == expected.tolist()
    assert grid[-1] == 0
    assert flow.network_time(grid[0].item()) == 999


def test_euler_grid_is_shifted_twice():
    grid = flow.euler_schedule(28, 3.0)
    assert grid.dtype == torch.float64
    assert len(grid) == 29
    assert grid[:3].tolist() == pytest.approx([1, 0.987381, 0.974108], abs=5.1e-7)
    assert grid[-3:].tolist() == pytest.approx([0.110906, 0.008929, 0], abs=5.1e-7)
    assert flow.euler_schedule(1, 3.0).tolist() == [1, 0]


PUBLISHED_TIMES = {
    3.0: {1: 2, 10: 29, 100: 249, 250: 500, 500: 750, 900: 964, 999: 999},
    4.0: {100: 307, 500: 800},
}


@pytest.mark.parametrize("shift", PUBLISHED_TIMES)
def test_published_network_times(shift):
    times = flow.network_time(flow.training_levels(shift))
    assert {i: times[i].item() for i in PUBLISHED_TIMES[shift]} == PUBLISHED_TIMES[shift]


@pytest.mark.parametrize("shift", [1.0, 3.0, 4.0, 6.0])
def test_every_training_level_has_the_published_time(shift):
    # The reference's arithmetic: numpy float64, times 1000, stored as int64.
    sigma = 1.0 - np.linspace(1.0, 0.001, 1000)
    expected = (shift * sigma / (1 + (shift - 1) * sigma) * 1000).astype(np.int64)
    assert flow.network_time(flow.training_levels(shift)).tolist() == expected.tolist()


def draw(density, shift=1.0, n=100_000):
    return flow.sample_timesteps(n, density, shift, torch.Generator().manual_seed(0))


def test_sampled_times_are_training_levels():
    levels = flow.training_levels(3.0)
    t = draw(TimestepDensity("uniform"), shift=3.0)
    assert t.dtype == torch.float64
    assert torch.isin(t, levels).all()
    # A level is missed with probability exp(-100).
    assert len(t.unique()) == 1000


def test_level_is_the_truncated_draw():
    u = torch.rand(1000, generator=torch.Generator().manual_seed(5))
    t = flow.sample_timesteps(1000, TimestepDensity("uniform"), 3.0, torch.Generator().manual_seed(5))
    assert torch.equal(t, flow.training_levels(3.0)[(1000 * u).long()])


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.5)])
def test_logit_normal_density(mean, std):
    n = 100_000
    t = draw(TimestepDensity("logit_normal", mean, std), n=n).sort().values
    # The level of u is at most 1/1000 below u: compare with the distribution function of u in between.
    u = t + 0.0005
    expected = torch.special.ndtr((torch.logit(u) - mean) / std)
    empirical = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    # Kolmogorov-Smirnov at the 1e-6 level, 2.7 / sqrt(n) = 0.0085, and half a level of at most density 3.5.
    assert (expected - empirical).abs().max() < 0.0085 + 0.00175


def test_uniform_density():
    counts = torch.histc(draw(TimestepDensity("uniform")).float(), bins=10, min=0, max=1)
    # Six standard deviations of a binomial count.
    assert (counts - 10_000).abs().max() < 6 * (100_000 * 0.1 * 0.9) ** 0.5


def test_shift_acts_on_training_times():
    density = TimestepDensity()
    torch.testing.assert_close(draw(density, shift=3.0), flow.shift_time(draw(density, shift=1.0), 3.0))


def test_draws_follow_the_generator():
    density, generator = TimestepDensity(), torch.Generator().manual_seed(1)
    first, second = (flow.sample_timesteps(16, density, 3.0, generator) for _ in range(2))
    again = flow.sample_timesteps(16, density, 3.0, torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_extreme_draws_stay_in_the_table():
    t = draw(TimestepDensity("logit_normal", mean=0.0, std=100.0), shift=3.0, n=1000)
    assert t.min() == 0
    assert t.max() == flow.training_levels(3.0)[-1]


def test_density_is_validated():
    with pytest.raises(ValueError, match="unknown timestep density 'cosine'"):
        TimestepDensity("cosine")
    with pytest.raises(ValueError, match="std of a timestep density must be positive, got 0"):
        TimestepDensity(std=0.0)
