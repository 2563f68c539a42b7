"""Images whose rows are made when they are needed: what is large need not be in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from consissr.images.device import works_on_pixels

STRIP = 256
"""Rows that are worked on at once: resizing needs several times the memory of what it makes."""

Make = Callable[[int, int], Tensor]
"""(top, bottom) -> rows top..bottom-1 of an image, (1,3,h,W) float32, the caller's to write on."""


@dataclass(frozen=True)
class Rows:
    """An image (1,3,H,W), float32 in [-1, 1], that stands in for a tensor where that is read a few rows at a time."""

    make: Make
    shape: tuple[int, int, int, int]
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """An image that is at hand."""
        return cls(lambda top, bottom: x[:, :, top:bottom].clone(), tuple(x.shape), x.device)

    def whole(self) -> Tensor:
        """The image as a tensor."""
        if works_on_pixels(self.device):
            return self.make(0, self.shape[2])
        x = torch.empty(self.shape)
        for top, bottom in strips(self.shape[2]):
            x[:, :, top:bottom] = self.make(top, bottom)
        return x

    def to(self, device: torch.device) -> Rows | Tensor:
        """The image on a device: itself where it is there."""
        return self if torch.device(device) == self.device else self.whole().to(device)


def strips(height: int, device: torch.device | str = "cpu") -> Iterator[tuple[int, int]]:
    """(top, bottom) of the strips that `height` rows are worked on in, to save memory; on a GPU one, to save time."""
    step = height if works_on_pixels(device) else STRIP
    return ((top, min(top + step, height)) for top in range(0, height, step))


def rows_of(x: Tensor | Rows, top: int, bottom: int) -> Tensor:
    """Rows top..bottom-1 of an image (..., H, W)."""
    return x.make(top, bottom) if isinstance(x, Rows) else x[..., top:bottom, :]
