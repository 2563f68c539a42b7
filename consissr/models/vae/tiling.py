"""The autoencoder on images too large for it: encoding and decoding tile by tile.

`exact`        equals the untiled result up to rounding: every GroupNorm sees the statistics of the whole image, every
               convolution the pixels it would see, the middle attention all positions.
`windowed`     the same, but the middle attention looks at windows, so its cost grows with the image's area only.
`as_released`  the decoder of CCSR's release: tiles padded by 11, norms with means and variances averaged over the
               padded tiles, attention per tile (the encoder runs untiled). An approximation; for comparisons.

How the first two save memory: the network is a list of operations, cut into segments. A segment's output is computed
tile by tile from its stored input, each tile read with the margin that its convolutions need. Before that, each norm
in the segment gets its statistics from a pass over the same tiles that ends at this norm. A map is stored, in 16 bits
(`Packed`), wherever it is of the latent's size or takes no more memory than a few tiles do; where maps are larger,
segments grow longer and work is repeated instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, prod

import torch
from torch import Tensor, nn

from consissr.config.loading import check_word
from consissr.errors import UserError
from consissr.models.vae.latents import Latents
from consissr.models.vae.operations import (
    Box,
    Op,
    Tile,
    advance,
    box_before,
    channels_after,
    decoder_ops,
    encoder_ops,
    size_after,
)

MODES = ("exact", "windowed", "as_released")
KEEP_TILES = 4
"""A map is stored if it is no larger than this many tiles at full resolution."""
RELEASED_MARGIN = 11
"""The margin of CCSR's decoder tiles, in latent pixels."""
RELEASED_GROUPS = 32
"""Groups of the norms in CCSR's decoder tiles, written into its code."""


class Statistics:
    """Mean and variance per image and group, gathered over tiles without loss (Chan's parallel formula), float64."""

    def __init__(self, groups: int):
        self.groups, self.count = groups, 0

    def add(self, x: Tensor) -> None:
        """Take in the values of a tile (B,C,h,w)."""
        variance, mean = torch.var_mean(x.reshape(len(x), self.groups, -1).float(), dim=2, correction=0)
        count, mean, spread = x[0].numel() // self.groups, mean.double(), variance.double()
        if not self.count:
            self.count, self.mean, self.spread = count, mean, spread * count
            return
        delta, total = mean - self.mean, self.count + count
        self.spread += spread * count + delta**2 * (self.count * count / total)
        self.mean, self.count = self.mean + delta * (count / total), total

    def result(self) -> tuple[Tensor, Tensor]:
        """(mean, variance), each (B, groups), float32."""
        return self.mean.float(), (self.spread / self.count).float()


class Packed:
    """A map (B,C,H,W) in 16-bit whole numbers, each piece of a row in steps of its own.

    A piece is `side` columns of one row and channel; what is read lies within half a 65534th of the piece's range of
    what was written. NaN and infinity come back as NaN.
    """

    def __init__(self, shape: tuple[int, int, int, int], side: int, like: Tensor) -> None:
        batch, channels, height, width = shape
        self.shape, self.side, self.dtype = shape, side, like.dtype
        self.values = torch.empty(shape, dtype=torch.int16, device=like.device)
        pieces = (batch, channels, height, ceil(width / side))
        self.middle, self.step = (torch.empty(pieces, device=like.device) for _ in range(2))

    def write(self, box: Box, x: Tensor) -> None:
        """Store x (B,C,h,w) at `box`, whose left side is a multiple of `side` and which ends so, or at the border."""
        for left in range(box.left, box.right, self.side):
            right, piece = min(left + self.side, box.right), left // self.side
            part = x[..., left - box.left : right - box.left].float()
            low, high = part.amin(3), part.amax(3)
            middle = (low + high) / 2
            step = ((high - low) / 65534).clamp_(min=torch.finfo(torch.float32).tiny)
            self.middle[:, :, box.top : box.bottom, piece], self.step[:, :, box.top : box.bottom, piece] = middle, step
            part = (part - middle[..., None]).div_(step[..., None]).round_()
            self.values[:, :, box.top : box.bottom, left:right] = part.clamp_(-32767, 32767)

    def read(self, box: Box) -> Tensor:
        """The map at any box, a copy."""
        first, last = box.left // self.side, ceil(box.right / self.side)
        x = box.of(self.values).float()
        for piece in range(first, last):
            left, right = max(piece * self.side, box.left) - box.left, (piece + 1) * self.side - box.left
            step, middle = (s[:, :, box.top : box.bottom, piece, None] for s in (self.step, self.middle))
            x[..., left:right].mul_(step).add_(middle)
        return x.to(self.dtype)


