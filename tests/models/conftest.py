"""Tiny networks of Stable Diffusion's kind, with random weights."""

from __future__ import annotations

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
