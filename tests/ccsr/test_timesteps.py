"""Plans of non-uniform timestep sampling: the paper's S, both ends, and what bad values get."""

from dataclasses import replace

import pytest

from ccsr.timesteps import changed_plan, nuts_plan, plan_of, sampler_plan, t_max_step, with_plan
from consissr.config.sampler import SamplerConfig
from consissr.diffusion.plans import ddpm_plan
from consissr.errors import UserError

RELEASED = {
    (6, 0.6667, 0.5): [999, 499],
    (12, 0.6667, 0.5): [999, 582, 499],
    (18, 0.6667, 0.5): [999, 606, 551, 496],
    (6, 2 / 3, 1 / 3): [999, 499, 333],
    (6, 5 / 6, 1 / 2): [999, 665, 499],
    (6, 5 / 6, 2 / 3): [999, 665],
    (6, 1 / 2, 1 / 6): [999, 333, 167],
    (6, 0.6667, 0): [999, 499, 333, 167, 1],
    (6, 1.0, 0.5): [831, 665, 499],
    (1, 0.6666, 0.0): [999],
}


@pytest.mark.parametrize(("values", "timesteps"), RELEASED.items())
def test_released_timesteps(values, timesteps):
    assert [step.t for step in nuts_plan(*values, "leading")] == timesteps


def test_plans_of_the_papers_tables():
    """Tables II and III: T, t_max, t_min and S = (t_max - t_min) T + 1 (Sec. III-D); timestep t is 1000 k / T - 1."""
    tables = {
        (6, 2 / 3, 1 / 2): [999, 666],  # the paper's choice
        (12, 2 / 3, 1 / 2): [999, 666, 582],
        (18, 2 / 3, 1 / 2): [999, 666, 610, 555],
        (6, 2 / 3, 1 / 3): [999, 666, 499],
        (6, 5 / 6, 1 / 2): [999, 832, 666],
        (6, 5 / 6, 2 / 3): [999, 832],
        (6, 1 / 2, 1 / 6): [999, 499, 332],  # printed as S = 2
        (1, 2 / 3, 1 / 2): [999],  # one step: x0_from_T
    }
    for (T, t_max, t_min), times in tables.items():
        plan = nuts_plan(T, t_max, t_min)
        assert len(plan) == len(times) == (round((t_max - t_min) * T + 1) if T > 1 else 1)
        assert [step.t for step in plan] == times
        assert [step.t_next for step in plan] == [*times[1:], -1]
        assert [step.kind for step in plan] == (["renoise"] + ["step"] * len(times))[: len(times) - 1] + ["x0"]


def test_trailing_grid_means_what_it_says():
    plan = nuts_plan(6, 2 / 3, 1 / 2)
    assert [tuple(step) for step in plan] == [(999, 666, "renoise"), (666, -1, "x0")]


def test_first_version_of_the_release():
    plan = nuts_plan(45, 2 / 3, 1 / 3, "linspace")
    assert len(plan) == 16
    assert plan[1].t == 658


@pytest.mark.parametrize("T", [1, 2, 6, 12, 50, 1000])
@pytest.mark.parametrize("t_max", [1 / 6, 1 / 2, 2 / 3, 5 / 6])
@pytest.mark.parametrize("t_min", [0, 1 / 6, 1 / 2])
def test_number_of_evaluations(T, t_max, t_min):
    if t_min > t_max:
        with pytest.raises(UserError, match="t_min"):
            nuts_plan(T, t_max, t_min)
        return
    plan = nuts_plan(T, t_max, t_min)
    on_grid = round(T * t_max) - round(T * t_min)
    jumps = T > 1 and round(T * t_max) < T
    assert len(plan) == (1 if T == 1 or on_grid == 0 else on_grid + jumps)
    assert plan[0].t == 999 and plan[-1].kind == "x0"


def test_no_jump_when_t_max_is_the_noisiest_step():
    assert [step.kind for step in nuts_plan(6, 1, 1 / 2)] == ["step", "step", "x0"]
    assert nuts_plan(6, 0.95, 1 / 2) == nuts_plan(6, 1, 1 / 2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0, 2 / 3, 0.5), "0 sampling steps"),
        ((2000, 2 / 3, 0.5), "2000"),
        ((6, 1.5, 0.5), "t_max 1.5"),
        ((6, -0.1, -0.5), "t_max -0.1"),
        ((6, 2 / 3, -0.5), "t_min -0.5"),
        ((6, 1 / 3, 1 / 2), "t_min 0.5"),
    ],
)
def test_bad_values_are_named(values, said):
    with pytest.raises(UserError, match=said):
        nuts_plan(*values)


def test_training_and_sampling_agree():
    for spacing in ("trailing", "leading"):
        assert t_max_step(6, 2 / 3, spacing) == nuts_plan(6, 2 / 3, 0.5, spacing)[0].t_next
    with pytest.raises(UserError, match="t_max"):
        t_max_step(6, 0.01)


