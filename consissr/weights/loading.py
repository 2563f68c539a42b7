"""The parts of a model, from its folder and its base model: what a `Restorer` is made of."""

from __future__ import annotations

from typing import Any

import torch

from consissr.config.loading import changed, check_word
from consissr.diffusion.schedule import Schedule, alpha_bar
from consissr.models.denoiser import Denoiser
from consissr.weights import files
from consissr.weights.base import load_base
from consissr.weights.folder import load_controlnet, load_image_prompt, load_prompts, load_unet_additions
from consissr.weights.latents import load_latents

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(precision: str, device: str | torch.device) -> str:
    """A key of PRECISIONS; 'auto' is bf16 on GPUs that compute it (fp16 on older ones), fp32 on the CPU.

    UserError for another word.
    """
    check_word(precision, ("auto", *PRECISIONS), "precision")
    if precision != "auto":
        return precision
    if torch.device(device).type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def load_parts(name: str, base: str | None, dtype: torch.dtype, **settings: Any) -> dict[str, Any]:
    """The arguments of Restorer from a model folder and its base model: networks as `dtype`, on the CPU.

    settings: fields of SamplerConfig, in place of the folder's. Its prompts are encoded here.
    """
    folder = files.find_model(name)
    config = files.read_config(folder)
    sampler, prompts = changed(config.sampler, settings), load_prompts(folder)
    wanted = (sampler.positive, sampler.negative) if prompts is None else ()
    parts = load_base(base or files.base_of(folder, config), dtype, config.model.base_sha256, wanted)
    load_unet_additions(folder, parts.unet, config)
    controlnet = load_controlnet(folder, config, dtype)
    table, tuned = alpha_bar(*parts.betas), (folder / "vae").is_dir()
    return {
        "latents": load_latents(folder / "vae", parts.latents, dtype) if tuned else parts.latents,
        "denoiser": Denoiser(parts.unet, controlnet, table, parts.prediction_type, residual=config.model.residual),
        "image_prompt": load_image_prompt(folder, config, dtype),
        "schedule": Schedule(table),
        "prompts": parts.prompts if prompts is None else prompts,
        "hint_latents": load_latents(folder / "hint_vae", dtype=dtype) if (folder / "hint_vae").is_dir() else None,
        "sampler": sampler,
    }
