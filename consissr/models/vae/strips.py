"""The autoencoder on the CPU without the maps between norm, activation and convolution.

Where a 3x3 convolution goes Winograd's way, it reads its input a few rows at a time. So the norm and the activation
before it, or the enlargement, can be applied to those rows just then: the statistics of the norm come first, and the
map that the convolution would read never exists as a whole. Results are those of diffusers' layers up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from consissr.models.vae.winograd import Read, WinogradConv2d, convolve_rows

PIXELS_AT_ONCE = 2048
"""Pixels per part of a map whose statistics are gathered; its values should stay in the processor's cache."""


class StripResnet(ResnetBlock2D):
    """A residual block without time embedding; `use_strips` makes one of a plain block."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *unused: Any, **options: Any) -> Tensor:
        """(B, C, H, W) -> (B, K, H, W)."""
        x = input_tensor
        if temb is not None or not (self.conv1.pays(x) and self.conv2.pays(x)):
            return super().forward(x, temb, *unused, **options)
        h = convolve_rows(normalised(x, self.norm1), x.shape, self.conv1.weight, self.conv1.bias)
        h = convolve_rows(normalised(h, self.norm2), h.shape, self.conv2.weight, self.conv2.bias)
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x)).div_(self.output_scale_factor)


class StripUpsample(Upsample2D):
    """Enlargement to twice the side and a convolution."""

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *unused: Any, **options: Any) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        x = hidden_states
        if output_size is not None or not self.conv.pays(x):
            return super().forward(x, output_size, *unused, **options)
        shape = (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        return convolve_rows(doubled(x), shape, self.conv.weight, self.conv.bias)


class StripDecoder(Decoder):
    """The decoder, layer by layer: diffusers' loop over blocks keeps each block's input until the block is done."""

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W)."""
        if latent_embeds is not None or torch.is_grad_enabled():
            return super().forward(sample, latent_embeds)
        x = self.mid_block(self.conv_in(sample), None)
        for layer in [layer for up in self.up_blocks for layer in (*up.resnets, *(up.upsamplers or ()))]:
            x = layer(x, None)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


def use_strips(network: nn.Module) -> int:
    """Let blocks of `network` whose convolutions are `WinogradConv2d` work in strips, in place; how many they are."""
    blocks = [m for m in network.modules() if type(m) is ResnetBlock2D and plain_block(m)]
    enlargements = [m for m in network.modules() if type(m) is Upsample2D and plain_upsample(m)]
    for module in blocks:
        module.__class__ = StripResnet
    for module in enlargements:
        module.__class__ = StripUpsample
    for module in network.modules():
        if type(module) is Decoder and all(type(up) is UpDecoderBlock2D for up in module.up_blocks):
            module.__class__ = StripDecoder
    return len(blocks) + len(enlargements)


def plain_block(block: ResnetBlock2D) -> bool:
    """Whether a block is norm, SiLU and convolution, twice, and nothing else."""
    more = (block.upsample, block.downsample, block.time_emb_proj)
    layers = (block.nonlinearity, block.norm1, block.norm2, block.conv1, block.conv2)
    kinds = (nn.SiLU, nn.GroupNorm, nn.GroupNorm, WinogradConv2d, WinogradConv2d)
    return all(part is None for part in more) and all(map(isinstance, layers, kinds))


def plain_upsample(layer: Upsample2D) -> bool:
    """Whether a layer is doubling by repetition and a convolution, and nothing else."""
    return (
        layer.interpolate
        and not layer.use_conv_transpose
        and layer.norm is None
        and isinstance(layer.conv, WinogradConv2d)
    )


def doubled(x: Tensor) -> Read:
    """Reads x (B, C, H, W) enlarged to twice the sides by repetition."""
    pixels = x.permute(0, 2, 3, 1)

    def read(images: slice, first: int, last: int) -> Tensor:
        rows = pixels[images, first // 2 : (last + 1) // 2].repeat_interleave(2, 1).repeat_interleave(2, 2)
        return rows[:, first % 2 : first % 2 + last - first]

    return read


def normalised(x: Tensor, norm: nn.GroupNorm) -> Read:
    """Reads SiLU(norm(x)) of x (B, C, H, W)."""
    pixels, (mean, variance) = x.permute(0, 2, 3, 1), statistics(x, norm.num_groups)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    shift = (norm.bias - mean * scale)[:, None, None]
    scale = scale[:, None, None]
    return lambda images, first, last: F.silu(
        torch.addcmul(shift[images], pixels[images, first:last], scale[images]), inplace=True
    )


def statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance that a norm over `groups` gives each channel of x (B, C, H, W): each (B, C), float32."""
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    pilot = pixels[:, :PIXELS_AT_ONCE].mean(
        1, keepdim=True
    )  # taken off first: squares of what is far from 0 are coarse
    total = torch.zeros(2, *pilot[:, 0].shape, dtype=torch.float64)
    for part in pixels.split(PIXELS_AT_ONCE, 1):
        off = part - pilot
        total[0] += off.sum(1)
        total[1] += off.square_().sum(1)
    mean, square = (total / pixels.shape[1]).unflatten(2, (groups, -1))
    variance = square - mean**2
    mean = mean + pilot[:, 0].double().unflatten(1, (groups, -1))
    middle = mean.mean(2, keepdim=True)
    spread = (variance + (mean - middle) ** 2).mean(2, keepdim=True)
    return tuple(each.expand_as(mean).flatten(1).float() for each in (middle, spread))
