"""Grids and plans: both ends, the authors' numbers, and what bad ones get."""

import pytest

from consissr.diffusion.plans import Step, check_plan, ddpm_plan, grid
from consissr.errors import UserError


def test_grids_at_both_ends():
    assert grid(6, "trailing") == [166, 332, 499, 666, 832, 999]
    assert grid(6, "leading") == [1, 167, 333, 499, 665, 831]
    assert grid(12, "leading")[::-1] == [914, 831, 748, 665, 582, 499, 416, 333, 250, 167, 84, 1]
    assert grid(4, "linspace") == [0, 333, 666, 999]
    assert [grid(1, name) for name in ("trailing", "leading", "linspace")] == [[999], [1], [999]]
    assert grid(1000, "trailing") == list(range(1000))
    assert grid(1000, "linspace") == list(range(1000))


def test_leading_grid_refuses_to_leave_the_table():
    assert grid(500, "leading")[-1] == 999
    for steps, reached in ((1000, 1000), (7, 7)):
        T = 1000 if steps == 1000 else 7
        with pytest.raises(
            UserError, match=f"^{steps} steps on the leading grid reach timestep {reached}; .* {T - 1}$"
        ):
            grid(steps, "leading", T)


def test_unknown_grid_is_named():
    with pytest.raises(UserError, match="^timestep grid 'cosine' is unknown; .* trailing, leading, linspace$"):
        grid(6, "cosine")


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5])
def test_bad_step_counts_are_named(steps):
    with pytest.raises(UserError, match=str(steps)):
        grid(steps)


def test_spaced_ddpm_of_the_release():
    plan = ddpm_plan()
    assert plan == ddpm_plan(50) and len(plan) == 50
    assert [step.t for step in plan][:4] == [999, 979, 958, 938]
    assert plan[-1] == Step(0, -1, "x0")
    assert all(step.t_next == after.t for step, after in zip(plan, plan[1:], strict=False))
    assert check_plan([list(step) for step in plan]) == plan
    assert ddpm_plan(3, T=101) == [Step(100, 50, "step"), Step(50, 0, "step"), Step(0, -1, "x0")]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ([], "^a sampling plan must end"),
        ([[999, 499, "renoise"]], "must end"),
        ([[999, 499, "step"], [500, -1, "x0"]], "elsewhere"),
        ([[999, 499, "jump"], [499, -1, "x0"]], "jump"),
        ([[999, -1, "x0"], [499, -1, "x0"]], "x0 for the last"),
        ([[1000, -1, "x0"]], r"timestep 1000 is outside 0\.\.999$"),
        ([[499, 999, "step"], [999, -1, "x0"]], "down"),
        ([[499, 499, "step"], [499, -1, "x0"]], "down, not from 499 to 499"),
        ([[999, -1]], "list of"),
        (7, "list of"),
    ],
)
def test_broken_plans_are_named(plan, said):
    with pytest.raises(UserError, match=said):
        check_plan(plan)
