"""What `scripts/bench.py` measures: both systems' ways of sampling as released, on our timestep grid, and their stages.

Under guidance the posterior's mode is taken, so that encoding the image once or twice gives the same latent.
"""

from pathlib import Path
from typing import Any

from ccsr.timesteps import nuts_plan
from consissr.bench.models import SamplingMethod
from consissr.config.sampler import SamplerConfig
from consissr.diffusion.plans import ddpm_plan
from consissr.weights.released_ccsr import AS_RELEASED_V2
from consissr.weights.released_consissr import AS_RELEASED


def guidance(sampler: SamplerConfig) -> dict[str, Any]:
    """The settings of `sampler` that say how text guides it."""
    return {name: getattr(sampler, name) for name in ("start", "guidance", "positive", "negative", "first_prompt")}


CCSR = {"start": AS_RELEASED_V2.start, "posterior": AS_RELEASED_V2.posterior}
GUIDED = guidance(AS_RELEASED_V2)
CONSISSR = guidance(AS_RELEASED) | {"plan": "ddpm", "first_prompt": "guided"}


def method(name: str, steps: int) -> SamplingMethod:
    """'ccsr-1', 'ccsr-2', 'ccsr-2-guided' (evaluations), or 'consissr' with `steps` evaluations instead of its 50."""
    if name == "consissr":
        return SamplingMethod(name, "consissr", ddpm_plan(steps), CONSISSR, sequential=True)
    two = nuts_plan(6, 2 / 3, 0.5)
    known = {"ccsr-1": (nuts_plan(1), CCSR), "ccsr-2": (two, CCSR), "ccsr-2-guided": (two, GUIDED)}
    return SamplingMethod(name, "ccsr", *known[name])


def stages(configs: Path) -> dict[str, tuple[str, Any]]:
    """(config file, class) of every training stage by its name; `configs`: the repository's folder of that name."""
    from ccsr.deft import Deft
    from ccsr.nuts import Nuts
    from consissr.training.rclip import Rclip
    from consissr.training.tala import Tala

    named = {
        "nuts": ("ccsr/nuts.yaml", Nuts),
        "tala": ("consissr/tala.yaml", Tala),
        "deft": ("ccsr/deft.yaml", Deft),
        "rclip": ("consissr/rclip.yaml", Rclip),
        "hybrid": ("hybrid/nuts_hpa_tala.yaml", Nuts),
    }
    return {name: (str(configs / file), builder) for name, (file, builder) in named.items()}
