"""JPEG compression and decompression (4:2:0) of float images at real-valued qualities, on any device.

The arithmetic is that of DiffJPEG, which Real-ESRGAN's degradation uses, and with it both releases': unrounded
quantisation tables, box-filtered chroma, zero padding, rounding of the coefficients only (the result is not rounded to
8 bits). Entropy coding loses nothing and is left out.
"""

import functools
import math

import torch
import torch.nn.functional as F

from consissr.images.device import to_device

_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA_CORNER = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))
_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


@functools.cache
def _constants(device: torch.device) -> tuple[torch.Tensor, ...]:
    """(block DCT [64,64], luma table [64], chroma table [64], RGB -> 255 YCbCr [3,3], CbCr -> RGB [3,2]).

    A row-major 8x8 block times the first matrix is its orthonormal two-dimensional DCT; the transpose inverts it.
    Both tables are transposed, as DiffJPEG has them.
    """
    k, n = torch.arange(8, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)[None, :]
    dct = torch.cos((2 * n + 1) * k * math.pi / 16) / 2
    dct[0] /= math.sqrt(2)
    chroma = torch.full((8, 8), 99.0)
    chroma[:4, :4] = torch.tensor(_CHROMA_CORNER)
    tensors = (
        torch.kron(dct, dct).T.float(),
        torch.tensor(_LUMA).float().T.flatten(),
        chroma.T.flatten(),
        torch.tensor(_TO_YCBCR) * 255,
        torch.tensor(_TO_RGB)[:, 1:],
    )
    return tuple(tensor.contiguous().to(device) for tensor in tensors)


def quantisation_factor(quality: torch.Tensor) -> torch.Tensor:
    """The factor on the standard tables for qualities in (0, 100] (the Independent JPEG Group's rule).

    At 100 the rule gives 0; the smallest factor here, 1e-4, loses nothing either.
    """
    return torch.where(quality < 50, 50 / quality, 2 - quality / 50).clamp(min=1e-4)


def _round_trip(planes: torch.Tensor, table: torch.Tensor, dct: torch.Tensor) -> torch.Tensor:
    """Level-shifted planes [N,H,W] through block coefficients rounded to multiples of `table` [N,64]."""
    n, h, w = planes.shape
    blocks = planes.reshape(n, h // 8, 8, w // 8, 8).transpose(2, 3).reshape(n, -1, 64)
    coefficients = torch.matmul(blocks, dct / table[:, None]).round_()
    blocks = torch.matmul(coefficients, table[:, :, None] * dct.T)
    return blocks.view(n, h // 8, w // 8, 8, 8).transpose(2, 3).reshape(n, h, w)


def _halve(x: torch.Tensor) -> torch.Tensor:
    """Means over 2x2 pixels, [...,H,W] -> [...,H/2,W/2]."""
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def jpeg(x: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """What JPEG leaves of `x` [B,3,H,W] in [0,1] at `quality` [B], each in (0,100]; same shape and range, any size."""
    dct, luma, chroma, to_ycc, to_rgb = _constants(x.device)
    b, _, h, w = x.shape
    x = F.pad(x, (0, -w % 16, 0, -h % 16)) if w % 16 or h % 16 else x
    height, width = x.shape[-2:]
    factor = quantisation_factor(quality.to(x.dtype))
    factor = factor[0] if b == 1 else to_device(factor, x.device)[:, None]  # a single number may stay on the CPU

    ycc = torch.matmul(to_ycc, x.flatten(2)).view(b, 3, height, width)
    y = _round_trip(ycc[:, 0] - 128, luma[None] * factor, dct) + 128
    halves = _halve(ycc[:, 1:]).flatten(0, 1)
    halves = _round_trip(halves, (chroma[None] * factor).repeat_interleave(2, dim=0), dct)
    color = torch.matmul(to_rgb, halves.view(b, 2, -1)).view(b, 3, height // 2, width // 2)
    rgb = F.interpolate(color, scale_factor=2, mode="nearest").add_(y[:, None])
    return rgb.div_(255).clamp_(0, 1)[..., :h, :w]
