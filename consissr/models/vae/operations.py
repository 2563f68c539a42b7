"""The autoencoder as a list of operations that run on parts of an image: what `vae_tiling` is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consissr.models.vae.winograd import convolve_padded

WINDOW_MARGIN = 8
"""What windowed attention sees around its window, in latent pixels."""


class Op(NamedTuple):
    """One operation on a map: conv, norm (with SiLU), up, down, attention; push (on the residual stack), add; fold and
    unfold (pixels into channels and back)."""

    kind: str
    module: nn.Module | None = None

    @property
    def norm(self) -> nn.GroupNorm | None:
        """The GroupNorm that this operation is, or begins with."""
        return self.module.group_norm if self.kind == "attention" else self.module if self.kind == "norm" else None


class Box(NamedTuple):
    """Rows top..bottom-1 and columns left..right-1 of a map."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, x: Tensor) -> Tensor:
        """This part of a whole map (B,C,H,W), a view."""
        return x[:, :, self.top : self.bottom, self.left : self.right]

    def expanded(self, margin: int, size: tuple[int, int]) -> Box:
        """Larger by a margin on each side, inside the map."""
        return Box(
            max(self.top - margin, 0),
            min(self.bottom + margin, size[0]),
            max(self.left - margin, 0),
            min(self.right + margin, size[1]),
        )

    def contracted(self, margin: int, size: tuple[int, int]) -> Box:
        """Smaller by a margin on each side that is not the map's border."""
        return Box(
            self.top + margin * (self.top > 0),
            self.bottom - margin * (self.bottom < size[0]),
            self.left + margin * (self.left > 0),
            self.right - margin * (self.right < size[1]),
        )

    def inside(self, outer: Box) -> Box:
        """The same place counted from the corner of a box around it."""
        return Box(self.top - outer.top, self.bottom - outer.top, self.left - outer.left, self.right - outer.left)


@dataclass
class Tile:
    """Part of a map under way: values, where they lie, the map's size, and what the residual stack holds."""

    x: Tensor
    box: Box
    size: tuple[int, int]
    stack: list[Tile] = field(default_factory=list)


def decoder_ops(vae) -> list[Op]:
    """The operations of an AutoencoderKL's decoding, from unscaled latents."""
    decoder = vae.decoder
    ops = [Op("conv", vae.post_quant_conv)] if vae.post_quant_conv is not None else []
    ops += [Op("conv", decoder.conv_in), *_middle(decoder.mid_block)]
    for block in decoder.up_blocks:
        ops += [op for resnet in block.resnets for op in _resnet(resnet)]
        ops += [Op("up", up.conv) for up in block.upsamplers or []]
    return [*ops, Op("norm", decoder.conv_norm_out), Op("conv", decoder.conv_out)]


def encoder_ops(vae) -> list[Op]:
    """The operations of an AutoencoderKL's encoding, to the posterior's moments."""
    encoder = vae.encoder
    ops = [Op("conv", encoder.conv_in)]
    for block in encoder.down_blocks:
        ops += [op for resnet in block.resnets for op in _resnet(resnet)]
        ops += [Op("down", down.conv) for down in block.downsamplers or []]
    ops += [*_middle(encoder.mid_block), Op("norm", encoder.conv_norm_out), Op("conv", encoder.conv_out)]
    return ops + ([Op("conv", vae.quant_conv)] if vae.quant_conv is not None else [])


def _resnet(resnet) -> list[Op]:
    return [
        Op("push"),
        Op("norm", resnet.norm1),
        Op("conv", resnet.conv1),
        Op("norm", resnet.norm2),
        Op("conv", resnet.conv2),
        Op("add", resnet.conv_shortcut),
    ]


