"""Networks from checkpoints in latent-diffusion naming: UNet, ControlNet, autoencoder, text tower; the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from consissr.config.model import ModelConfig
from consissr.diffusion.schedule import alpha_bar
from consissr.errors import UserError
from consissr.models.controlnet import empty_controlnet
from consissr.models.surgery import replace_blocks
from consissr.models.text import OpenClipText
from consissr.models.vae.latents import Latents
from consissr.weights import ldm
from consissr.weights.files import read_weights
from consissr.weights.ldm import KeyReport, State

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel

SCHEDULE = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "lvlb_weights",
)  # fmt: skip
"""Tables that the authors' files carry and that follow from the noise schedule."""

UNUSED = ("model_ema.", "loss.", "first_stage_model.loss.", "decoder_loss.")
"""Prefixes of what training leaves in a file and nobody samples with."""

SCHEDULE_TOLERANCE = 3e-3
"""Two tables of alpha_bar are one schedule up to this: half-precision files round theirs by 2e-3 at most."""


def read_base(
    path: Path, dtype: torch.dtype = torch.float32
) -> tuple[UNet2DConditionModel, Latents, OpenClipText | None, KeyReport]:
    """A Stable Diffusion 2 base in one file: UNet, autoencoder and text tower, as `dtype` on the CPU.

    Nothing stored in the file runs, nothing is downloaded. UserError for a file of another kind or with unknown keys.
    """
    state, report = read_weights(path), KeyReport(dtype)
    if "model.diffusion_model.input_blocks.0.0.weight" not in state:
        raise UserError(f"{path} is no Stable Diffusion base: it lacks model.diffusion_model.input_blocks.0.0.weight")
    drop_training(state, report)
    unet, model = read_unet(ldm.split_off(state, "model.diffusion_model."), report)
    latents = read_latents(ldm.split_off(state, "first_stage_model."), report)
    text = read_text(ldm.split_off(state, "cond_stage_model.model."), report)
    if state or model.position_embedding or model.transposed_attention or model.image_prompt != "none":
        name = next(iter(state), "ConsisSR's additions in the UNet")
        raise UserError(f"{path} is no Stable Diffusion 2 base: it has {name}; convert models with consissr-convert")
    return unet, latents, text, report


def drop_training(state: State, report: KeyReport) -> None:
    """Removes what only training needs: tables of the noise schedule, losses, averages. None of it has to be there.

    UserError where the tables are not Stable Diffusion's.
    """
    names = [name for name in state if name.removesuffix("_inter") in SCHEDULE]
    tables = {name: state.pop(name) for name in names}
    report.ignored["tables of the noise schedule"] = names
    stored, known = tables.get("alphas_cumprod"), alpha_bar()
    if stored is not None and (
        stored.shape != known.shape or (stored.double() - known).abs().max() > SCHEDULE_TOLERANCE
    ):
        raise UserError("the checkpoint was trained with another noise schedule than Stable Diffusion's")
    for prefix in UNUSED:
        report.ignored[f"training's own ({prefix}*)"] = list(ldm.split_off(state, prefix))


def read_unet(
    state: State, report: KeyReport, heads: Sequence[int] | None = None
) -> tuple[UNet2DConditionModel, ModelConfig]:
    """The UNet with ConsisSR's additions where the weights have them, and what those are; `heads`: per level."""
    from diffusers import UNet2DConditionModel

    _, levels = ldm.encoder_pairs(state)
    config = ldm.network_config(state, levels, heads)
    config["out_channels"] = ldm.require(state, "out.2.weight").shape[0]
    config["up_block_types"] = tuple(kind.replace("Down", "Up") for kind in reversed(config["down_block_types"]))
    model = additions(state, levels)
    if model.position_embedding:
        config["sample_size"] = model.position_embedding
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        replace_blocks(unet, model)
    report.load(unet, unet_names(state), "unet")
    return unet.eval(), model


def unet_names(state: State) -> State:
    """A UNet's weights under diffusers' names and ours."""
    pairs, levels = ldm.encoder_pairs(state)
    return ldm.rename(state, pairs | ldm.decoder_pairs(state, levels), ldm.RESNET)


