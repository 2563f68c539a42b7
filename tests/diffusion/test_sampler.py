"""The sampler against a network that knows the answer, and the noise that it is given."""

import pytest
import torch

from ccsr.timesteps import nuts_plan
from consissr.diffusion.plans import Step, ddpm_plan
from consissr.diffusion.sampler import sample, seeded_draw, start_latent
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


def test_each_kind_of_step_by_hand():
    """alpha_bar 0.64 and 0.36, whose roots are 0.8 and 0.6; a network that always says 1; noise -0.5 and 0.5."""
    tiny = Schedule(torch.tensor([0.64, 0.36], dtype=torch.float64))
    z = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    first = (2 - 0.8) / 0.6  # x0 at t = 1
    mean, variance = (0.8 * 0.4375 * first + 0.75 * 0.36 * 2) / 0.64, 0.36 / 0.64 * 0.4375
    after = {"step": mean + variance**0.5 * -0.5, "renoise": 0.8 * first + 0.6 * 0.5}
    draws = {"step[0]": torch.full(z.shape, -0.5), "tmax": torch.full(z.shape, 0.5)}
    for kind, z_next in after.items():
        plan, seen, told = [Step(1, 0, kind), Step(0, -1, "x0")], [], []

        def denoise(z_t, t, seen=seen):
            seen.append((z_t.item(), t.tolist()))
            return torch.ones_like(z_t)

        draw = lambda name, shape: draws[name]  # noqa: E731
        x0 = sample(denoise, plan, z, tiny, draw, on_step=lambda *given, told=told: told.append(given))
        assert seen == [(2, [1]), (pytest.approx(z_next, rel=1e-12), [0])]
        assert x0.item() == pytest.approx((z_next - 0.6) / 0.8, rel=1e-12) and x0.dtype == torch.float64
        assert [(i, step, eps.item()) for i, step, eps, _ in told] == [(0, plan[0], 1), (1, plan[1], 1)]
        assert [estimate.item() for *_, estimate in told] == [pytest.approx(first), x0.item()]


def test_every_draw_has_its_own_name(schedule):
    plan = [Step(999, 600, "step"), Step(600, 400, "renoise"), Step(400, 700, "renoise"), Step(700, -1, "x0")]
    names, truth = [], torch.zeros(1, 4, 2, 2)
    draw = lambda name, shape: names.append(name) or torch.zeros(shape)  # noqa: E731
    sample(lambda z, t: z, plan, truth, schedule, draw)
    assert names == ["step[0]", "tmax", "tmax[2]"]


def test_starts(schedule):
    """`noise` is the noise called init; `lq` is z_lq noised to the last timestep (CCSR v2)."""
    z_lq, noise = torch.full((1, 4, 2, 2), 3.0, dtype=torch.float64), torch.randn(1, 4, 2, 2)
    draw = lambda name, shape: {"init": noise}[name]  # noqa: E731
    assert torch.equal(start_latent("noise", z_lq, schedule, draw), noise.double())
    a = schedule.alpha_bar[999]
    wanted = a.sqrt() * 3 + (1 - a).sqrt() * noise.double()
    assert torch.allclose(start_latent("lq", z_lq, schedule, draw), wanted, rtol=1e-12)


def test_timesteps_go_where_the_latents_are(schedule):
    """("meta" stands for any device.)"""
    seen = []
    z = torch.zeros(3, 4, 2, 2, device="meta")
    sample(lambda z, t: seen.append(t) or z, ddpm_plan(2), z, schedule, seeded_draw(0, "abc"))
    assert [(t.device.type, t.dtype, tuple(t.shape)) for t in seen] == [("meta", torch.int64, (3,))] * 2


def test_sampling_leaves_no_gradients_behind(schedule):
    weight = torch.ones(1, requires_grad=True)
    plan = [Step(999, -1, "x0")]
    assert not sample(
        lambda z, t: z * weight, plan, torch.ones(1, 4, 2, 2), schedule, seeded_draw(0, [0])
    ).requires_grad


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


def test_noise_for_another_number_of_images_is_refused():
    with pytest.raises(ValueError, match="^noise for 3 images, but 2 keys$"):
        seeded_draw(0, ["a", "b"])("init", (3, 4, 2, 2))
