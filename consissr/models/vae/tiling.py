"""The autoencoder on images too large for it: encoding and decoding tile by tile.

`exact`        equals the untiled result up to rounding: every GroupNorm sees the statistics of the whole image, every
               convolution the pixels it would see, the middle attention all positions.
`sampled`      one pass: the norms' statistics come from a sample of the image, and the middle attention looks at
               windows, so its cost grows with the image's area only.
`as_released`  the tiled decoder of CCSR's release (released.py); the encoder runs untiled. For comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from consissr.models.memory import trim_heap
from consissr.models.vae.exact import TileRunner
from consissr.models.vae.latents import Latents
from consissr.models.vae.operations import Box, Op, decoder_ops, encoder_ops
from consissr.models.vae.released import RELEASED_MARGIN, PooledTiles
from consissr.models.vae.sampled import SampledTiles


class TiledLatents(Latents):
    """Latents whose autoencoder works in tiles of `tile` latent pixels a side, in one of the modes above.

    Shares the weights of the `latents` it is made from. Images that fit one tile go through untiled.
    """

    def __init__(
        self, latents: Latents, tile: int, mode: str = "exact", on_tile: Callable[[int], None] = lambda area: None
    ) -> None:
        """on_tile: called with the area in latent pixels of each tile of `sampled`, of the whole of `exact`."""
        nn.Module.__init__(self)  # what Latents does beside draws the random weights of a linear path
        self.vae, self.linear, self.scale, self.channels = latents.vae, latents.linear, latents.scale, latents.channels
        self.patch, self.factor = latents.patch, latents.factor
        self.tile, self.mode, self.on_tile = tile, mode, on_tile

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As Latents.moments."""
        size = (x.shape[2] // self.factor, x.shape[3] // self.factor)
        if max(size) <= self.tile or self.mode == "as_released":
            return super().moments(x)
        ops = [Op("fold", nn.PixelUnshuffle(self.patch)), *encoder_ops(self.vae)]
        mean, logvar = self.through(ops, x, size).chunk(2, dim=1)
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
            image = self.through(ops, z, size)
        if self.linear is not None:
            for small, large in self.both(size):
                large.of(image).add_(self.linear.decode(small.of(z)))
        return image

    def through(self, ops: list[Op], x: Tensor, size: tuple[int, int]) -> Tensor:
        """x through operations in tiles; `size` is the latent's."""
        trim_heap()  # what the work before freed makes room, and so does what this frees
        if self.mode == "sampled":
            out = SampledTiles(ops, self.tile, size, self.on_tile).run(x)
        else:
            out = TileRunner(ops, self.tile, size).run(x)
            self.on_tile(size[0] * size[1])
        trim_heap()
        return out

    def both(self, size: tuple[int, int]) -> Iterator[tuple[Box, Box]]:
        """Every tile as a box of the latent (h, w) and as a box of the image."""
        for top in range(0, size[0], self.tile):
            for left in range(0, size[1], self.tile):
                box = Box(top, min(top + self.tile, size[0]), left, min(left + self.tile, size[1]))
                yield box, Box(*(edge * self.factor for edge in box))
