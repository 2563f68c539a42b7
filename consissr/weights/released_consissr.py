"""Reader of the checkpoint that ConsisSR's authors published: one file in LDM naming with everything in it."""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from consissr.config.folder import FolderConfig
from consissr.config.sampler import SamplerConfig
from consissr.diffusion.plans import ddpm_plan
from consissr.errors import UserError
from consissr.models.image_prompt import Adapter, ImagePrompt
from consissr.models.text import OpenClipText
from consissr.weights import ldm
from consissr.weights.files import build, read_weights
from consissr.weights.from_ldm import drop_training, read_controlnet, read_hint_encoder, read_latents, read_unet
from consissr.weights.ldm import KeyReport, State
from consissr.weights.model import Released
from consissr.weights.names import published

if TYPE_CHECKING:
    from open_clip import CLIP

ADAPTER = {"0": "norm", "1": "linear_1", "4": "linear_2", "6": "linear_3"}
"""The release's layer numbers of the image adapter."""

HEAD_WIDTHS = {1280: 80}
"""CLIP tower width -> width of a head, where it isn't 64 (ViT-H-14); the weights don't show it."""

AS_RELEASED = SamplerConfig(**published()["consissr"].sampler, timesteps=[list(step) for step in ddpm_plan(50)])
"""How the authors sample."""


def is_released(state: State) -> bool:
    """Whether the keys are those of ConsisSR's release."""
    return any(name.startswith("cond_stage_model.ft_layers_4.") for name in state)


def read(
    source: str | Path | State, clip: dict[str, Any] | None = None, dtype: torch.dtype | None = torch.float32
) -> Released:
    """The authors' model from a file or a state dict, every key accounted for in `report`.

    clip: open_clip's model config (embed_dim, vision_cfg, text_cfg); without it sizes come from the weights, with
    ViT-H-14's head widths. dtype: of the networks; None: as stored. UserError for a file that is not ConsisSR's, is
    incomplete, or has keys left over.
    """
    state = dict(source) if isinstance(source, dict) else read_weights(source)
    if not is_released(state):
        raise UserError("the checkpoint is not a ConsisSR release: it has no cond_stage_model.ft_layers_4 keys")
    report = KeyReport(dtype)
    teacher = ldm.split_off(state, "cond_stage_model.model.v_fix.")
    report.ignored["teacher of the RCLIP stage"] = list(teacher)
    drop_training(state, report)
    unet, model = read_unet(ldm.split_off(state, "model.diffusion_model."), report)
    controlnet = read_controlnet(ldm.split_off(state, "control_model."), unet, model, report)
    latents = read_latents(ldm.split_off(state, "first_stage_model."), report)
    hint_latents = read_hint_encoder(ldm.split_off(state, "cond_encoder."), latents, report)
    tower = ldm.split_off(state, "cond_stage_model.model.")
    adapter = ldm.split_off(state, "cond_stage_model.ft_layers_4.")
    ldm.refuse_rest(state, "a ConsisSR release")
    encoder = read_clip(tower, clip, report)
    return Released(
        kind="ConsisSR's first stage (RCLIP)" if teacher else "ConsisSR",
        config=FolderConfig(model=model, sampler=AS_RELEASED),
        unet=unet,
        controlnet=controlnet,
        latents=latents,
        decoder="own",
        hint_latents=hint_latents,
        image_prompt=ImagePrompt(encoder.visual, read_adapter(adapter, report)).eval(),
        text=OpenClipText(encoder).float().eval(),
        report=report,
    )


def read_clip(state: State, config: dict[str, Any] | None, report: KeyReport) -> CLIP:
    """open_clip's CLIP with both towers (the image tower is the fine-tuned RCLIP)."""
    from open_clip import CLIP

    config = config or clip_config(state)
    sizes = ("vision_cfg", "text_cfg")
    clip = build("open_clip's config", lambda: CLIP(config["embed_dim"], *(dict(config[name]) for name in sizes)))
    report.load(clip, state, "clip")
    return clip.eval()


def clip_config(state: State) -> dict[str, Any]:
    """open_clip config of these CLIP weights; head widths, which weights don't show, as in ViT-H-14 (else 64)."""
    conv = ldm.require(state, "visual.conv1.weight")
    width, patch = conv.shape[0], conv.shape[2]
    grid = isqrt(ldm.require(state, "visual.positional_embedding").shape[0] - 1)
    length, text_width = ldm.require(state, "positional_embedding").shape
    return {
        "embed_dim": ldm.require(state, "visual.proj").shape[1],
        "vision_cfg": {
            "image_size": grid * patch,
            "patch_size": patch,
            "width": width,
            "layers": ldm.indices(state, "visual.transformer.resblocks"),
            "head_width": HEAD_WIDTHS.get(width, min(width, 64)),
        },
        "text_cfg": {
            "context_length": length,
            "vocab_size": ldm.require(state, "token_embedding.weight").shape[0],
            "width": text_width,
            "heads": max(text_width // 64, 1),
            "layers": ldm.indices(state, "transformer.resblocks"),
        },
    }


def read_adapter(state: State, report: KeyReport) -> Adapter:
    """The layers between the image tower and the image branch, under our names."""
    features = ldm.require(state, "0.weight").shape[0]
    width = ldm.require(state, "6.weight").shape[0]
    with torch.device("meta"):
        adapter = Adapter(features, width)
    report.load(adapter, ldm.rename(state, ADAPTER, {}), "image adapter")
    return adapter.eval()
