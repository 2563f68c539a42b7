"""Gaussian and Poisson noise of the degradation (basicsr's definitions), and a fast exact Poisson sampler."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from consissr.data.draws import Draws

COLUMNS = 256
RESOLUTION = COLUMNS * 2.0**-24  # what is left of a float32 uniform number once it has chosen a column


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
    powers = torch.tensor([0.0] + [2.0 ** math.ceil(math.log2(count)) for count in range(1, 257)])
    if levels.device.type == "cpu":
        counts = torch.stack([(torch.bincount(image.flatten(), minlength=256) > 0).sum() for image in levels])
        return powers[counts]
    there = torch.zeros(len(levels), 256, device=levels.device)
    counts = there.scatter_(1, levels.flatten(1).long(), 1.0).sum(1).long()
    return powers.to(levels.device, non_blocking=True)[counts]


@functools.cache
def _alias_table(n: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walker's alias tables of Poisson(level n / 255) for levels 0..255, n <= 256: (accept, own, other), [65536] each.

    Column c of a level holds the count `own`, kept with probability `accept`, else `other`. The 256 columns span
    eight standard deviations on both sides of the mean. Smallest and largest columns are paired until all are level.
    """
    rate = torch.arange(256, dtype=torch.float64)[:, None] * n / 255
    own = (rate.round() - COLUMNS // 2).clamp(min=0) + torch.arange(COLUMNS)
    mass = torch.exp(torch.xlogy(own, rate) - rate - torch.lgamma(own + 1))
    mass *= COLUMNS / mass.sum(1, keepdim=True)
    accept, other = torch.ones_like(mass), own.clone()
    rows, settled = torch.arange(256), torch.zeros_like(mass, dtype=torch.bool)
    for _ in range(COLUMNS - 1):
        low = mass.masked_fill(settled, math.inf).argmin(1)
        high = mass.masked_fill(settled, -math.inf).argmax(1)
        accept[rows, low] = mass[rows, low].clamp(0, 1)
        other[rows, low] = own[rows, high]
        mass[rows, high] -= 1 - mass[rows, low]
        settled[rows, low] = True
    accept -= 0.5 * RESOLUTION  # so that comparing with multiples of it rounds to nearest
    return tuple(table.float().flatten() for table in (accept, own, other))


def poisson_counts(levels: torch.Tensor, n: float, generator: torch.Generator) -> torch.Tensor:
    """Poisson(level n / 255) counts for integer `levels` in 0..255 on the CPU, float32 of the same shape.

    One uniform number per element: its high 8 bits choose the column, its low bits decide between the column's two
    counts. Four times as fast as torch.poisson on the CPU, and the same distribution to 1e-7.
    """
    accept, own, other = _alias_table(n)
    u = torch.rand(levels.shape, generator=generator).mul_(COLUMNS)
    column = u.int()
    index = (levels * COLUMNS + column).flatten()
    keep = (u - column).flatten() < accept.index_select(0, index)
    return torch.where(keep, own.index_select(0, index), other.index_select(0, index)).view(levels.shape)
