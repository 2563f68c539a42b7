"""Transparency beside colours: what is hidden must not show where it ends."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fill_hidden(colours: Tensor, alpha: Tensor) -> Tensor:
    """Colours (C,H,W) whose fully transparent pixels take those of the visible ones around them.

    Enlarging and restoring look beyond edges: whatever a program left under full transparency (noise, white) would
    bleed into what is seen. alpha: (1,H,W) in [0, 1]. Each level of a pyramid averages the visible pixels, weighted by
    alpha; hidden ones take the finest level that has any. Visible pixels stay as they are, bit for bit.
    """
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return colours
    levels, weight = [], alpha[None]
    mean = colours[None] * weight  # premultiplied; divided by the weight where it is used
    while True:
        levels.append((mean, weight))
        if max(weight.shape[2:]) == 1:
            break
        mean, weight = (F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in (mean, weight))
    filled = levels[-1][0] / levels[-1][1]
    for mean, weight in reversed(levels[:-1]):
        coarse = F.interpolate(filled, scale_factor=2, mode="nearest")[..., : weight.shape[2], : weight.shape[3]]
        filled = torch.where(weight > 0, mean / weight.clamp(min=1e-12), coarse)
    return torch.where(hidden, filled[0], colours)
