"""Non-uniform timestep sampling (Sec. III-B, CCSR): the plan for (T, t_max, t_min).

One evaluation at the noisiest timestep (999) gives x0_from_T; it is re-noised to t_max; uniform steps follow towards
t_min; x0 of the last evaluated step is the result. With k(f) = round(T f), the evaluations after 999 are grid steps
k(t_max), ..., k(t_min) + 1: S = (t_max - t_min) T + 1 in all (Sec. III-D), one fewer where t_max is 1 (there is no
jump). So t_min itself is not evaluated, nor is it in CCSR v1 and v2: with it, "the estimated result from x_tmin"
(Sec. III-B), there would be one more than the paper's S.
"""

from dataclasses import replace
from typing import Any

from consissr.config.sampler import SamplerConfig
from consissr.diffusion.plans import Step, check_plan, ddpm_plan, descend, grid
from consissr.diffusion.schedule import CLEAN
from consissr.errors import UserError


def nuts_plan(
    T: int = 6,
    t_max: float = 2 / 3,
    t_min: float = 0.5,
    grid_spacing: str = "trailing",
    train_steps: int = 1000,
) -> list[Step]:
    """The plan of (T, t_max, t_min), e.g. (6, 2/3, 1/2) evaluates {999, 666}, or {999, 499} on the `leading` grid.

    T: steps of the uniform grid, 1..train_steps. 0 <= t_min <= t_max <= 1. One evaluation (S = 1) when T is 1 or t_max
    and t_min fall on the same grid step. When t_max is 1 or falls on the noisiest timestep itself there is no jump:
    plain uniform steps from there (on the `leading` grid their first lies below 999, as in CCSR v2). Raises UserError
    naming the value that breaks a rule.
    """
    times = grid(T, grid_spacing, train_steps)
    k_max, k_min = _grid_step(T, t_max, "t_max"), _grid_step(T, t_min, "t_min")
    if t_min > t_max:
        raise UserError(f"t_min {t_min:g} lies above t_max {t_max:g}; need 0 <= t_min <= t_max <= 1")
    if T == 1 or k_max == k_min:
        return [Step(train_steps - 1, CLEAN, "x0")]
    uniform = descend(reversed(times[k_min:k_max]))
    if t_max == 1 or uniform[0].t == train_steps - 1:
        return uniform
    return [Step(train_steps - 1, uniform[0].t, "renoise"), *uniform]


def t_max_step(T: int = 6, t_max: float = 2 / 3, grid_spacing: str = "trailing", train_steps: int = 1000) -> int:
    """The timestep that x0_from_T is re-noised to: what training must use to agree with sampling at (T, t_max)."""
    k = _grid_step(T, t_max, "t_max")
    if k == 0:
        raise UserError(f"t_max {t_max:g} falls below the first of {T} grid steps; raise t_max or T")
    return grid(T, grid_spacing, train_steps)[k - 1]


def sampler_plan(config: SamplerConfig, train_steps: int = 1000) -> list[Step]:
    """The plan that a sampler configuration describes: its explicit `timesteps`, else by `plan`."""
    if config.timesteps:
        return check_plan(config.timesteps, train_steps)
    if config.plan == "ddpm":
        return ddpm_plan(config.steps, train_steps)
    return nuts_plan(config.steps, config.t_max, config.t_min, config.grid, train_steps)


def plan_of(config: SamplerConfig, evaluations: int, train_steps: int = 1000) -> list[Step]:
    """The plan of a sampler configuration with S = `evaluations`: NUTS keeps T and t_max, and takes the t_min that S
    asks for; spaced DDPM takes that many steps. Raises UserError where the grid has no room for them."""
    if config.plan == "ddpm":
        return ddpm_plan(evaluations, train_steps)
    k_max = _grid_step(config.steps, config.t_max, "t_max")
    jump = config.t_max != 1 and grid(config.steps, config.grid, train_steps)[k_max - 1] != train_steps - 1
    most = k_max + (jump or k_max == 0)  # without a jump, the noisiest timestep is a step of the grid
    if not 1 <= evaluations <= most:
        raise UserError(f"{evaluations} steps: this model can take 1 to {most}")
    t_min = min((most - evaluations) / config.steps, config.t_max)
    return nuts_plan(config.steps, config.t_max, t_min, config.grid, train_steps)


def changed_plan(config: SamplerConfig, changes: dict[str, Any]) -> list[Step]:
    """The plan of a sampler configuration under `changes` of plan, steps, t_max and t_min, over its own timesteps.

    Of NUTS, `steps` alone is S. Raises UserError where t_max or t_min is given for another plan.
    """
    if config.plan == "nuts" and changes.keys() == {"steps"}:
        return plan_of(config, changes["steps"])
    config = replace(config, **({"timesteps": []} | changes if changes else {}))
    if config.plan != "nuts" and changes.keys() & {"t_max", "t_min"}:
        raise UserError("--t-max and --t-min belong to the plan nuts: add --plan nuts or leave them out")
    return sampler_plan(config)


def with_plan(config: SamplerConfig, train_steps: int = 1000) -> SamplerConfig:
    """The configuration with its plan written out, as model folders store it: sampling then needs no NUTS rules."""
    return replace(config, timesteps=[list(step) for step in sampler_plan(config, train_steps)])


def _grid_step(T: int, fraction: float, name: str) -> int:
    """k(f) = round(T f), half to even as in CCSR v1 and v2."""
    if not 0 <= fraction <= 1:
        raise UserError(f"{name} {fraction:g} is outside 0..1: use a fraction of the noise range")
    return round(T * fraction)
