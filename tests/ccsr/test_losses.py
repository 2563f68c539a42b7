"""CCSR's losses, with denoisers that know the answer and ones that do not."""

import pytest
import torch

from ccsr.deft import adaptive_weight
from ccsr.nuts import nuts_losses
from consissr.diffusion.schedule import Schedule, alpha_bar

T_MAX = 666


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    z_hq, z_lq, *noises = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(5))
    return z_hq, z_lq, torch.tensor([10, 600]), noises


def test_a_perfect_denoiser_has_no_loss(given):
    """Wherever x_T comes from."""
    schedule = Schedule(alpha_bar())
    z_hq, z_lq, t, noises = given
    for start in (z_lq, z_hq):
        found = nuts_losses(lambda z, t: schedule.eps_from_x0(z, z_hq, t), z_hq, start, t, noises, schedule, T_MAX)
        assert found.keys() == {"l_diff", "l_T", "l_tmax"} and max(found.values()) < 1e-6


def test_gradient_flows_through_the_first_estimate(given):
    """With the network frozen at t_max, l_tmax still reaches what was predicted at T (Eq. 3: not detached)."""
    scale = torch.tensor(0.5, requires_grad=True)
    found = nuts_losses(
        lambda z, t: scale * z if t[0] == 999 else z.detach() * 0 + z * 0.1, *given, Schedule(alpha_bar()), T_MAX
    )
    (gradient,) = torch.autograd.grad(found["l_tmax"], scale)
    assert gradient.abs() > 0


def test_adaptive_weight_is_a_ratio_of_gradients():
    weight = torch.ones(3, requires_grad=True)
    ratio = adaptive_weight((4 * weight).sum(), (2 * weight).sum(), weight)
    assert ratio.item() == pytest.approx(2, rel=1e-3)
    assert not ratio.requires_grad
    assert adaptive_weight(weight.sum(), (4 * weight).sum(), weight).item() == pytest.approx(0.25, rel=1e-3)
    assert adaptive_weight((4 * weight).sum(), (0 * weight).sum(), weight, limit=10).item() == 10
