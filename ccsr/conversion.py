"""The authors' checkpoints as model folders: which release a source is, and its parts in this project's layout."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from consissr.errors import UserError

log = logging.getLogger(__name__)


def read(source: Path, clip: Path | None) -> tuple[str, Any]:
    """What the source is, and its parts through the reader that knows it. `clip`: open_clip's model config."""
    from ccsr import released as ccsr
    from consissr.weights import ldm
    from consissr.weights import released as consissr

    if source.is_dir():
        return "CCSR v2", ccsr.read_v2(source)
    state = ldm.read_state(source)
    if consissr.is_released(state):
        found = consissr.read(state, None if clip is None else json.loads(clip.read_text()))
        return ("ConsisSR" if found.stage == "tala" else "ConsisSR's first stage (RCLIP)"), found
    if ccsr.is_v1(state):
        return "CCSR v1", ccsr.read_v1(state)
    raise UserError(
        f"{source} is neither ConsisSR's nor CCSR's: its first key is '{next(iter(state))}'; give a file of theirs"
    )


def runnable(found: Any, base: str) -> Any:
    """The release's SamplerConfig; without prompts and guidance where an own base has no text encoder for them."""
    if base != "./base" or found.text is not None or found.sampler.guidance == 1:
        return found.sampler
    log.warning("no text encoder in the source: its own base has no prompts, no guidance; name a base to keep them")
    return replace(found.sampler, positive="", negative="", guidance=1.0, first_prompt="positive")


def write(kind: str, found: Any, target: Path, name: str, base: str, half: bool) -> None:
    """The model folder: parts, configuration with its plan, prompts that only this model's text encoder knows."""
    import torch

    from ccsr.timesteps import with_plan
    from consissr.config.folder import FolderConfig
    from consissr.models.image_prompt import prompt_config
    from consissr.weights.folder import save_base, save_model, save_prompts
    from consissr.weights.latents import save_latents

    dtype = torch.float16 if half else None
    if base == "own":
        if found.unet is None or found.latents is None:
            raise UserError("--base own: the source has no UNet or autoencoder of its own; name a base instead")
        base = "./base"
        said = (found.betas, found.prediction_type) if kind.startswith("CCSR") else ()
        save_base(target / "base", found.unet, found.latents, dtype, *said)
    prompt = getattr(found, "image_prompt", None)
    sampler = runnable(found, base)
    config = FolderConfig(model=replace(found.model, base=base), sampler=with_plan(sampler))
    save_model(
        target,
        config,
        found.controlnet,
        unet=found.unet,
        latents=found.latents,
        image_prompt=prompt,
        image_settings=None if prompt is None else prompt_config(prompt),
        card=f"# {name}\n\nConverted from {kind} as its authors published it; weights under their licence.\n",
        dtype=dtype,
    )
    if found.hint_latents is not None and found.hint_latents is not found.latents:
        save_latents(target / "hint_vae", found.hint_latents, dtype)
    if found.text is not None:
        save_prompts(target, found.text, [found.sampler.positive, found.sampler.negative, ""])
