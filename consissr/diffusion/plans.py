"""Sampling plans: which timesteps are evaluated, and what follows each evaluation.

A plan is a list of `Step(t, t_next, kind)`. The network estimates the clean latent x0 at timestep t; then
`step` draws the DDPM posterior at t_next, `renoise` adds fresh noise to x0 up to t_next, and `x0` (always and only the
last) returns x0. Plans are stored in a model folder's configuration as lists `[t, t_next, kind]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from consissr.diffusion.schedule import CLEAN
from consissr.errors import UserError

KINDS = ("step", "renoise", "x0")
GRIDS = ("trailing", "leading", "linspace")


class Step(NamedTuple):
    """Evaluate the network at t, then go to t_next by `kind`; t_next is CLEAN (-1) for kind x0."""

    t: int
    t_next: int
    kind: str


def grid(steps: int, spacing: str = "trailing", T: int = 1000) -> list[int]:
    """`steps` timesteps out of 0..T-1, ascending; entry k-1 is the k-th grid step, k = 1..steps.

    `trailing`  round(T k / steps) - 1: ends at T-1 (ours)
    `leading`   (k - 1) (T // steps) + 1: starts at 1 (CCSR v2, diffusers' default for SD2.1)
    `linspace`  0 to T-1 in equal strides accumulated in floating point (ConsisSR's release, CCSR v1); one step is T-1
    """
    if spacing not in GRIDS:
        raise UserError(f"timestep grid {spacing!r} is unknown; choose one of {', '.join(GRIDS)}")
    if isinstance(steps, bool) or int(steps) != steps or not 1 <= steps <= T:
        raise UserError(f"{steps} sampling steps: use a whole number from 1 to {T}")
    steps = int(steps)
    if spacing == "trailing":
        return [round(T * k / steps) - 1 for k in range(1, steps + 1)]
    if spacing == "leading":
        times = [k * (T // steps) + 1 for k in range(steps)]
        if times[-1] >= T:
            raise UserError(f"{steps} steps on the leading grid reach timestep {times[-1]}; use at most {T - 1}")
        return times
    if steps == 1:
        return [T - 1]
    times, at = [], 0.0
    for _ in range(steps):
        times.append(round(at))
        at += (T - 1) / (steps - 1)
    return times


def descend(times: Iterable[int]) -> list[Step]:
    """The plan of DDPM steps through falling `times`; x0 of the last one is the result."""
    times = list(times)
    return [Step(t, n, "step") for t, n in pairwise(times)] + [Step(times[-1], CLEAN, "x0")]


def ddpm_plan(steps: int = 50, T: int = 1000) -> list[Step]:
    """Spaced DDPM over the whole range, ConsisSR's sampler: 50 steps are 999, 979, ... 20, 0."""
    return descend(reversed(grid(steps, "linspace", T)))


def check_plan(plan: Iterable[Sequence], T: int = 1000) -> list[Step]:
    """A plan from lists or Steps, its rules checked; raises UserError with the first one broken."""
    try:
        steps = [Step(int(t), int(t_next), str(kind)) for t, t_next, kind in plan]
    except (TypeError, ValueError) as error:
        raise UserError(f"a sampling plan is a list of [t, t_next, kind], not {plan!r}") from error
    if not steps or steps[-1].kind != "x0":
        raise UserError(
            "a sampling plan must end with a step of kind x0: append one, or use ddpm_plan or ccsr.nuts_plan"
        )
    for i, (t, t_next, kind) in enumerate(steps):
        if kind not in KINDS or (kind == "x0") != (i == len(steps) - 1):
            raise UserError(f"plan step {i}: kind {kind!r}; use step or renoise, and x0 for the last only")
        if not 0 <= t < T:
            raise UserError(f"plan step {i}: timestep {t} is outside 0..{T - 1}")
        if t_next != (CLEAN if kind == "x0" else steps[i + 1].t):
            raise UserError(f"plan step {i}: goes to {t_next}, but the next evaluation is elsewhere")
        if kind == "step" and t_next >= t:
            raise UserError(f"plan step {i}: a DDPM step must go down, not from {t} to {t_next}")
    return steps
