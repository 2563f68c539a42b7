"""The sampler against a network that knows the answer, and the noise that it is given."""

import pytest
import torch

from ccsr.timesteps import nuts_plan
from consissr.diffusion.plans import ddpm_plan
from consissr.diffusion.sampler import recorded_draw, sample, seeded_draw, start_latent
from consissr.diffusion.schedule import Schedule, alpha_bar

SHAPE = (2, 4, 6, 6)


@pytest.fixture
def schedule():
    return Schedule(alpha_bar())


@pytest.mark.parametrize("plan", [ddpm_plan(7), nuts_plan(6, 2 / 3, 1 / 2), nuts_plan(1), nuts_plan(6, 1, 0)])
def test_a_perfect_denoiser_is_found_by_every_plan(schedule, plan):
    truth = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    seen = []

    def denoise(z, t):
        seen.append(t[0].item())
        return schedule.eps_from_x0(z, truth, t)

    draw = seeded_draw(0, ["a", "b"])
    z = sample(denoise, plan, start_latent("noise", truth, schedule, draw), schedule, draw)
    assert torch.allclose(z, truth, atol=1e-4)
    assert seen == [step.t for step in plan]


def test_noise_reaches_the_level_of_each_step(schedule):
    """With x0 = 0, the latent before evaluation at t has variance 1 - alpha_bar[t]."""
    levels = {}

    def denoise(z, t):
        levels[t[0].item()] = z.var().item()
        return schedule.eps_from_x0(z, torch.zeros_like(z), t)

    draw, zero = seeded_draw(0, [0]), torch.zeros(1, 4, 64, 64)
    for plan in (ddpm_plan(5), nuts_plan(6, 2 / 3, 0)):
        sample(denoise, plan, start_latent("lq", zero, schedule, draw), schedule, draw)
    for t, variance in levels.items():
        assert variance == pytest.approx(1 - schedule.alpha_bar[t].item(), rel=0.05)


def test_first_evaluation_may_have_its_own_denoiser(schedule):
    calls = []
    plan = nuts_plan(6, 2 / 3, 1 / 3)
    sample(
        lambda z, t: calls.append("rest") or z,
        plan,
        torch.zeros(SHAPE),
        schedule,
        seeded_draw(0, [0, 1]),
        first=lambda z, t: calls.append("first") or z,
    )
    assert calls == ["first", "rest", "rest"]


def test_noise_of_an_image_depends_on_nothing_but_its_key():
    names = ["init", "tmax", "step[3]"]
    alone = {name: seeded_draw(7, ["x/b.png"])(name, (1, 4, 3, 3)) for name in names}
    batch = seeded_draw(7, ["a.png", "x/b.png", "c.png"])
    for name in reversed(names):  # order of draws and of images are free
        assert torch.equal(batch(name, (3, 4, 3, 3))[1:2], alone[name])
    others = [
        seeded_draw(8, ["x/b.png"]),
        seeded_draw(7, ["x/b.png"], repeat=1),
        seeded_draw(7, ["b.png"]),
    ]
    for other in others:
        assert not torch.equal(other("init", (1, 4, 3, 3)), alone["init"])
    assert not torch.equal(alone["init"], alone["tmax"])
    assert not torch.equal(seeded_draw(0, [0])("init", (1, 2)), seeded_draw(0, ["0"])("init", (1, 2)))


def test_noise_is_the_same_on_every_machine():
    """Seeds come from a stable hash: these numbers may never change, or recorded results stop being repeatable."""
    first = seeded_draw(0, ["a.png"])("init", (1, 1, 1, 2)).flatten()
    assert first.tolist() == pytest.approx([0.88042182, -0.48772156], abs=1e-6)


def test_recorded_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="init"):
        recorded_draw({"init": torch.zeros(1, 2)})("init", (1, 3))
