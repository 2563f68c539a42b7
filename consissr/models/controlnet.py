"""The ControlNet: diffusers' class, with the hint taken from the latent of the low-quality image."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from consissr.config.model import ModelConfig
from consissr.models.attention import zeroed
from consissr.models.surgery import added_parameters, replace_blocks

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel

STACK_WIDTHS = (16, 16, 32, 32, 96, 96, 256)
"""Output widths of ConsisSR's hint stack before its last convolution."""

COPIED = ("conv_in", "time_embedding", "down_blocks", "mid_block")
"""Parts that a new ControlNet takes from the UNet."""


class HintFeatures(NamedTuple):
    """What `LatentHint` made of a latent before: it doesn't depend on the step."""

    value: Tensor


class LatentHint(nn.Sequential):
    """z_lq (B, C, h, w) -> features (B, width, h, w), added to the output of the ControlNet's first convolution.

    'conv': one 3x3 convolution (CCSR v2). 'stack': eight with SiLU between them, the last starting at zero (ConsisSR).
    """

    def __init__(self, kind: str, channels: int, width: int) -> None:
        if kind == "conv":
            super().__init__(nn.Conv2d(channels, width, 3, padding=1))
            return
        layers: list[nn.Module] = []
        for previous, following in pairwise((channels, *STACK_WIDTHS)):
            layers += [nn.Conv2d(previous, following, 3, padding=1), nn.SiLU()]
        super().__init__(*layers, zeroed(nn.Conv2d(STACK_WIDTHS[-1], width, 3, padding=1)))

    def forward(self, hint: Tensor | HintFeatures) -> Tensor:
        """(B, C, h, w) -> (B, width, h, w); features that are given, where they are known already."""
        return hint.value if isinstance(hint, HintFeatures) else super().forward(hint)


def build_controlnet(unet: UNet2DConditionModel, config: ModelConfig) -> ControlNetModel:
    """A new ControlNet that starts as a copy of the UNet's encoder and middle, with zero output convolutions.

    `unet` may have had its blocks replaced before: what was added to it is not copied. Where the UNet is on the meta
    device the ControlNet is, too.
    """
    from diffusers import ControlNetModel

    controlnet = ControlNetModel.from_unet(
        unet, load_weights_from_unet=False, conditioning_channels=unet.config.in_channels
    ).to(unet.device)
    added = set(added_parameters(unet))
    for part in COPIED:
        state = {
            name: tensor for name, tensor in getattr(unet, part).state_dict().items() if f"{part}.{name}" not in added
        }
        getattr(controlnet, part).load_state_dict(state)
    return finish(controlnet, config)


def empty_controlnet(controlnet_config: dict[str, Any], config: ModelConfig) -> ControlNetModel:
    """A ControlNet of the sizes of a diffusers `config.json`, for a state dict to be loaded into."""
    from diffusers import ControlNetModel

    return finish(ControlNetModel.from_config(controlnet_config), config)


def finish(controlnet: ControlNetModel, config: ModelConfig) -> ControlNetModel:
    """Give a stock ControlNet our hint and our transformer blocks, in place."""
    width = controlnet.conv_in.out_channels
    hint = LatentHint(config.hint, controlnet.config.in_channels, width)
    controlnet.controlnet_cond_embedding = hint.to(controlnet.conv_in.weight.device)
    replace_blocks(controlnet, config)
    return controlnet
