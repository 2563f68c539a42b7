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
from consissr.weights.files import build, read_json, weights_file
from consissr.weights.from_ldm import drop_training, read_latents, read_text, read_unet
from consissr.weights.ldm import Report, State
from consissr.weights.released import Released, read_controlnet, read_hint_encoder

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


AS_RELEASED_V2 = SamplerConfig(
    plan="nuts",
    timesteps=jump([499]),
    steps=6,
    t_max=2 / 3,
    t_min=1 / 2,
    grid="leading",
    start="lq",
    guidance=4.5,
    positive="clean, high-resolution, 8k",
    negative="blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed",
    first_prompt="negative",
    posterior="sample",
    posterior_rows=2,
    geometry="ccsr",
    short_side=512,
    tile=0,
)
"""How the authors sample with v2 in two steps, by the README's command without tiles (one step: steps 1, t_min 0,
guidance 1)."""

AS_RELEASED_V1 = SamplerConfig(
    plan="nuts",
    timesteps=jump(grid(45, "linspace")[29:14:-1]),
    steps=45,
    t_max=2 / 3,
    t_min=1 / 3,
    grid="linspace",
    start="noise",
    geometry="ccsr_v1",
    short_side=512,
    tile=0,
)
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


def read_v2(source: str | Path) -> Released:
    """A folder with controlnet/, and vae/, unet/ and scheduler/ where they are there, in diffusers 0.21's layout.

    UserError for a folder that is not CCSR v2's, a damaged file, keys that don't fit or another kind of schedule.
    """
    source = Path(source)
    if not is_v2(source):
        raise UserError(f"{source} is not CCSR v2's: it needs controlnet/config.json with use_vae_encode_condition")
    report = Report()
    found = Released(
        kind="CCSR v2",
        config=FolderConfig(model=MODEL, sampler=AS_RELEASED_V2),
        controlnet=read_v2_controlnet(source / "controlnet", report),
        unet=read_v2_unet(source / "unet", report) if (source / "unet").is_dir() else None,
        latents=read_v2_vae(source / "vae", report) if (source / "vae").is_dir() else None,
        report=report,
    )
    found.decoder = "base" if found.latents is None else "own"
    scheduler = source / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        # The release trains and takes its first step as if the UNet predicted noise, whatever is said here; only a
        # model of someone else's may mean more by it.
        found.betas, found.prediction_type = schedule_of(scheduler)
    return found


def read_part(folder: Path) -> tuple[dict[str, Any], State]:
    """config.json and weights of one part."""
    config = {name: value for name, value in read_json(folder / "config.json").items() if not name.startswith("_")}
    return config, ldm.read_state(weights_file(folder))


def read_v2_controlnet(folder: Path, report: Report) -> ControlNetModel:
    """The ControlNet; its hint convolution moves to our name."""
    config, state = read_part(folder)
    if not config.pop("use_vae_encode_condition"):
        raise UserError(
            f"{folder} was made for pixel hints (use_vae_encode_condition is false): give CCSR v2's ControlNet"
        )
    controlnet = build(folder / "config.json", lambda: empty_controlnet(config, MODEL))
    renamed = {
        name.replace(HINT, "controlnet_cond_embedding.0") if name.startswith(HINT) else name: tensor
        for name, tensor in state.items()
    }
    ldm.load_strict(controlnet, renamed, "controlnet", report)
    return controlnet.eval()


def read_v2_vae(folder: Path, report: Report) -> Latents:
    """The autoencoder; its attention may carry diffusers' old names."""
    from diffusers import AutoencoderKL

    config, state = read_part(folder)
    vae = build(folder / "config.json", lambda: AutoencoderKL.from_config(config))
    ldm.load_strict(vae, {ldm.modern(name): tensor for name, tensor in state.items()}, "vae", report)
    return Latents(vae.eval())


def read_v2_unet(folder: Path, report: Report) -> UNet2DConditionModel:
    """The base's UNet, where it was copied beside the ControlNet."""
    from diffusers import UNet2DConditionModel

    config, state = read_part(folder)
    unet = build(folder / "config.json", lambda: UNet2DConditionModel.from_config(config))
    with torch.device("meta"):
        replace_blocks(unet, MODEL)
    ldm.load_strict(unet, state, "unet", report)
    return unet.eval()


def read_v1(source: str | Path | State, heads: Sequence[int] | None = None) -> Released:
    """v1's single file, or its state dict. `heads`: attention heads per level, if not 64 wide as in SD2.1.

    The ControlNet's first convolution over [z_t, hint] becomes two: one on z_t, which keeps the bias, and the hint's.
    """
    state = dict(source) if isinstance(source, dict) else ldm.read_state(source)
    if not is_v1(state):
        raise UserError("the checkpoint is not CCSR v1's: its ControlNet does not take latent and hint together")
    report = Report()
    drop_training(state, report)
    unet, _ = read_unet(ldm.take(state, "model.diffusion_model."), report, heads)
    control = split_first(ldm.take(state, "control_model."))
    controlnet = read_controlnet(control, unet, MODEL, report)
    latents = read_latents(ldm.take(state, "first_stage_model."), report)
    encoder = ldm.take(state, "cond_encoder.")
    text = read_text(ldm.take(state, "cond_stage_model.model."), report)
    if state:
        name, rest = next(iter(state)), len(state) - 1
        raise UserError(f"the checkpoint has an unknown key, {name} ({rest} more): it is not CCSR v1's")
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
