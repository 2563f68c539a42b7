"""The schedule's formulas at values that can be checked by hand, and against values that stand in the authors' code."""

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


def one(value: float) -> torch.Tensor:
    """A latent of one number, in float64."""
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def test_values_of_stable_diffusion():
    table = alpha_bar()
    wanted = {0: 0.99915, 1: 0.998296, 333: 0.534962, 499: 0.277669, 665: 0.105805, 999: 0.00466010}
    for t, value in wanted.items():
        assert table[t].item() == pytest.approx(value, rel=1e-5)


def test_alpha_bar_is_the_product_of_1_minus_beta():
    """beta rises evenly in its root: 0.1, 0.3, 0.5 squared; and Stable Diffusion's, term by term in Python's floats."""
    products = [0.99, 0.99 * 0.91, 0.99 * 0.91 * 0.75]
    assert alpha_bar(3, 0.01, 0.25).tolist() == pytest.approx(products, rel=1e-14)
    table, product = alpha_bar(), 1.0
    for t in range(1000):
        product *= 1 - (0.00085**0.5 + t / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
        assert table[t].item() == pytest.approx(product, rel=1e-12)


def test_formulas_by_hand():
    """alpha_bar 0.64 and 0.36 have the roots 0.8 and 0.6, and leave noise of 0.6 and 0.8."""
    schedule = Schedule(torch.tensor([0.64, 0.36], dtype=torch.float64))
    for t in (0, torch.tensor([0])):
        z_t = schedule.add_noise(one(1.0), one(2.0), t)
        assert z_t.item() == pytest.approx(0.8 * 1 + 0.6 * 2, rel=1e-14)  # (Eq. 1)
        assert schedule.x0_from_eps(one(5.0), one(3.0), t).item() == pytest.approx((5 - 0.6 * 3) / 0.8, rel=1e-14)
        assert schedule.eps_from_x0(one(5.0), one(3.0), t).item() == pytest.approx((5 - 0.8 * 3) / 0.6, rel=1e-14)
    # From t = 1 to 0: alpha = 0.36 / 0.64 = 0.5625 and beta = 0.4375 (Sec. III-B, CCSR).
    for t, t_next in ((1, 0), (torch.tensor([1]), torch.tensor([0]))):
        mean, variance = schedule.posterior(one(2.0), one(3.0), t, t_next)
        assert mean.item() == pytest.approx((0.8 * 0.4375 * 3 + 0.75 * 0.36 * 2) / 0.64, rel=1e-14)
        assert variance.item() == pytest.approx(0.36 / 0.64 * 0.4375, rel=1e-14)


def test_noise_and_clean_latent_convert_both_ways(schedule, z):
    z0, eps = z
    t = torch.tensor([0, 500, 999])
    z_t = schedule.add_noise(z0, eps, t)
    assert torch.allclose(schedule.x0_from_eps(z_t, eps, t), z0, atol=1e-4)
    assert torch.allclose(schedule.eps_from_x0(z_t, z0, t), eps, atol=1e-4)
    for i, step in enumerate(t.tolist()):  # an int means the whole batch
        assert torch.equal(schedule.add_noise(z0, eps, step)[i], z_t[i])


def test_arguments_are_left_as_they_were(schedule, z):
    before = [tensor.clone() for tensor in z]
    schedule.add_noise(*z, 500), schedule.x0_from_eps(*z, 500), schedule.posterior(*z, 500, 400)
    assert all(map(torch.equal, z, before))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_results_have_the_type_and_the_device_of_the_latents(dtype):
    """Timesteps may lie on the latents' device or on the CPU, or be a number. ("meta" stands for any device.)"""
    for device, times in (("cpu", "cpu"), ("meta", "cpu"), ("meta", "meta")):
        schedule = Schedule(alpha_bar())
        z = torch.ones(2, 1, 1, 1, dtype=dtype, device=device)
        for t, t_next in ((9, 5), (torch.tensor([9, 9], device=times), torch.tensor([5, 5], device=times))):
            results = [f(z, z, t) for f in (schedule.add_noise, schedule.x0_from_eps, schedule.eps_from_x0)]
            for result in (*results, *schedule.posterior(z, z, t, t_next)):
                assert result.dtype == dtype
                assert result.device.type == device or not result.ndim  # one number goes with any device


@pytest.mark.parametrize("t", [-2, 1000])
def test_timesteps_outside_the_table_are_refused(schedule, z, t):
    with pytest.raises(ValueError, match=r"outside 0\.\.999"):
        schedule.add_noise(*z, t)


@pytest.mark.parametrize("table", [[[0.9]], [1.0, 0.5], [2.0, 0.5], [0.5, 0.0], [0.5, -1.0], [0.5, 0.5], [0.4, 0.5]])
def test_a_table_that_is_no_schedule_is_refused(table):
    with pytest.raises(ValueError, match="^alpha_bar must be a falling sequence"):
        Schedule(torch.tensor(table))
