"""The schedule's formulas, against each other and against values that stand in the authors' code."""

import pytest
import torch

from consissr.diffusion.schedule import CLEAN, Schedule, alpha_bar


@pytest.fixture
def schedule():
    return Schedule(alpha_bar())


@pytest.fixture
def z():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 5, 6, generator=generator) for _ in range(2)]


def test_values_of_stable_diffusion():
    table = alpha_bar()
    wanted = {0: 0.99915, 1: 0.998296, 333: 0.534962, 499: 0.277669, 665: 0.105805, 999: 0.00466010}
    for t, value in wanted.items():
        assert table[t].item() == pytest.approx(value, rel=1e-5)


def test_noise_and_clean_latent_convert_both_ways(schedule, z):
    z0, eps = z
    t = torch.tensor([0, 500, 999])
    z_t = schedule.add_noise(z0, eps, t)
    assert torch.allclose(schedule.x0_from_eps(z_t, eps, t), z0, atol=1e-4)
    assert torch.allclose(schedule.eps_from_x0(z_t, z0, t), eps, atol=1e-4)
    for i, step in enumerate(t.tolist()):  # an int means the whole batch
        assert torch.equal(schedule.add_noise(z0, eps, step)[i], z_t[i])


def test_posterior_matches_bayes(schedule):
    """The product of q(z_t | z_next) and q(z_next | z_0), both Gaussian, normalised."""
    z_t, z0, t, t_next = 0.7, -0.3, 600, 450
    a, a_next = schedule.alpha_bar[t].item(), schedule.alpha_bar[t_next].item()
    step = a / a_next
    precision = step / (1 - step) + 1 / (1 - a_next)
    mean = (step**0.5 / (1 - step) * z_t + a_next**0.5 / (1 - a_next) * z0) / precision
    got = schedule.posterior(torch.full((1, 1, 1, 1), z_t), torch.full((1, 1, 1, 1), z0), t, t_next)
    assert got[0].item() == pytest.approx(mean, rel=1e-5)
    assert got[1].item() == pytest.approx(1 / precision, rel=1e-5)


def test_last_posterior_is_the_clean_latent(schedule, z):
    mean, variance = schedule.posterior(z[1], z[0], 20, CLEAN)
    assert torch.allclose(mean, z[0], atol=1e-6)
    assert variance.abs().max() == 0


@pytest.mark.parametrize("t", [-2, 1000])
def test_timesteps_outside_the_table_are_refused(schedule, z, t):
    with pytest.raises(ValueError, match="outside"):
        schedule.add_noise(*z, t)


def test_a_table_that_rises_is_refused():
    with pytest.raises(ValueError, match="falling"):
        Schedule(alpha_bar().flip(0))