def additions(state: State, levels: list[ldm.Level]) -> ModelConfig:
    """Which of ConsisSR's additions a UNet's weights have."""
    depth, level = next((i, level) for i, level in enumerate(levels) if level.transformer)
    block = f"{level.transformer}.transformer_blocks.0"
    positions = state.get(f"{block}.attn1.position_emb")
    side = 0 if positions is None else isqrt(positions.shape[0])
    hpa = f"{block}.attn2.to_out_ip.0.weight" in state
    return ModelConfig(
        hint="stack",
        position_embedding=side * 2**depth,
        transposed_attention=f"{block}.attnT.to_qkv.weight" in state,
        image_prompt="hpa" if hpa else "none",
        image_kv="separate" if f"{block}.attn2.to_v_ip.weight" in state else "shared",
        image_tokens="pooled",
        adapter_init="as_released",
    )


def read_controlnet(state: State, unet: UNet2DConditionModel, model: ModelConfig, report: KeyReport) -> ControlNetModel:
    """The ControlNet of the same sizes as `unet`."""
    from diffusers import ControlNetModel

    with torch.device("meta"):
        stock = ControlNetModel.from_unet(
            unet, load_weights_from_unet=False, conditioning_channels=unet.config.in_channels
        )
        controlnet = empty_controlnet(stock.config, model)
    report.load(controlnet, controlnet_names(state), "controlnet")
    return controlnet.eval()


def controlnet_names(state: State) -> State:
    """A ControlNet's weights under diffusers' names and ours."""
    pairs, _ = ldm.encoder_pairs(state)
    pairs["middle_block_out.0"] = "controlnet_mid_block"
    pairs["input_hint_block"] = "controlnet_cond_embedding"
    for index in range(ldm.indices(state, "zero_convs")):
        pairs[f"zero_convs.{index}.0"] = f"controlnet_down_blocks.{index}"
    return ldm.rename(state, pairs, ldm.RESNET)


def read_latents(state: State, report: KeyReport) -> Latents:
    """The autoencoder."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**ldm.vae_config(state))
    report.load(vae, ldm.vae_names(state), "vae")
    return Latents(vae.eval())


def read_hint_encoder(state: State, latents: Latents, report: KeyReport) -> Latents | None:
    """The encoder of the hint, where the file's copy of the autoencoder's differs from it."""
    from diffusers import AutoencoderKL

    names = ldm.vae_names(state)
    own = latents.vae.state_dict()
    if names.keys() == {n for n in own if n.startswith(("encoder.", "quant_conv."))} and all(
        torch.equal(own[name].float(), tensor.float()) for name, tensor in names.items()
    ):
        report.ignored["hint encoder, equal to the autoencoder's"] = list(state)
        return None
    with torch.device("meta"):
        vae = AutoencoderKL(**latents.vae.config)
    vae.decoder, vae.post_quant_conv = latents.vae.decoder, latents.vae.post_quant_conv
    decoder = {name: tensor for name, tensor in own.items() if name not in names}
    report.load(vae, names | decoder, "hint encoder")
    report.used["hint encoder"] = len(names)
    return Latents(vae.eval())


def read_text(state: State, report: KeyReport) -> OpenClipText | None:
    """The text tower, where the file has one, in float32: it runs on the CPU."""
    if not state:
        return None
    from open_clip.transformer import TextTransformer

    unused = [name for name in state if name in ("logit_scale", "attn_mask") or name.startswith("visual.")]
    report.ignored["CLIP's temperature, mask and image tower"] = unused
    state = {name: tensor for name, tensor in state.items() if name not in unused}
    length, width = ldm.require(state, "positional_embedding").shape
    state.setdefault("text_projection", torch.zeros(width, width))  # not read: only pooled features are projected
    with torch.device("meta"):
        tower = TextTransformer(
            length,
            ldm.require(state, "token_embedding.weight").shape[0],
            width,
            heads=max(width // 64, 1),
            layers=ldm.indices(state, "transformer.resblocks"),
            output_dim=ldm.require(state, "text_projection").shape[1],
        )
    report.load(tower, state, "text")
    return OpenClipText(tower).float().eval()