def test_configurations_become_plans():
    assert sampler_plan(SamplerConfig()) == nuts_plan()
    assert sampler_plan(SamplerConfig(plan="ddpm", steps=50))[-1].t == 0
    stored = with_plan(SamplerConfig(steps=12))
    assert sampler_plan(SamplerConfig(timesteps=stored.timesteps)) == nuts_plan(12)


def test_a_number_of_evaluations_becomes_a_plan():
    """S = round(T t_max) - round(T t_min) + 1 (Sec. III-B, CCSR): t_min follows; one less without a jump."""
    for t_max, most in ((2 / 3, 5), (0.7, 5), (1, 6)):
        config = SamplerConfig(steps=6, t_max=t_max, t_min=t_max)
        plans = [plan_of(config, evaluations) for evaluations in range(1, most + 1)]
        assert [len(plan) for plan in plans] == [*range(1, most + 1)]
        for wrong in (0, most + 1):
            with pytest.raises(UserError, match=f"{wrong} steps: this model can take 1 to {most}"):
                plan_of(config, wrong)
    leading = SamplerConfig(steps=6, t_max=0.95, t_min=0.95, grid="leading")  # k(t_max) is T, at 831: there is a jump
    plans = [[step.t for step in plan_of(leading, evaluations)] for evaluations in (1, 2, 7)]
    assert plans == [[999], [999, 831], [999, 831, 665, 499, 333, 167, 1]]
    for changes, most, steps in (
        ({"t_max": 0.95, "grid": "trailing"}, 6, 1000),  # k(t_max) is T at 999 itself: none
        ({"t_max": 0.95, "grid": "trailing"}, 6, 100),
        ({"t_max": 1.0, "grid": "leading"}, 6, 1000),  # none by definition, though 831 comes first
        ({"t_max": 0.0, "t_min": 0.0}, 1, 1000),
        ({"t_max": 0.1667, "t_min": 0.0}, 2, 1000),
    ):
        config = replace(SamplerConfig(steps=6), **changes)
        assert [len(plan_of(config, n, steps)) for n in range(1, most + 1)] == [*range(1, most + 1)]
        with pytest.raises(UserError, match=f"can take 1 to {most}$"):
            plan_of(config, most + 1, steps)
    assert plan_of(SamplerConfig(), 2) == nuts_plan(6, 2 / 3, 1 / 2)
    assert len(plan_of(SamplerConfig(plan="ddpm", steps=3), 7)) == 7
    with pytest.raises(UserError, match=r"^t_max 1\.5 is outside 0\.\.1: use a fraction of the noise range$"):
        t_max_step(6, 1.5)


def test_flags_change_a_plan():
    """The model's own timesteps stand for no change; `steps` alone is NUTS' S, and beside other flags its T."""
    own = SamplerConfig(plan="nuts", steps=6, t_max=2 / 3, t_min=2 / 3, timesteps=[[900, -1, "x0"]])
    assert [step.t for step in changed_plan(own, {})] == [900]
    assert changed_plan(own, {"steps": 2}) == plan_of(own, 2) and len(plan_of(own, 2)) == 2
    assert changed_plan(own, {"t_min": 0.5}) == nuts_plan(6, 2 / 3, 0.5)
    assert changed_plan(own, {"steps": 12, "t_min": 0.5}) == nuts_plan(12, 2 / 3, 0.5)
    assert changed_plan(own, {"plan": "ddpm", "steps": 3}) == ddpm_plan(3)
    for flag in ("t_max", "t_min"):
        with pytest.raises(UserError, match="^--t-max and --t-min belong to the plan nuts: add --plan nuts or leave"):
            changed_plan(replace(own, plan="ddpm"), {flag: 0.5})
    assert changed_plan(replace(own, plan="ddpm"), {"plan": "nuts", "t_min": 0.5}) == nuts_plan(6, 2 / 3, 0.5)


def test_a_schedule_of_another_length_is_heeded_everywhere():
    """100 training steps: the grid of six ends at 99, two thirds are 66; defaults are (6, 2/3, 1/2), trailing."""
    assert [tuple(step) for step in nuts_plan(train_steps=100)] == [(99, 66, "renoise"), (66, -1, "x0")]
    assert (t_max_step(), t_max_step(train_steps=100)) == (666, 66)
    assert sampler_plan(SamplerConfig(), 100) == nuts_plan(train_steps=100)
    assert [step.t for step in sampler_plan(SamplerConfig(plan="ddpm", steps=3), 100)] == [99, 50, 0]
    assert plan_of(SamplerConfig(), 2, 100) == nuts_plan(train_steps=100)
    assert [step.t for step in plan_of(SamplerConfig(plan="ddpm"), 3, 100)] == [99, 50, 0]
    assert with_plan(SamplerConfig(), 100).timesteps == [[99, 66, "renoise"], [66, -1, "x0"]]
    with pytest.raises(UserError, match="timestep 999 is outside 0..99"):
        sampler_plan(SamplerConfig(timesteps=[[999, -1, "x0"]]), 100)
