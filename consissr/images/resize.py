"""Other sizes for tensors of pixels: bicubic, padded, cropped."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_STRIP = 256  # rows that are resized at once


def resize(x: Tensor, size: tuple[int, int], limits: tuple[float, float] | None = (-1.0, 1.0)) -> Tensor:
    """Bicubic resize as Pillow does it (antialiased when shrinking), in float32: (..., H, W) -> (..., *size).

    The cubic overshoots at edges; the result is clamped to `limits` after the horizontal and after the vertical pass,
    as Pillow does on 8-bit images (so the two differ by rounding only); None does not clamp. Computed on the CPU, one
    channel after the other, so that a result depends neither on the device nor on the batch.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    planes = x.detach().to("cpu", torch.float32).reshape(-1, *x.shape[-2:])
    result = torch.empty(len(planes), *size)
    for plane, resized in zip(planes, result, strict=True):
        wide = _bicubic(plane, (size[1], x.shape[-2]), (0, 0, x.shape[-1], x.shape[-2]), limits)
        for top in range(0, size[0], _STRIP):  # Pillow needs several times the memory of what it makes
            bottom = min(top + _STRIP, size[0])
            rows = (0, top * x.shape[-2] / size[0], size[1], bottom * x.shape[-2] / size[0])
            resized[top:bottom] = _bicubic(wide, (size[1], bottom - top), rows, limits)
    return result.reshape(*x.shape[:-2], *size).to(x)


def _bicubic(
    plane: Tensor, shape: tuple[int, int], box: tuple[float, ...], limits: tuple[float, float] | None
) -> Tensor:
    """The part `box` (left, top, right, bottom) of a plane (H, W), resized to `shape` (width, height) and clamped."""
    image = Image.fromarray(plane.numpy()).resize(shape, Image.Resampling.BICUBIC, box=box)
    resized = torch.from_numpy(np.array(image))
    return resized if limits is None else resized.clamp_(*limits)


def pad_to_multiple(x: Tensor, multiple: int, minimum: int = 1) -> Tensor:
    """Pad (..., H, W) at the bottom and right to multiples of `multiple`, at least `minimum`, by reflection.

    Works for any size: an axis shorter than its padding is reflected again and again, an axis of 1 is repeated.
    """
    for axis in (-2, -1):
        size = x.shape[axis]
        padded = -(-max(size, minimum) // multiple) * multiple
        if padded != size:
            period = max(2 * (size - 1), 1)
            position = torch.arange(padded, device=x.device) % period
            x = x.index_select(axis, torch.minimum(position, period - position) if size > 1 else position * 0)
    return x


def crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The top left (H, W) of (..., H', W'): undoes `pad_to_multiple`."""
    return x[..., : size[0], : size[1]]
