"""Tile diffusion: a denoiser on windows of the latent, merged with Gaussian weights at every step.

The windows share one spatial size, so a batch of them is one ordinary forward pass of the network at the size it was
trained for, whatever the image's size. Text and image tokens are those of the whole image.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

Sides = tuple[int, int]
Sharing = Callable[[nn.Module, int, Callable[[], object]], AbstractContextManager]
"""(network, images, run_on_patches) -> a context in which norms use the statistics that run_on_patches() gathers: see
models/norms.py, shared_norms."""
PATCH, PATCHES = 32, 36
"""Side in latent pixels, and number, of the patches that stand for a latent as a whole."""


class Window(NamedTuple):
    """A rectangle of the latent: rows top..top+height-1, columns left..left+width-1."""

    top: int
    left: int
    height: int
    width: int

    def crop(self, z: Tensor) -> Tensor:
        """The window's part of z (..., h, w), a view."""
        return z[..., self.top : self.top + self.height, self.left : self.left + self.width]


def starts(size: int, tile: int, stride: int) -> list[int]:
    """First positions of windows of length `tile` that cover 0..size-1: every `stride`, and one flush with the end."""
    if not 0 < stride <= tile:
        raise ValueError(f"stride {stride} must lie in 1..{tile}, or the windows leave gaps")
    at = list(range(0, max(size - tile, 0) + 1, stride))
    return at if at[-1] + tile >= size else [*at, size - tile]


def windows(height: int, width: int, tile: int | Sides, stride: int | Sides) -> list[Window]:
    """Windows of one size that cover a latent of height x width; none is larger than the latent.

    tile, stride: down and across, or one number for both.
    """
    tile, stride = (value if isinstance(value, tuple) else (value, value) for value in (tile, stride))
    h, w = min(tile[0], height), min(tile[1], width)
    rows, columns = starts(height, h, min(stride[0], h)), starts(width, w, min(stride[1], w))
    return [Window(top, left, h, w) for top, left in product(rows, columns)]


def patches(height: int, width: int) -> list[Window]:
    """At most PATCHES windows of side PATCH, centred in equal parts of a latent of height x width."""
    across = min(max(round((PATCHES * width / height) ** 0.5), 1), PATCHES)
    down = PATCHES // across
    h, w = min(PATCH, height), min(PATCH, width)
    tops, lefts = (
        [round((i + 0.5) * (length - side) / count) for i in range(count)]
        for length, side, count in ((height, h, down), (width, w, across))
    )
    return [Window(top, left, h, w) for top, left in product(tops, lefts)]


def gaussian_weights(height: int, width: int, form: str = "symmetric") -> Tensor:
    """How much a window counts at each of its pixels (CCSR's release): (height, width), float64, highest in the middle.

    `as_released` reproduces CCSR's rows, whose centre lies half a pixel low.
    """

    def profile(n: int, centre: float) -> Tensor:
        x = (torch.arange(n, dtype=torch.float64) - centre) / n
        return torch.exp(-(x**2) / 0.02) / (0.02 * torch.pi) ** 0.5

    rows = profile(height, height / 2 if form == "as_released" else (height - 1) / 2)
    return torch.outer(rows, profile(width, (width - 1) / 2))


class TiledDenoiser(nn.Module):
    """A denoiser of the same call, (z_t, t, condition) -> eps, that works through windows of the latent.

    tile, stride: in latent pixels, as `windows` takes them. batch: windows per forward pass, each of all images.
    on_tile: called with the area of each window that is done. Latents no larger than a tile go straight through.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        tile: int | Sides,
        stride: int | Sides,
        weights: str = "symmetric",
        batch: int = 4,
        on_tile: Callable[[int], None] = lambda area: None,
        sharing: Sharing | None = None,
    ) -> None:
        """sharing: how what a network measures over its whole input is measured on patches, for all windows alike."""
        super().__init__()
        self.on_tile, self.sharing = on_tile, sharing
        self.denoiser, self.tile, self.stride, self.weights, self.batch = (denoiser, tile, stride, weights, batch)

    def prepare(self, condition, like=None):
        """As the denoiser's own: tokens are the whole image's, only the hint's features are each window's."""
        prepare = getattr(self.denoiser, "prepare", None)
        return condition if prepare is None else prepare(condition, like, hint=False)

    def forward(self, z_t: Tensor, t: Tensor, condition) -> Tensor:
        """z_t (B,C,h,w), t (B,), condition of B images -> eps (B,C,h,w)."""
        images, _, height, width = z_t.shape
        covering = windows(height, width, self.tile, self.stride)
        if len(covering) == 1:
            return self.denoiser(z_t, t, condition)
        weights = gaussian_weights(covering[0].height, covering[0].width, self.weights).to(z_t)
        total, norm = torch.zeros_like(z_t), torch.zeros_like(z_t[:1, :1])
        for window in covering:
            window.crop(norm).add_(weights)

        def on(chunk: list[Window]) -> Tensor:
            rows = torch.arange(images, device=z_t.device).repeat(len(chunk))
            return self.denoiser(_crops(z_t, chunk), t[rows], _pick(condition, rows, chunk))

        with self.sharing(self.denoiser, images, lambda: on(patches(height, width))) if self.sharing else nullcontext():
            for chunk in even_chunks(covering, self.batch):
                for window, part in zip(chunk, on(chunk).split(images), strict=True):
                    window.crop(total).add_(weights * part)
                    self.on_tile(window.height * window.width)
        return total.div_(norm)


def even_chunks(items: list, limit: int) -> list[list]:
    """Split `items` into as few lists as a limit of `limit` each allows, of nearly equal lengths."""
    count = -(-len(items) // max(limit, 1))
    edges = [round(i * len(items) / count) for i in range(count + 1)]
    return [items[a:b] for a, b in pairwise(edges)]


def _crops(z: Tensor, chunk: list[Window]) -> Tensor:
    """The windows of all images, (windows * B, C, height, width), a window's images together."""
    return torch.cat([window.crop(z) for window in chunk]) if len(chunk) > 1 else chunk[0].crop(z)


def _pick(condition, rows: Tensor, chunk: list[Window]):
    """The condition of each window: its image's tokens, and its part of its image's hint."""
    without = condition.changed(hint=condition.hint[..., :0, :0])  # or a copy of the whole for every window
    return without.rows(rows).changed(hint=_crops(condition.hint, chunk))
