"""Means and variances of images that come in parts."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)
"""Kinds of devices that do not know it: Apple's GPUs."""


class Moments:
    """Mean and variance per image and group of channels, gathered over parts without loss (Chan's parallel formula)."""

    def __init__(self, groups: int) -> None:
        self.groups, self.count = groups, 0

    def add(self, x: Tensor) -> None:
        """Take in the values of a part (B,C,h,w)."""
        values = x if x.dtype == torch.float64 else x.float()
        variance, mean = torch.var_mean(values.reshape(len(x), self.groups, -1), dim=2, correction=0)
        exact = torch.float32 if x.device.type in WITHOUT_FLOAT64 else torch.float64
        count, mean = x[0].numel() // self.groups, mean.to(exact)
        spread = variance.to(exact) * count
        if not self.count:
            self.count, self.mean, self.spread = count, mean, spread
            return
        delta, total = mean - self.mean, self.count + count
        self.spread += spread + delta**2 * (self.count * count / total)
        self.mean, self.count = self.mean + delta * (count / total), total

    def result(self, correction: int = 0) -> tuple[Tensor, Tensor]:
        """(mean, variance), each (B, groups), float64 (float32 on mps); `correction` 1: the unbiased variance."""
        return self.mean, self.spread / max(self.count - correction, 1)