class Plain:
    """A map as it is: the first of a run, and the last. Reads and writes as `Packed` does."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape = x, tuple(x.shape)

    def write(self, box: Box, x: Tensor) -> None:
        """Store x at `box`."""
        box.of(self.x).copy_(x)

    def read(self, box: Box) -> Tensor:
        """The map at `box`, a view."""
        return box.of(self.x)


class TileRunner:
    """Runs a list of operations on a map (B,C,H,W) through tiles; `tile` is a side in latent pixels."""

    def __init__(self, ops: list[Op], tile: int, latent_size: tuple[int, int], windowed: bool) -> None:
        self.ops, self.tile, self.latent_size, self.windowed = ops, tile, latent_size, windowed
        self.statistics: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) through all operations; it is left as it is."""
        self.sizes, self.channels = [tuple(x.shape[2:])], [x.shape[1]]
        for op in self.ops:
            self.sizes.append(size_after(op, self.sizes[-1]))
            self.channels.append(channels_after(op, self.channels[-1]))
        self.like, source, start = x.new_empty(len(x), 0), Plain(x), 0
        del x
        for stop in self.cuts():
            source, start = self.segment(source, start, stop), stop
        return source.x

    def empty(self, i: int) -> Packed | Plain:
        """What the map after i operations is stored in."""
        shape = (len(self.like), self.channels[i], *self.sizes[i])
        return Plain(self.like.new_empty(shape)) if i == len(self.ops) else Packed(shape, self.side(i), self.like)

    def cuts(self) -> list[int]:
        """Where maps are stored: after these many operations. Never inside a residual block."""
        values = [channels * prod(size) for channels, size in zip(self.channels, self.sizes, strict=True)]
        budget = KEEP_TILES * max(values) * self.tile**2 / prod(self.latent_size)
        found, depth = [], 0
        for i, op in enumerate(self.ops):
            depth += (op.kind == "push") - (op.kind == "add")
            stored = values[i + 1] <= budget or self.sizes[i + 1] == self.latent_size
            following = self.ops[i + 1].kind if i + 1 < len(self.ops) else None
            if not depth and (stored or following in (None, "attention")):
                found.append(i + 1)
        return found

    def segment(self, source: Packed | Plain, start: int, stop: int) -> Packed | Plain:
        """Operations start..stop-1 on a stored map."""
        whole = Box(0, self.sizes[start][0], 0, self.sizes[start][1])
        if self.ops[start].kind == "attention" and not self.windowed:
            tile = advance(Tile(source.read(whole), whole, self.sizes[start]), self.ops[start], None)
            source.write(whole, tile.x)
            return source
        for i in range(start, stop):
            if self.ops[i].kind in ("norm", "attention"):
                norm = self.ops[i].module if self.ops[i].kind == "norm" else self.ops[i].module.group_norm
                gathered = Statistics(norm.num_groups)
                for box in self.boxes(i):
                    gathered.add(self.part(source, start, i, box))
                self.statistics[i] = gathered.result()
        same = source.shape[1:] == (self.channels[stop], *self.sizes[stop])
        windows = any(op.kind == "attention" for op in self.ops[start:stop])  # strips would be windows of full width
        if 0 < start and stop < len(self.ops) and same and not windows:
            return self.overwrite(source, start, stop)
        out = self.empty(stop)
        for box in self.boxes(stop):
            out.write(box, self.part(source, start, stop, box))
        return out

    def overwrite(self, source: Packed, start: int, stop: int) -> Packed:
        """The same in place: strips from top to bottom, each read together with the old rows above it."""
        height, width = self.sizes[stop]
        margin = height - 1 - self.needed(Box(height - 1, height, 0, width), start, stop).top
        rows = max(self.side(stop) ** 2 // width, margin, 1)
        above = source.read(Box(0, 0, 0, width))
        for top in range(0, height, rows):
            box = Box(top, min(top + rows, height), 0, width)
            needed = self.needed(box, start, stop)
            fresh = source.read(Box(top, needed.bottom, 0, width))
            strip = torch.cat([above[:, :, above.shape[2] - top + needed.top :], fresh], 2)
            above = fresh[:, :, : box.bottom - top].clone()
            source.write(box, self.through(Tile(strip, needed, self.sizes[start]), start, stop, box))
        return source

    def side(self, i: int) -> int:
        """The side of a tile of the map after i operations."""
        return max(self.tile * self.sizes[i][0] // self.latent_size[0], 1)

    def boxes(self, i: int) -> list[Box]:
        """Tiles of the map after i operations."""
        (height, width), side = self.sizes[i], self.side(i)
        return [
            Box(top, min(top + side, height), left, min(left + side, width))
            for top in range(0, height, side)
            for left in range(0, width, side)
        ]

    def part(self, source: Packed | Plain, start: int, stop: int, box: Box) -> Tensor:
        """The part `box` (B,C,h,w) of the map after `stop` operations, from the stored map after `start`."""
        needed = self.needed(box, start, stop)
        return self.through(Tile(source.read(needed), needed, self.sizes[start]), start, stop, box)

    def needed(self, box: Box, start: int, stop: int) -> Box:
        """What a part of the map after `stop` operations needs of the map after `start`."""
        for i in reversed(range(start, stop)):
            box = box_before(self.ops[i], box, self.sizes[i])
        return box

    def through(self, tile: Tile, start: int, stop: int, box: Box) -> Tensor:
        """A tile through operations start..stop-1, cut to `box`."""
        for i in range(start, stop):
            tile = advance(tile, self.ops[i], self.statistics.get(i))
        return box.inside(tile.box).of(tile.x)


class PooledTiles:
    """CCSR's released tiled decoder: padded tiles side by side through every operation, statistics averaged."""

    def __init__(self, ops: list[Op], tile: int):
        self.ops, self.tile = ops, tile

    def run(self, z: Tensor) -> Tensor:
        """(B,C,h,w) -> the decoder's output, tiles set side by side without blending."""
        size = tuple(z.shape[2:])
        cores = self.cores(size)
        padded = [core.grown(RELEASED_MARGIN, size) for core in cores]
        tiles = [Tile(x, Box(0, x.shape[2], 0, x.shape[3]), tuple(x.shape[2:])) for x in (b.of(z) for b in padded)]
        for op in self.ops:
            pooled = None
            if op.kind in ("norm", "attention"):
                norm = op.module if op.kind == "norm" else op.module.group_norm
                pooled = pooled_statistics([tile.x for tile in tiles], released_groups(norm))
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


class TiledLatents(Latents):
    """Latents whose autoencoder works in tiles of `tile` latent pixels a side, in one of the MODES.

    Shares the weights of the `latents` it is made from. Images that fit one tile go through untiled.
    """

    def __init__(self, latents: Latents, tile: int, mode: str = "exact") -> None:
        super().__init__(latents.vae)
        check_word(mode, MODES, "vae_tiling")
        if tile < 1:
            raise UserError(f"an autoencoder tile of {tile} latent pixels is too small: use at least 1")
        self.linear, self.tile, self.mode = latents.linear, tile, mode

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As Latents.moments."""
        size = (x.shape[2] // self.factor, x.shape[3] // self.factor)
        if max(size) <= self.tile or self.mode == "as_released":
            return super().moments(x)
        ops = [Op("fold", nn.PixelUnshuffle(self.patch)), *encoder_ops(self.vae)]
        mean, logvar = TileRunner(ops, self.tile, size, self.mode == "windowed").run(x).chunk(2, dim=1)
        if self.linear is not None:
            for small, large in self.both(size):
                small.of(mean).add_(self.linear.encode(large.of(x)))
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """As Latents.decode."""
        size = (z.shape[2], z.shape[3])
        if max(size) <= self.tile + (2 * RELEASED_MARGIN if self.mode == "as_released" else 0):
            return super().decode(z)
        z, ops = z / self.scale, [*decoder_ops(self.vae), Op("unfold", nn.PixelShuffle(self.patch))]
        if self.mode == "as_released":
            image = PooledTiles(ops, self.tile).run(z)
        else:
            image = TileRunner(ops, self.tile, size, self.mode == "windowed").run(z)
        if self.linear is not None:
            for small, large in self.both(size):
                large.of(image).add_(self.linear.decode(small.of(z)))
        return image

    def both(self, size: tuple[int, int]) -> Iterator[tuple[Box, Box]]:
        """Every tile as a box of the latent (h, w) and as a box of the image."""
        for top in range(0, size[0], self.tile):
            for left in range(0, size[1], self.tile):
                box = Box(top, min(top + self.tile, size[0]), left, min(left + self.tile, size[1]))
                yield box, Box(*(edge * self.factor for edge in box))
