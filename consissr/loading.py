"""The parts of a model, from its folder and its base model: what a `Restorer` is made of."""

from __future__ import annotations

from typing import Any

import torch

from consissr import checkpoint
from consissr.diffusion.schedule import Schedule, alpha_bar
from consissr.models.base import load_base
from consissr.models.denoiser import Denoiser
from consissr.models.folder import load_controlnet, load_image_prompt, load_prompts, load_unet_additions
from consissr.models.latents import load_latents


def load_parts(name: str, base: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of Restorer from a model folder and its base model."""
    folder = checkpoint.find_model(name)
    config = checkpoint.read_config(folder)
    prompts = load_prompts(folder)
    parts = load_base(base or config.model.base, dtype, config.model.base_sha256, text=prompts is None)
    load_unet_additions(folder, parts.unet, config)
    table = alpha_bar(*parts.betas)
    return {
        "latents": load_latents(folder / "vae", parts.latents) if (folder / "vae").is_dir() else parts.latents,
        "denoiser": Denoiser(
            parts.unet, load_controlnet(folder, config), table, parts.prediction_type, residual=config.model.residual
        ),
        "image_prompt": load_image_prompt(folder, config),
        "schedule": Schedule(table),
        "prompts": parts.text if prompts is None else prompts,
        "hint_latents": load_latents(folder / "hint_vae") if (folder / "hint_vae").is_dir() else None,
        "sampler": config.sampler,
    }
