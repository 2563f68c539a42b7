"""3x3 convolutions on the CPU with a quarter of the multiplications: Winograd's minimal filtering F(4x4, 3x3).

A tile of 6x6 inputs and the 3x3 weights are brought into a space of 36 values where the convolution is 36 matrix
products over channels, and a 4x4 tile of outputs comes back (Lavin and Gray, "Fast Algorithms for Convolutional Neural
Networks", 2016). The result is that of the direct convolution up to rounding (2e-6 relative in float32). It pays where
channels are many and maps large: in the autoencoder and the upper levels of SD2.1's UNet, not in `nano`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUT, IN = 4, 6
"""Sides of a tile of outputs, and of the inputs that it depends on."""
LEAST_CHANNELS = 128
LEAST_TILES = 256
"""Below these the transforms, of the weights above all, cost more than they save."""
TILES_AT_ONCE = 128
"""Tiles per block: a block's values should stay in the processor's cache."""

INPUT = (
    (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1),
)  # fmt: skip
WEIGHT = (
    (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
)  # fmt: skip
OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def both_axes(matrix: tuple) -> Tensor:
    """A one-dimensional transform as the matrix of the same along both axes of flattened tiles."""
    one = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(one, one).float()


TO_SPACE, WEIGHTS_TO_SPACE, FROM_SPACE = both_axes(INPUT), both_axes(WEIGHT), both_axes(OUTPUT)


Read = Callable[[slice, int, int], Tensor]
"""Rows first..last-1 of some images (a slice of the batch) of a map: (b, rows, W, C)."""


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 1) -> Tensor:
    """x (B, C, H, W) with weight (K, C, 3, 3), stride 1, zero padding 0 or 1 -> (B, K, H', W'), channels last."""
    pixels = x.permute(0, 2, 3, 1).contiguous()
    return convolve_rows(lambda images, first, last: pixels[images, first:last], x.shape, weight, bias, padding)


def convolve_rows(read: Read, shape: tuple, weight: Tensor, bias: Tensor | None, padding: int = 1) -> Tensor:
    """The same for a map of `shape` (B, C, H, W) of which a few rows are read, or made, at a time."""
    batch, channels, height, width = shape
    height, width = height + 2 * padding - 2, width + 2 * padding - 2
    rows, columns = -(-height // OUT), -(-width // OUT)
    filters = len(weight)
    spread = WEIGHTS_TO_SPACE @ weight.permute(2, 3, 0, 1).reshape(9, -1)
    spread = spread.view(IN * IN, filters, channels).transpose(1, 2)  # (36, C, K)
    out = weight.new_empty(batch, rows, OUT, columns, OUT, filters)
    images = max(1, TILES_AT_ONCE // (rows * columns))
    strip = max(1, TILES_AT_ONCE // columns) if images == 1 else rows
    for some in (slice(first, min(first + images, batch)) for first in range(0, batch, images)):
        for top in range(0, rows, strip):
            high = min(strip, rows - top)
            first, last = top * OUT - padding, (top + high) * OUT + 2 - padding
            inside = (max(first, 0), min(last, shape[2]))
            right = columns * OUT + 2 - padding - shape[3]
            part = F.pad(read(some, *inside), (0, 0, padding, right, inside[0] - first, last - inside[1]))
            steps = part.stride()
            size = (IN, IN, len(part), high, columns, channels)
            tiles = part.as_strided(size, (steps[1], steps[2], steps[0], OUT * steps[1], OUT * steps[2], 1))
            values = (TO_SPACE @ tiles.reshape(IN * IN, -1)).view(IN * IN, -1, channels)
            values = FROM_SPACE @ torch.bmm(values, spread).view(IN * IN, -1)
            done = values.view(OUT, OUT, len(part), high, columns, filters).permute(2, 3, 0, 4, 1, 5)
            out[some, top : top + high].copy_(done)
    out = out.view(batch, rows * OUT, columns * OUT, filters)[:, :height, :width]
    return (out if bias is None else out.add_(bias)).permute(0, 3, 1, 2)


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution that goes the fast way where that pays and is possible.

    That is in float32, on the CPU, without gradients, and not compiled, where its loop would be unrolled.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, H, W)."""
        return convolve(x, self.weight, self.bias) if self.pays(x) else super().forward(x)

    def pays(self, x: Tensor) -> bool:
        """Whether to go the fast way for `x`."""
        tiles = x.shape[0] * -(-x.shape[2] // OUT) * -(-x.shape[3] // OUT)
        able = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32 and not torch.is_grad_enabled()
        other = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        return able and not other and tiles >= LEAST_TILES


def convolve_padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` at stride 1 without padding, by the way that it goes: x (B, C, H, W) -> (B, K, H', W')."""
    if isinstance(conv, WinogradConv2d) and conv.pays(x):
        return convolve(x, conv.weight, conv.bias, padding=0)
    return F.conv2d(x, conv.weight, conv.bias)


def use_winograd(network: nn.Module) -> int:
    """Let the convolutions of `network` that can profit take the fast way, in place; how many they are.

    Their class changes, their parameters and names don't.
    """
    found = [m for m in network.modules() if type(m) is nn.Conv2d and fits(m)]
    for conv in found:
        conv.__class__ = WinogradConv2d
    return len(found)


def fits(conv: nn.Conv2d) -> bool:
    """Whether this is an ordinary 3x3 convolution with enough channels."""
    kind = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    ordinary = kind == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    return ordinary and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
