"""Time-aware latent augmentation: its probabilities, and what it trains on."""

import pytest
import torch

from consissr.diffusion.schedule import Schedule, alpha_bar
from consissr.diffusion.tala import probability, tala_inputs
from consissr.errors import UserError

T = torch.arange(1000)


def test_probability_by_hand():
    """The paper counts 1..T, so that index 499 is its t = 500 = T / 2 and index 799 its t = 800."""
    values = {
        ("power", 10.0): {499: 2**-10, 799: 0.8**10, 999: 1},
        ("power", 5.0): {499: 2**-5},
        ("power", 20.0): {499: 2**-20},
        ("as_released", 10.0): {0: 0, 500: 2**-10, 999: 0.999**10},
        ("linear", 10.0): {0: 0, 599: 0, 699: 0.25, 799: 0.5, 899: 0.75, 999: 1},
        ("off", 10.0): {0: 0, 999: 0},
    }
    for (form, gamma), wanted in values.items():
        p = probability(T, form, gamma)
        assert p.dtype == torch.float64
        for t, value in wanted.items():
            assert p[t].item() == pytest.approx(value, rel=1e-12, abs=1e-12), (form, gamma, t)
    assert torch.equal(probability(T), probability(T, "power", 10.0)), "the paper's choice is the default"
    assert probability(T)[599] < 0.01, "p(600) is below 1 % (Sec. 3.4)"
    assert probability(torch.tensor([4]), T=10).item() == 2**-10
    assert probability(torch.tensor([7]), "linear", T=10).item() == pytest.approx(0.5)


@pytest.mark.parametrize("form", ["power", "as_released", "linear"])
def test_probability_rises_and_stays_one(form):
    p = probability(T, form)
    assert (p.diff() >= 0).all() and p.min() >= 0 and p.max() <= 1


def test_unknown_form_is_named():
    with pytest.raises(UserError, match="quadratic.*power, as_released, linear, off$"):
        probability(T, "quadratic")


def test_inputs_and_targets_by_hand():
    """alpha_bar 0.36: z_t = 0.6 z + 0.8 eps, and the target shifts by 0.6 / 0.8 (z_lq - z_hq)  (Eq. 4)."""
    schedule = Schedule(torch.tensor([0.64, 0.36], dtype=torch.float64))
    z_hq, z_lq, eps = (torch.tensor(v, dtype=torch.float64).view(2, 1, 1, 1) for v in ([1.0, 2], [5.0, 4], [3.0, -1]))
    p, r = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.49, 0.51])
    z_t, target, mask = tala_inputs(z_hq, z_lq, eps, torch.tensor([1, 1]), r, p, schedule)
    assert mask.tolist() == [True, False]
    assert z_t.flatten().tolist() == pytest.approx([0.6 * 5 + 0.8 * 3, 0.6 * 2 - 0.8])
    assert target.flatten().tolist() == pytest.approx([3 + 0.75 * (5 - 1), -1])


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


def test_a_draw_of_0_does_not_augment_where_the_probability_is_0():
    """r < p(t), line 8 of Algorithm 1: with TALA off, no draw may start from z_lq."""
    z, t = torch.zeros(1, 1, 2, 2), torch.tensor([999])
    mask = tala_inputs(z, z, z, t, torch.zeros(1), probability(t, "off"), Schedule(alpha_bar()))[2]
    assert mask.tolist() == [False]


def test_draws_may_lie_on_the_cpu_with_the_latents_elsewhere():
    z, t = torch.zeros(1, 1, 2, 2, device="meta"), torch.tensor([999])
    z_t, target, mask = tala_inputs(z, z, z, t, torch.zeros(1), probability(t), Schedule(alpha_bar()))
    assert z_t.device.type == target.device.type == "meta"
    assert mask.tolist() == [True]
