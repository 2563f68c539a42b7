"""The tiled decoder of CCSR's release: tiles padded by 11, norms with means and variances averaged over the padded
tiles, attention per tile. An approximation; for comparisons."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from consissr.models.vae.operations import Box, Op, Tile, advance

RELEASED_MARGIN = 11
"""The margin of CCSR's decoder tiles, in latent pixels."""
RELEASED_GROUPS = 32
"""Groups of the norms in CCSR's decoder tiles, written into its code."""


class PooledTiles:
    """CCSR's released tiled decoder: padded tiles side by side through every operation, statistics averaged."""

    def __init__(self, ops: list[Op], tile: int):
        self.ops, self.tile = ops, tile

    def run(self, z: Tensor) -> Tensor:
        """(B,C,h,w) -> the decoder's output, tiles set side by side without blending."""
        size = tuple(z.shape[2:])
        cores = self.cores(size)
        padded = [core.expanded(RELEASED_MARGIN, size) for core in cores]
        tiles = [Tile(x, Box(0, x.shape[2], 0, x.shape[3]), tuple(x.shape[2:])) for x in (b.of(z) for b in padded)]
        for op in self.ops:
            pooled = None
            if op.norm is not None:
                pooled = pooled_statistics([tile.x for tile in tiles], released_groups(op.norm))
            tiles = [advance(tile, op, pooled) for tile in tiles]
        factor = tiles[0].size[0] // (padded[0].bottom - padded[0].top)
        out = z.new_empty(len(z), tiles[0].x.shape[1], size[0] * factor, size[1] * factor)
        for core, outer, tile in zip(cores, padded, tiles, strict=True):
            place, within = (Box(*(edge * factor for edge in box)) for box in (core, core.inside(outer)))
            place.of(out).copy_(within.of(tile.x))
        return out

    def cores(self, size: tuple[int, int]) -> list[Box]:
        """The boxes whose results are kept; those at the border reach it."""
        rows, columns = (self.spans(length) for length in size)
        return [Box(*row, *column) for row in rows for column in columns]

    def spans(self, length: int) -> list[tuple[int, int]]:
        """One axis of `cores`."""
        margin = RELEASED_MARGIN
        count = max(ceil((length - 2 * margin) / self.tile), 1)
        real = best_size(ceil((length - 2 * margin) / count), self.tile)
        found = []
        for i in range(count):
            first, last = margin + i * real, min(margin + (i + 1) * real, length)
            found.append((first if first > margin else 0, last if last < length - margin else length))
        return found


def best_size(least: int, most: int) -> int:
    """`least` raised to a multiple of 32, 16, 8, 4 or 2 (the first that stays within `most`), or as it is."""
    for divisor in (32, 16, 8, 4, 2):
        raised = ceil(least / divisor) * divisor
        if raised == least or raised <= most:
            return raised
    return least


def released_groups(norm: nn.GroupNorm) -> int:
    """The release's number of groups, whatever the network's; its own where the channels can't be split so."""
    return norm.num_groups if norm.num_channels % RELEASED_GROUPS else RELEASED_GROUPS


def pooled_statistics(parts: list[Tensor], groups: int) -> tuple[Tensor, Tensor]:
    """Means and within-tile variances of maps (B,C,h,w), averaged by pixel count, each (B, groups).

    That the tiles' means differ is ignored, as released.
    """
    share = torch.tensor([x.shape[2] * x.shape[3] for x in parts], dtype=torch.float32, device=parts[0].device)
    share = (share / share.sum())[:, None, None]
    moments = [torch.var_mean(x.reshape(len(x), groups, -1).float(), dim=2, correction=0) for x in parts]
    variance, mean = ((torch.stack(values) * share).sum(0) for values in zip(*moments, strict=True))
    return mean, variance
