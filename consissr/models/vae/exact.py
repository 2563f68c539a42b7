"""Tiles whose result is that of the whole map, up to rounding: every norm sees the statistics of all tiles.

How they save memory: the network is a list of operations, cut into segments. A segment's output is computed tile by
tile from its stored input, each tile read with the margin that its convolutions need. Before that, each norm in the
segment gets its statistics from a pass over the same tiles that ends at this norm. A map is stored wherever it is of
the latent's size or takes no more memory than a few tiles do; where maps are larger, segments grow longer and work is
repeated instead.

Maps are numbered: map i is what i operations make of the input, which is map 0. Operation i turns map i into map i + 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from torch import Tensor

from consissr.images.moments import Moments
from consissr.models.vae.operations import Box, Op, Tile, advance, box_before, channels_after, size_after

KEEP_TILES = 4
"""A map is stored if it is no larger than this many tiles of the largest map."""


class TileRunner:
    """Runs a list of operations on a map (B,C,H,W) through tiles; `tile` is a side in latent pixels."""

    def __init__(self, ops: list[Op], tile: int, latent_size: tuple[int, int]) -> None:
        self.ops, self.tile, self.latent_size = ops, tile, latent_size
        self.statistics: dict[int, tuple[Tensor, Tensor]] = {}
        """(mean, variance), each (B, groups) float32, by the number of the operation that has the norm."""

    def run(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) through all operations; it is left as it is."""
        self.measure(x)
        source, start = x, 0
        del x  # so that the first map is freed with its source
        for stop in self.cuts():
            source, start = self.segment(source, start, stop), stop
        return source

    def measure(self, x: Tensor) -> None:
        """Work out the size and channels of every map; there is one more than operations."""
        self.sizes, self.channels = [tuple(x.shape[2:])], [x.shape[1]]
        for op in self.ops:
            self.sizes.append(size_after(op, self.sizes[-1]))
            self.channels.append(channels_after(op, self.channels[-1]))
        self.like = x.new_empty(len(x), 0)  # batch size, type and device of all maps

    def cuts(self) -> list[int]:
        """The numbers of the maps that are stored: each ends a segment.

        Never one inside a residual block, whose input would have to be stored as well. Always the last one, and those
        before and after attention, which needs all positions at once and has the latent's size.
        """
        values = [channels * prod(size) for channels, size in zip(self.channels, self.sizes, strict=True)]
        budget = KEEP_TILES * max(values) * self.tile**2 / prod(self.latent_size)
        stored, open_blocks = [], 0
        for i, op in enumerate(self.ops, start=1):
            open_blocks += (op.kind == "push") - (op.kind == "add")
            small = values[i] <= budget or self.sizes[i] == self.latent_size
            if not open_blocks and (small or i == len(self.ops) or self.ops[i].kind == "attention"):
                stored.append(i)
        return stored

    def segment(self, source: Tensor, start: int, stop: int) -> Tensor:
        """Map `stop`, stored, from the stored map `start`."""
        if self.ops[start].kind == "attention":  # a segment of its own (see `cuts`): all positions at once
            whole = Box(0, self.sizes[start][0], 0, self.sizes[start][1])
            return advance(Tile(source, whole, self.sizes[start]), self.ops[start], None).x
        for i in range(start, stop):  # in this order: a norm's tiles pass through the norms before it
            if self.ops[i].norm is not None:
                self.set_statistics(i, (self.part(source, start, i, box) for box in self.boxes(i)))
        out = self.like.new_empty(len(self.like), self.channels[stop], *self.sizes[stop])
        for box in self.boxes(stop):
            box.of(out).copy_(self.part(source, start, stop, box))
        return out

    def set_statistics(self, i: int, parts: Iterable[Tensor]) -> None:
        """Work out the statistics of the norm in operation i from the parts (B,C,h,w) of map i."""
        moments = Moments(self.ops[i].norm.num_groups)
        for part in parts:
            moments.add(part)
        self.statistics[i] = tuple(moment.float() for moment in moments.result())

    def side(self, i: int) -> int:
        """The side of a tile of map i."""
        return max(self.tile * self.sizes[i][0] // self.latent_size[0], 1)

    def boxes(self, i: int) -> list[Box]:
        """Tiles of map i."""
        (height, width), side = self.sizes[i], self.side(i)
        return [
            Box(top, min(top + side, height), left, min(left + side, width))
            for top in range(0, height, side)
            for left in range(0, width, side)
        ]

    def part(self, source: Tensor, start: int, stop: int, box: Box) -> Tensor:
        """The part `box` (B,C,h,w) of map `stop`, from the stored map `start`."""
        needed = self.needed(box, start, stop)
        return self.through(Tile(needed.of(source), needed, self.sizes[start]), start, stop, box)

    def needed(self, box: Box, start: int, stop: int) -> Box:
        """What a part of map `stop` needs of map `start`."""
        for i in reversed(range(start, stop)):
            box = box_before(self.ops[i], box, self.sizes[i])
        return box

    def through(self, tile: Tile, start: int, stop: int, box: Box) -> Tensor:
        """A tile through operations start..stop-1, cut to `box`."""
        for i in range(start, stop):
            tile = advance(tile, self.ops[i], self.statistics.get(i))
        return box.inside(tile.box).of(tile.x)
