"""Readers of what CCSR's authors published: v2 (diffusers folders) and v1 (one file in LDM naming)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from consissr.config.folder import FolderConfig
from consissr.config.model import ModelConfig
from consissr.config.sampler import SamplerConfig
from consissr.diffusion.plans import grid
from consissr.diffusion.schedule import CLEAN
from consissr.errors import UserError
from consissr.models.controlnet import empty_controlnet
from consissr.models.surgery import replace_blocks
from consissr.models.vae.latents import Latents
from consissr.weights import ldm
from consissr.weights.base import schedule_of
from consissr.weights.files import read_json, read_network, read_weights
from consissr.weights.from_ldm import (
    drop_training,
    read_controlnet,
    read_hint_encoder,
    read_latents,
    read_text,
    read_unet,
)
from consissr.weights.ldm import KeyReport, State
from consissr.weights.model import Released
from consissr.weights.names import published

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel

HINT = "condition_conv_in"
"""CCSR v2's name of the hint convolution."""

MODEL = ModelConfig(hint="conv")
"""What CCSR's ControlNet has: the hint convolution and nothing else."""


def jump(times: Sequence[int]) -> list[list[int | str]]:
    """The plan of one evaluation at 999, a jump to the first of `times`, and DDPM steps to the x0 of the last."""
    steps = [[t, t_next, "step"] for t, t_next in pairwise(times)]
    return [[999, times[0], "renoise"], *steps, [times[-1], CLEAN, "x0"]]


AS_RELEASED_V2 = SamplerConfig(**published()["ccsr-v2"].sampler, timesteps=jump([499]))
"""How the authors sample with v2 in two steps, by the README's command without tiles (one step: steps 1, t_min 0,
guidance 1)."""

AS_RELEASED_V1 = SamplerConfig(**published()["ccsr-v1"].sampler, timesteps=jump(grid(45, "linspace")[29:14:-1]))
"""How the authors sample with v1, in 16 evaluations."""


def is_v2(source: Path) -> bool:
    """Whether `source` is a folder with CCSR v2's ControlNet in it."""
    config = source / "controlnet" / "config.json"
    return config.is_file() and "use_vae_encode_condition" in read_json(config)


def is_v1(state: State) -> bool:
    """Whether the keys are CCSR v1's: a ControlNet whose first convolution takes latent and hint together."""
    first = state.get("control_model.input_blocks.0.0.weight")
    plain = state.get("model.diffusion_model.input_blocks.0.0.weight")
    return first is not None and plain is not None and first.shape[1] == 2 * plain.shape[1]


def read_v2(source: str | Path, with_base: bool = True, dtype: torch.dtype | None = torch.float32) -> Released:
    """A folder with controlnet/, and vae/, unet/ and scheduler/ where they are there, in diffusers 0.21's layout.

    with_base: whether unet/ and scheduler/ are read. dtype: of the networks; None: as stored. UserError for a folder
    that is not CCSR v2's, a damaged file, keys that don't fit or another kind of schedule.
    """
    from diffusers import AutoencoderKL

    source = Path(source)
    if not is_v2(source):
        raise UserError(f"{source} is not CCSR v2's: it needs controlnet/config.json with use_vae_encode_condition")
    vae, base = source / "vae", with_base and (source / "unet").is_dir()
    model = Released(
        kind="CCSR v2",
        config=FolderConfig(model=MODEL, sampler=AS_RELEASED_V2),
        controlnet=read_v2_controlnet(source / "controlnet", dtype),
        unet=read_network(source / "unet", empty_unet, dtype) if base else None,
        latents=Latents(read_network(vae, AutoencoderKL.from_config, dtype)) if vae.is_dir() else None,
        decoder="own" if vae.is_dir() else "base",
    )
    scheduler = source / "scheduler" / "scheduler_config.json"
    if with_base and scheduler.is_file():
        # The release trains and takes its first step as if the UNet predicted noise, whatever is said here; only a
        # model of someone else's may mean more by it.
        model.betas, model.prediction_type = schedule_of(scheduler)
    networks = {"controlnet": model.controlnet, "unet": model.unet, "vae": model.latents}
    model.report.used |= {name: len(n.state_dict()) for name, n in networks.items() if n is not None}
    return model


def read_v2_controlnet(folder: Path, dtype: torch.dtype | None) -> ControlNetModel:
    """The ControlNet; its hint convolution moves to our name."""
    if not read_json(folder / "config.json")["use_vae_encode_condition"]:
        raise UserError(
            f"{folder} was made for pixel hints (use_vae_encode_condition is false): give CCSR v2's ControlNet"
        )

    def empty(settings: dict[str, Any]) -> ControlNetModel:
        return empty_controlnet({n: s for n, s in settings.items() if n != "use_vae_encode_condition"}, MODEL)

    return read_network(folder, empty, dtype, names={HINT: "controlnet_cond_embedding.0"})


def empty_unet(settings: dict[str, Any]) -> UNet2DConditionModel:
    """The base's UNet, with our blocks."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(settings)
    replace_blocks(unet, MODEL)
    return unet


def read_v1(
    source: str | Path | State, heads: Sequence[int] | None = None, dtype: torch.dtype | None = torch.float32
) -> Released:
    """v1's single file, or its state dict, with networks as `dtype` (None: as stored).

    heads: attention heads per level, if not 64 wide as in SD2.1.

    The ControlNet's first convolution over [z_t, hint] becomes two: one on z_t, which keeps the bias, and the hint's.
    """
    state = dict(source) if isinstance(source, dict) else read_weights(source)
    if not is_v1(state):
        raise UserError("the checkpoint is not CCSR v1's: its ControlNet does not take latent and hint together")
    report = KeyReport(dtype)
    drop_training(state, report)
    unet, _ = read_unet(ldm.split_off(state, "model.diffusion_model."), report, heads)
    control = split_first(ldm.split_off(state, "control_model."))
    controlnet = read_controlnet(control, unet, MODEL, report)
    latents = read_latents(ldm.split_off(state, "first_stage_model."), report)
    encoder = ldm.split_off(state, "cond_encoder.")
    text = read_text(ldm.split_off(state, "cond_stage_model.model."), report)
    ldm.refuse_rest(state, "CCSR v1's")
    return Released(
        kind="CCSR v1",
        config=FolderConfig(model=MODEL, sampler=AS_RELEASED_V1),
        controlnet=controlnet,
        unet=unet,
        latents=latents,
        decoder="own",
        hint_latents=read_hint_encoder(encoder, latents, report) if encoder else None,
        text=text,
        report=report,
    )


def split_first(state: State) -> State:
    """The first convolution over [z_t, hint] as two whose outputs add up to its output."""
    weight = ldm.require(state, "input_blocks.0.0.weight")
    on_latent, on_hint = weight.chunk(2, dim=1)
    hint = {"input_hint_block.0.weight": on_hint, "input_hint_block.0.bias": on_hint.new_zeros(weight.shape[0])}
    return state | hint | {"input_blocks.0.0.weight": on_latent}
