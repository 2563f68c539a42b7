"""p(t) of time-aware latent augmentation."""

import pytest
import torch

from consissr.diffusion.augmentation import probability

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
