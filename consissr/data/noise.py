"""Gaussian and Poisson noise of the degradation (basicsr's definitions)."""

import functools
import math

import torch

from consissr.data.draws import Draws


def gaussian_noise(x: torch.Tensor, draws: Draws, gray: bool) -> torch.Tensor:
    """Noise of one 8-bit step's standard deviation for `x` [B,3,H,W] in [0,1]: [B,3,H,W], or [1,1,H,W] if gray."""
    shape = (1, 1, *x.shape[-2:]) if gray else x.shape
    return draws.normal(shape, x.device) / 255


def poisson_noise(x: torch.Tensor, draws: Draws, gray: bool) -> torch.Tensor:
    """Shot noise of `x` [B,3,H,W] in [0,1], rounded to 8 bits first: counts / n - x with counts ~ Poisson(x n).

    n is the number of distinct 8-bit values in the image, up to the next power of two. Gray: of its luminance,
    [B,1,H,W].
    """
    if gray:
        x = 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    levels = (x * 255).round_().clamp_(0, 255).int()
    n = power_above(levels)
    counts = draws.poisson(levels, n)
    return counts / n.to(x.device).view(-1, 1, 1, 1) - levels / 255


def power_above(levels: torch.Tensor) -> torch.Tensor:
    """How many different values each integer image [B,...] in 0..255 has, up to the next power of two: [B] float32.

    On the CPU, or on a GPU's images there, without waiting for it.
    """
    powers = powers_above(levels.device)
    if levels.device.type == "cpu":
        counts = torch.stack([(torch.bincount(image.flatten(), minlength=256) > 0).sum() for image in levels])
        return powers[counts]
    there = torch.zeros(len(levels), 256, device=levels.device)
    counts = there.scatter_(1, levels.flatten(1).long(), 1.0).sum(1).long()
    return powers[counts]


@functools.cache
def powers_above(device: torch.device) -> torch.Tensor:
    """The next power of two from each of 0..256 on, [257] float32 (of 0: 0)."""
    return torch.tensor([0.0] + [2.0 ** math.ceil(math.log2(count)) for count in range(1, 257)], device=device)