def _middle(block) -> list[Op]:
    ops = _resnet(block.resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        ops += [Op("attention", attention)] if attention is not None else []
        ops += _resnet(resnet)
    return ops


def size_after(op: Op, size: tuple[int, int]) -> tuple[int, int]:
    """A map's height and width after an operation."""
    grow = {"up": 2, "unfold": getattr(op.module, "upscale_factor", 1)}.get(op.kind, 1)
    shrink = {"down": 2, "fold": getattr(op.module, "downscale_factor", 1)}.get(op.kind, 1)
    return (size[0] * grow // shrink, size[1] * grow // shrink)


def channels_after(op: Op, channels: int) -> int:
    """A map's channels after an operation."""
    if op.kind == "fold":
        return channels * op.module.downscale_factor**2
    if op.kind == "unfold":
        return channels // op.module.upscale_factor**2
    return op.module.out_channels if op.kind in ("conv", "up", "down") else channels


def box_before(op: Op, box: Box, size: tuple[int, int]) -> Box:
    """What an operation must read of its input, a map of `size`, to produce `box` of its output."""
    if op.kind == "conv":
        return box.expanded(op.module.kernel_size[0] // 2, size)
    if op.kind == "up":
        top, bottom, left, right = box.expanded(1, (2 * size[0], 2 * size[1]))
        return Box(top // 2, ceil(bottom / 2), left // 2, ceil(right / 2))
    if op.kind == "down":
        return Box(2 * box.top, min(2 * box.bottom + 1, size[0]), 2 * box.left, min(2 * box.right + 1, size[1]))
    if op.kind == "fold":
        return Box(*(edge * op.module.downscale_factor for edge in box))
    if op.kind == "unfold":
        factor = op.module.upscale_factor
        return Box(box.top // factor, ceil(box.bottom / factor), box.left // factor, ceil(box.right / factor))
    return box.expanded(WINDOW_MARGIN, size) if op.kind == "attention" else box


def convolve(tile: Tile, conv: nn.Conv2d) -> Tile:
    """A stride-1 convolution: zeros beyond the map's border, a smaller tile where it ends inside the map."""
    margin, box, (height, width) = conv.kernel_size[0] // 2, tile.box, tile.size
    border = (box.left == 0, box.right == width, box.top == 0, box.bottom == height)
    x = convolve_padded(F.pad(tile.x, [margin * side for side in border]), conv)
    return Tile(x, box.contracted(margin, tile.size), tile.size, tile.stack)


def downsample(tile: Tile, conv: nn.Conv2d) -> Tile:
    """diffusers' stride-2 convolution: one row and column of zeros at the bottom and right border only."""
    (top, bottom, left, right), (height, width) = tile.box, tile.size
    bottom, right = bottom + (bottom == height), right + (right == width)
    x = F.pad(tile.x, (0, right - tile.box.right, 0, bottom - tile.box.bottom))
    x = F.conv2d(x[:, :, top % 2 :, left % 2 :], conv.weight, conv.bias, stride=2)
    top, left = ceil(top / 2), ceil(left / 2)
    return Tile(x, Box(top, top + x.shape[2], left, left + x.shape[3]), (height // 2, width // 2), tile.stack)


def upsample(tile: Tile, conv: nn.Conv2d) -> Tile:
    """Nearest-neighbour doubling and a convolution."""
    x = F.interpolate(tile.x, scale_factor=2.0, mode="nearest")
    size = (2 * tile.size[0], 2 * tile.size[1])
    return convolve(Tile(x, Box(*(2 * edge for edge in tile.box)), size, tile.stack), conv)


def normalise(x: Tensor, norm: nn.GroupNorm, statistics: tuple[Tensor, Tensor] | None, act: bool = True) -> Tensor:
    """GroupNorm with given (mean, variance), each (B, groups), or with x's own; then SiLU."""
    if statistics is None:
        x = norm(x)
    else:
        per_group = norm.num_channels // statistics[0].shape[1]
        mean, variance = (s.repeat_interleave(per_group, 1)[:, :, None, None] for s in statistics)
        scale = norm.weight[:, None, None] / (variance + norm.eps).sqrt()
        x = torch.addcmul((norm.bias[:, None, None] - mean * scale).to(x), x, scale.to(x))
    return F.silu(x, inplace=True) if act else x


def advance(tile: Tile, op: Op, statistics: tuple[Tensor, Tensor] | None) -> Tile:
    """One operation on one tile."""
    if op.kind == "push":
        return Tile(tile.x, tile.box, tile.size, [*tile.stack, tile])
    if op.kind == "add":
        *stack, residual = tile.stack
        x = tile.box.inside(residual.box).of(residual.x)
        return Tile(tile.x.add_(x if op.module is None else op.module(x)), tile.box, tile.size, stack)
    if op.kind == "norm":
        return Tile(normalise(tile.x, op.module, statistics), tile.box, tile.size, tile.stack)
    if op.kind == "attention":
        x = tile.x + attend(normalise(tile.x, op.module.group_norm, statistics, act=False), op.module)
        box = tile.box.contracted(WINDOW_MARGIN, tile.size)
        return Tile(box.inside(tile.box).of(x), box, tile.size, tile.stack)
    if op.kind in ("fold", "unfold"):
        x, size = op.module(tile.x), size_after(op, tile.size)
        box = Box(*(edge * size[0] // tile.size[0] for edge in tile.box))
        return Tile(x, box, size, tile.stack)
    return {"conv": convolve, "up": upsample, "down": downsample}[op.kind](tile, op.module)


def attend(x: Tensor, attention) -> Tensor:
    """diffusers' single-head attention over all positions of a normalised map (B,C,h,w)."""
    tokens = x.flatten(2).transpose(1, 2)
    batch, count, channels = tokens.shape
    query, key, value = (
        project(tokens).view(batch, count, attention.heads, -1).transpose(1, 2)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, count, channels)
    return attention.to_out[0](out).transpose(1, 2).reshape_as(x)
