"""The authors' checkpoints as model folders: which release a source is, and its parts in this project's layout."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from consissr.config.sampler import SamplerConfig
from consissr.errors import UserError

if TYPE_CHECKING:
    from consissr.weights.released import Released

log = logging.getLogger(__name__)


def read(source: Path, clip: Path | None) -> Released:
    """The authors' model in a file or folder, through the reader that knows it. `clip`: open_clip's model config."""
    from ccsr import released as ccsr
    from consissr.weights import ldm
    from consissr.weights import released as consissr

    if source.is_dir():
        return ccsr.read_v2(source)
    state = ldm.read_state(source)
    if consissr.is_released(state):
        return consissr.read(state, None if clip is None else json.loads(clip.read_text()))
    if ccsr.is_v1(state):
        return ccsr.read_v1(state)
    raise UserError(
        f"{source} is neither ConsisSR's nor CCSR's: its first key is '{next(iter(state))}'; give a file of theirs"
    )


def runnable(found: Released, base: str) -> SamplerConfig:
    """The release's SamplerConfig; without prompts and guidance where an own base has no text encoder for them."""
    sampler = found.config.sampler
    if base != "./base" or found.text is not None or sampler.guidance == 1:
        return sampler
    log.warning("no text encoder in the source: its own base has no prompts, no guidance; name a base to keep them")
    return replace(sampler, positive="", negative="", guidance=1.0, first_prompt="positive")


def write(found: Released, target: Path, name: str, base: str, half: bool) -> None:
    """The model folder: networks, configuration with its plan, prompts that only this model's text encoder knows."""
    import torch

    from ccsr.timesteps import with_plan
    from consissr.weights.folder import save_base, save_model

    dtype = torch.float16 if half else None
    if base == "own":
        if found.unet is None or found.latents is None:
            raise UserError("--base own: the source has no UNet or autoencoder of its own; name a base instead")
        base = "./base"
        save_base(target / "base", found, dtype)
    sampler = runnable(found, base)
    if found.text is not None:
        wanted = dict.fromkeys([sampler.positive, sampler.negative, ""])
        found.prompts, found.own_prompts = {prompt: found.text.encode([prompt]) for prompt in wanted}, True
    found.config = replace(found.config, model=replace(found.config.model, base=base), sampler=with_plan(sampler))
    card = f"# {name}\n\nConverted from {found.kind} as its authors published it; weights under their licence.\n"
    save_model(target, found, dtype, card)
