"""Tiny networks of Stable Diffusion's kind, with random weights."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

CHANNELS, WIDTH = 4, 24
"""Latent channels and prompt width of the tiny networks."""


@pytest.fixture
def make_unet() -> Callable[..., nn.Module]:
    """Builds a UNet with three levels, attention at two of them, 2 and 4 heads of different widths."""
    from diffusers import UNet2DConditionModel

    def make(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=(32, 64, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=(2, 4, 4),
            use_linear_projection=True,
        ).eval()

    return make


@pytest.fixture
def fill() -> Callable[[nn.Module], None]:
    """Gives the zero convolutions of a ControlNet, and the end of its hint, random weights."""

    def fill_zeros(controlnet: nn.Module) -> None:
        generator = torch.Generator().manual_seed(1)
        outputs = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
        for layer in [*outputs, controlnet.controlnet_cond_embedding[-1]]:
            layer.weight.data.normal_(std=0.1, generator=generator)

    return fill_zeros


@pytest.fixture
def to_ldm() -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Gives the weights of a UNet or ControlNet their names in latent-diffusion checkpoints."""
    return unet_to_ldm


@pytest.fixture
def vae_to_ldm() -> Callable[[str], str]:
    """The same for one name of an autoencoder with four levels."""
    return autoencoder_to_ldm


def unet_to_ldm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers -> LDM names, written independently of the reader: one layer and a down-sampler per level."""
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    inner |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    fixed = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "conv_norm_out": "out.0"}
    fixed |= {"time_embedding.linear_2": "time_embed.2", "conv_out": "out.2"}
    fixed["controlnet_mid_block"] = "middle_block_out.0"
    fixed |= {"mid_block.attentions.0": "middle_block.1", "mid_block.resnets.0": "middle_block.0"}
    fixed["mid_block.resnets.1"] = "middle_block.2"
    attended = {int(m[1]) for name in state if (m := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    found = {}
    for name, value in state.items():
        new = name
        for ours, theirs in fixed.items():
            if name.startswith(f"{ours}."):
                new = theirs + name[len(ours) :]
        if m := re.match(r"controlnet_down_blocks\.(\d+)(.*)", name):
            new = f"zero_convs.{m[1]}.0{m[2]}"
        elif m := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.0(.*)", name):
            block = 2 * int(m[1]) + (2 if m[2] == "downsamplers" else 1)
            part = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[m[2]]
            new = f"input_blocks.{block}.{part}{m[3].replace('.conv.', '.op.') if m[2] == 'downsamplers' else m[3]}"
        elif m := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d)(.*)", name):
            up = int(m[1])
            layer = 1 if m[2] == "upsamplers" else int(m[3])
            part = {"resnets": 0, "attentions": 1, "upsamplers": 2 if up in attended else 1}[m[2]]
            new = f"output_blocks.{2 * up + layer}.{part}{m[4]}"
        if ".resnets." in name:
            for ours, theirs in inner.items():
                new = re.sub(rf"\.{ours}\.", f".{theirs}.", new)
        found[new] = value
    return found


def autoencoder_to_ldm(name: str) -> str:
    """diffusers -> LDM name of an autoencoder with four levels."""
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for ours, theirs in attention.items():
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
