"""Time-aware latent augmentation: its probabilities, and what it trains on."""

import pytest
import torch

from consissr.diffusion.schedule import Schedule, alpha_bar
from consissr.diffusion.tala import probability, tala_inputs
from consissr.errors import UserError

T = torch.arange(1000)


def test_probability_at_both_ends():
    assert probability(T)[-1] == 1
    assert probability(T, "as_released")[-1].item() == pytest.approx(0.999**10)
    assert probability(T, "as_released")[0] == 0
    assert probability(T, "off").max() == 0
    linear = probability(T, "linear")
    assert linear[-1] == 1
    assert linear[599].item() == pytest.approx(0, abs=1e-12)
    assert linear[:599].max() == 0


@pytest.mark.parametrize("form", ["power", "as_released", "linear"])
def test_probability_rises_and_stays_one(form):
    p = probability(T, form)
    assert (p.diff() >= 0).all() and p.min() >= 0 and p.max() <= 1


def test_larger_gamma_augments_less():
    for t in (300, 900):
        values = [probability(torch.tensor(t), gamma=gamma).item() for gamma in (5, 10, 20)]
        assert values == sorted(values, reverse=True)


def test_unknown_form_is_named():
    with pytest.raises(UserError, match="quadratic"):
        probability(T, "quadratic")


def test_each_image_has_its_own_draw():
    generator = torch.Generator().manual_seed(0)
    z_hq, z_lq, eps = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    schedule, t = Schedule(alpha_bar()), torch.tensor([900, 900, 900])
    p = probability(t)
    r = torch.tensor([p[0] - 0.01, p[0] + 0.01, p[0] - 0.01])
    z_t, target, mask = tala_inputs(z_hq, z_lq, eps, t, r, p, schedule)
    assert mask.tolist() == [True, False, True]
    assert torch.equal(z_t[1], schedule.add_noise(z_hq, eps, t)[1])
    assert torch.equal(target[1], eps[1])
    assert torch.equal(z_t[0], schedule.add_noise(z_lq, eps, t)[0])
    assert torch.allclose(schedule.x0_from_eps(z_t, target, t), z_hq, atol=1e-4)  # every target leads to z_hq
    assert (target[0] - eps[0]).abs().max() > 0.01


def test_one_draw_for_the_batch_as_released():
    z = torch.zeros(2, 1, 2, 2)
    t = torch.tensor([999, 0])
    _, _, mask = tala_inputs(z, z, z, t, torch.tensor([0.5]), probability(t), Schedule(alpha_bar()))
    assert mask.tolist() == [True, False]
