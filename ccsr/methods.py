"""The ways of sampling that `scripts/bench.py` measures: both systems as released, on our timestep grid.

Under guidance the posterior's mode is taken, so that encoding the image once or twice gives the same latent.
"""

from __future__ import annotations

from ccsr.timesteps import nuts_plan
from consissr.bench.models import Method
from consissr.diffusion.plans import ddpm_plan

PROMPTS = {
    "positive": "clean, high-resolution, 8k",
    "negative": "blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed",
}
CCSR = {"start": "lq", "posterior": "sample"}
GUIDED = {"start": "lq", "guidance": 4.5, "first_prompt": "negative"} | PROMPTS
CONSISSR = {"plan": "ddpm", "start": "noise", "guidance": 5.0, "first_prompt": "guided"} | PROMPTS


def method(name: str, steps: int) -> Method:
    """'ccsr-1', 'ccsr-2', 'ccsr-2-guided' (evaluations), or 'consissr' with `steps` evaluations instead of its 50."""
    if name == "consissr":
        return Method(name, "consissr", ddpm_plan(steps), CONSISSR, sequential=True)
    plan = nuts_plan(1) if name == "ccsr-1" else nuts_plan(6, 2 / 3, 0.5)
    return Method(name, "ccsr", plan, GUIDED if name == "ccsr-2-guided" else CCSR)
