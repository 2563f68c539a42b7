"""Other sizes for tensors of pixels: bicubic, padded, cropped."""

from __future__ import annotations

from math import ceil, floor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from consissr.images.device import works_on_pixels
from consissr.images.rows import Rows, rows_of, strips


def resize(x: Tensor, size: tuple[int, int], limits: tuple[float, float] | None = (-1.0, 1.0)) -> Tensor:
    """Bicubic resize as Pillow does it (antialiased when shrinking), in float32: (..., H, W) -> (..., *size).

    The cubic overshoots at edges; the result is clamped to `limits` after the horizontal and after the vertical pass,
    as Pillow does on 8-bit images (so the two differ by rounding only); None does not clamp. Pillow computes it, one
    channel and some rows after the other, or torch on devices that work on pixels; both do the same up to rounding.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if works_on_pixels(x.device):
        return _by_torch(x, size, limits)
    result = torch.empty(*x.shape[:-2], *size)
    for top, bottom in strips(size[0]):
        result[..., top:bottom, :] = resized_rows(x, size, top, bottom, limits)
    return result.to(x)


def resized_rows(
    x: Tensor | Rows, size: tuple[int, int], top: int, bottom: int, limits: tuple[float, float] | None = (-1.0, 1.0)
) -> Tensor:
    """Rows top..bottom-1 of what `resize` makes of x (..., H, W): (..., bottom - top, size[1]) float32.

    On the CPU, but for devices that work on pixels.
    """
    if works_on_pixels(x.device):
        return resize(x.float(), size, limits)[..., top:bottom, :]
    if tuple(x.shape[-2:]) == tuple(size):
        return rows_of(x, top, bottom).detach().to("cpu", torch.float32)
    height, width = x.shape[-2:]
    step = height / size[0]
    reach = 2 * max(step, 1) + 1  # of the cubic, in rows of x
    first, last = max(floor(top * step - reach), 0), min(ceil(bottom * step + reach), height)
    rows = (0, top * height / size[0] - first, size[1], bottom * height / size[0] - first)
    planes = rows_of(x, first, last).detach().to("cpu", torch.float32).reshape(-1, last - first, width)
    result = torch.empty(len(planes), bottom - top, size[1])
    for plane, resized in zip(planes, result, strict=True):
        wide = _bicubic(plane, (size[1], last - first), (0, 0, width, last - first), limits)
        resized.copy_(_bicubic(wide, (size[1], bottom - top), rows, limits))
    return result.reshape(*x.shape[:-2], *result.shape[1:])


def _by_torch(x: Tensor, size: tuple[int, int], limits: tuple[float, float] | None) -> Tensor:
    """The same where x is: across, then down."""
    planes = x.detach().float().reshape(1, -1, *x.shape[-2:])
    for shape in ((x.shape[-2], size[1]), tuple(size)):
        if shape != tuple(planes.shape[-2:]):
            planes = F.interpolate(planes, size=shape, mode="bicubic", antialias=True)
            planes = planes if limits is None else planes.clamp_(*limits)
    return planes.reshape(*x.shape[:-2], *size).to(x)


def _bicubic(
    plane: Tensor, shape: tuple[int, int], box: tuple[float, ...], limits: tuple[float, float] | None
) -> Tensor:
    """The part `box` (left, top, right, bottom) of a plane (H, W), resized to `shape` (width, height) and clamped."""
    image = Image.fromarray(plane.numpy()).resize(shape, Image.Resampling.BICUBIC, box=box)
    resized = torch.from_numpy(np.array(image))
    return resized if limits is None else resized.clamp_(*limits)


def reflected(size: int, padded: int, before: int = 0) -> Tensor:
    """Which of `size` rows stand in `padded` ones, where those beyond the ends are reflected, again and again.

    before: how many stand before the first.
    """
    return torch.from_numpy(np.pad(np.arange(size), (before, padded - size - before), mode="reflect"))


def crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The top left (H, W) of (..., H', W')."""
    return x[..., : size[0], : size[1]]
