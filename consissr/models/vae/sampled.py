"""Tiles in one pass: the norms' statistics come from a sample of patches, spread evenly over the map.

Where a whole map does not fit, `exact` tiles need a pass per norm. Here a sample of the map goes through the network
first, all patches side by side, and each norm takes its statistics from them; then each tile goes through the whole
network once. All tiles share these statistics, so no border shows between them; the middle attention looks at windows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from consissr.models.memory import trim_heap
from consissr.models.vae.exact import TileRunner
from consissr.models.vae.operations import Box, Op, Tile, advance

PATCH = 48
"""Side of a patch of the sample, in latent pixels: convolutions without padding use up to 25 of it."""
PATCHES, LEAST_SHARE, LARGEST_SHARE = 64, 1 / 32, 1 / 2
"""So many patches make a sample, but no less and no more than these shares of the map's area."""


class SampledTiles(TileRunner):
    """Runs a list of operations on a map (B,C,H,W) through tiles, once each; `tile` is a side in latent pixels.

    on_tile: called with a tile's area in latent pixels when it is done.
    """

    def __init__(
        self, ops: list[Op], tile: int, latent_size: tuple[int, int], on_tile: Callable[[int], None] = lambda area: None
    ) -> None:
        super().__init__(ops, tile, latent_size)
        self.on_tile = on_tile

    def run(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) through all operations; it is left as it is."""
        self.measure(x)
        last = len(self.ops)
        self.sample(x)
        out = torch.empty(len(x), self.channels[last], *self.sizes[last], dtype=x.dtype, device=x.device)
        for box in self.boxes(last):
            if not box.left:
                trim_heap()  # what tiles freed lies in pieces between what stays: hundreds of megabytes over time
            box.of(out).copy_(self.part(x, 0, last, box))
            self.on_tile(self.tile**2)
        return out

    def sample(self, x: Tensor) -> None:
        """Gather the statistics of every norm from patches, which shrink where convolutions eat their borders."""
        patches = [Tile(box.of(x), box, self.sizes[0]) for box in self.patches()]
        for i, op in enumerate(self.ops):
            if op.norm is not None:
                self.set_statistics(i, (patch.x for patch in patches))
            patches = [advance(patch, op, self.statistics.get(i)) for patch in patches]

    def patches(self) -> list[Box]:
        """Where the sample lies in the first map: the middles of the cells of an even grid."""
        height, width = self.latent_size
        whole = height * width / PATCH**2
        count = min(max(PATCHES, whole * LEAST_SHARE), whole * LARGEST_SHARE)
        rows = max(round((count * height / width) ** 0.5), 1)
        columns = max(round(count / rows), 1)
        factor = self.sizes[0][0] // height
        boxes = [Box(*down, *across) for down in spans(height, rows) for across in spans(width, columns)]
        return [Box(*(edge * factor for edge in box)) for box in boxes]


def spans(length: int, count: int) -> list[tuple[int, int]]:
    """`count` spans of PATCH each (or of the whole length), centred in equal parts of 0..length; equal ones once."""
    side = min(PATCH, length)
    firsts = [min(max(round((i + 0.5) * length / count - side / 2), 0), length - side) for i in range(count)]
    return [(first, first + side) for first in dict.fromkeys(firsts)]
