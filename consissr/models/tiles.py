"""Which tiles the networks work in: as the settings ask, else what an image's size and the memory call for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil

import torch

from consissr.config.sampler import SamplerConfig
from consissr.errors import UserError
from consissr.models.denoiser import Denoiser
from consissr.models.memory import total_memory
from consissr.models.vae.latents import Latents
from consissr.models.vae.sampled import PATCH, PATCHES

TILE = 512
"""Pixels: the least side of automatic diffusion tiles of a model that takes any size. Smaller ones spend more on
overlaps, larger ones on attention (`scripts/bench.py tiles`)."""
OVERLAP = 3 / 32
"""How far automatic diffusion tiles overlap, by their side: more costs time and changes hardly anything."""
UNTILED_AREA = 2
"""Latents up to this many times a diffusion tile's area are denoised in one piece, memory permitting."""
VAE_TILE, VAE_UNTILED = 1024, 2**22
"""Pixels: the largest side of automatic autoencoder tiles, and the least area that needs some on the CPU."""
SMALLEST_TILE = 16
"""Latent pixels; smaller tiles are not tried when memory runs out."""

OnTile = Callable[[int, int, float], None]
"""(tiles done, tiles in all, share of the work done): told after each tile of an image."""


@dataclass(frozen=True)
class Tiles:
    """Tiles in latent pixels; 0: in one piece."""

    diffusion: tuple[int, int] = (0, 0)
    """Height and width of the UNet's windows."""
    stride: tuple[int, int] = (0, 0)
    """From one window to the next, down and across."""
    vae: int = 0
    """Side of the autoencoder's."""
    vae_tiling: str = "exact"
    """How the autoencoder works in them."""
    alike: bool = field(default=False, compare=False)
    """Whether the norms of all windows have the same statistics where a plan has one evaluation (norms.py)."""
    count: Callable[[int], None] = field(default=lambda area: None, compare=False, repr=False)
    """Called with the area of each tile that is done."""

    def smaller(self, height: int, width: int) -> Tiles | None:
        """Half the tiles, for a latent of height x width; None when they cannot get smaller."""
        largest = max(height, width)
        half, vae = (max(min(side or largest, largest) // 2, SMALLEST_TILE) for side in (max(self.diffusion), self.vae))
        halved = replace(self, diffusion=(half, half), stride=(half * 3 // 4,) * 2, vae=vae)
        return None if halved == self or largest <= SMALLEST_TILE else halved

    def reporting(self, tell: OnTile | None, height: int, width: int, evaluations: int) -> Tiles:
        """The same, but `tell` is called after each tile of an image whose latent has height x width.

        The image is encoded and decoded once and passes the denoiser `evaluations` times.
        """
        if tell is None:
            return self
        number = area = 0
        if self.vae and max(height, width) > self.vae and self.vae_tiling != "as_released":  # which tells nothing
            tiles = ceil(height / self.vae) * ceil(width / self.vae) if self.vae_tiling == "sampled" else 1
            number, area = 2 * tiles, 2 * height * width
        if self.diffusion[0]:
            down, across = map(windows_along, (height, width), self.diffusion, self.stride)
            if down * across > 1:
                number += evaluations * down * across
                area += evaluations * down * across * min(self.diffusion[0], height) * min(self.diffusion[1], width)
        done = [0, 0]

        def count(tile_area: int) -> None:
            done[0] += 1
            done[1] += tile_area
            tell(min(done[0], number), number, min(done[1] / area, 1.0))

        return replace(self, count=count) if number else self


def in_batch(tell: OnTile, rows: slice, images: int) -> OnTile:
    """`tell`, told by the `rows` of a batch of so many images, gets the share of the whole batch's work."""
    return lambda done, number, share: tell(done, number, (rows.start + share * (rows.stop - rows.start)) / images)


def tiles_for(
    config: SamplerConfig,
    denoiser: Denoiser,
    latents: Latents,
    size: tuple[int, int],
    images: int,
    device: torch.device,
    fixed: bool = False,
) -> Tiles:
    """Tiles for `images` prepared images of `size` (H, W) in pixels. fixed: see Needs."""
    unet, factor = denoiser.unet, latents.factor
    per_value = next(unet.parameters()).dtype.itemsize * images
    needs = Needs(
        trained=unet.config.sample_size if isinstance(unet.config.sample_size, int) else 0,
        one_size=any(name.endswith("position_emb") for name, _ in unet.named_parameters()),
        multiple=2 ** (len(unet.config.block_out_channels) - 1),
        unet_bytes=100 * unet.config.block_out_channels[0] * per_value,
        vae_bytes=8 * latents.vae.config.block_out_channels[0] * (factor // latents.patch) ** 2 * per_value,
        fixed=fixed,
    )
    on_cpu = device.type == "cpu"
    return choose_tiles(config, (size[0] // factor, size[1] // factor), factor, needs, total_memory(device), on_cpu)


@dataclass(frozen=True)
class Needs:
    """What the choice of tiles has to know of the networks."""

    trained: int
    """Latent side that the UNet was trained at, as its configuration says; 0 where that says nothing."""
    one_size: bool
    """Whether it knows that side only (learned positions)."""
    multiple: int
    """What the sides of a latent are multiples of."""
    unet_bytes: int
    """Working memory of the UNet per latent pixel, estimated."""
    vae_bytes: int
    """The same of the autoencoder."""
    fixed: bool = False
    """Whether automatic windows have one shape for all images, which is recorded once (compiled networks on a GPU)."""


def choose_tiles(
    config: SamplerConfig, latent_size: tuple[int, int], factor: int, needs: Needs, memory: int, on_cpu: bool = True
) -> Tiles:
    """Tiles as `config` asks, or where it leaves the choice (-1, auto) by these rules.

    The UNet works in windows where a model knows one size only and the latent is larger, where the latent has more than
    UNTILED_AREA times a window's area, or where a quarter of the memory would not do. A window has the side that the
    model was trained at; for models that take any size it has at least TILE pixels, and windows share the latent evenly
    with OVERLAP. What the configuration of the UNet does not say makes no difference to the cost. Learned
    positions of a side below TILE pixels are interpolated, as nano's are.

    Windows of a model made at TILE pixels have norms of their own, as in its training; those of smaller models share.

    The autoencoder works in tiles where a quarter of the memory would not do, and on the CPU from VAE_UNTILED pixels:
    `sampled` where a sample of the image fits into an eighth of the memory, else `exact`, on the CPU of at most TILE
    pixels: what a large image takes above a small one is then little beside SD2.1's weights.
    """
    diffusion, stride = _diffusion(config, latent_size, factor, needs, memory)
    vae = _in_latents(config.vae_tile, factor, "vae_tile")
    tiling, area = config.vae_tiling, latent_size[0] * latent_size[1]
    if tiling == "auto":
        tiling = "sampled" if PATCHES * PATCH**2 * needs.vae_bytes <= memory / 8 else "exact"
    if vae < 0:
        fitting = int((memory / 16 / needs.vae_bytes) ** 0.5)
        largest = TILE if on_cpu and tiling == "exact" else VAE_TILE
        whole = area * needs.vae_bytes <= memory / 4 and not (on_cpu and area * factor**2 >= VAE_UNTILED)
        vae = 0 if whole else min(max(fitting, SMALLEST_TILE), max(largest // factor, SMALLEST_TILE))
    alike = needs.trained * factor < TILE and config.tile_weights == "symmetric"
    return Tiles(diffusion, stride, vae, tiling, alike)


def _diffusion(
    config: SamplerConfig, latent_size: tuple[int, int], factor: int, needs: Needs, memory: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Windows of the UNet and their strides."""
    side = _in_latents(config.tile, factor, "tile")
    overlap = config.tile_overlap // factor if config.tile_overlap >= 0 else None
    if side < 0:
        free = not needs.one_size or needs.trained * factor < TILE
        side = max(needs.trained, TILE // factor) if free else needs.trained
        area = latent_size[0] * latent_size[1]
        must = not free or area > UNTILED_AREA * side**2 or area * needs.unet_bytes > memory / 4
        if not must or max(latent_size) <= side:
            return (0, 0), (0, 0)
        if free:
            if overlap is None:
                overlap = max(int(OVERLAP * side / needs.multiple), 1) * needs.multiple
            _check_overlap(config, overlap, side, factor)
            if needs.fixed:
                return (side, side), (side - overlap, side - overlap)
            down, across = (evenly(length, side, overlap, needs.multiple) for length in latent_size)
            return (down[0], across[0]), (down[1], across[1])
    overlap = side // 4 if overlap is None else overlap
    if side:
        _check_overlap(config, overlap, side, factor)
    return (side, side), (side - overlap, side - overlap)


def evenly(length: int, side: int, overlap: int, multiple: int) -> tuple[int, int]:
    """Side and stride of windows that share `length` evenly: about `side`, a multiple, overlapping by `overlap`."""
    number = max(round((length - overlap) / (side - overlap)), 1)
    even = ceil((length + (number - 1) * overlap) / number / multiple) * multiple
    return even, even - overlap if even > overlap else even


def windows_along(length: int, side: int, stride: int) -> int:
    """How many windows of `side`, `stride` apart, cover `length`."""
    return 1 + max(ceil((length - side) / stride), 0)


def _check_overlap(config: SamplerConfig, overlap: int, side: int, factor: int) -> None:
    if overlap >= side:
        raise UserError(f"tile overlap {config.tile_overlap} must be smaller than the tile, {side * factor} px")


def _in_latents(side: int, factor: int, name: str) -> int:
    """Pixels to latent pixels; 0 and -1 keep their meaning."""
    if 0 < side < factor:
        raise UserError(f"{name} {side} is smaller than one latent pixel, {factor} px: use a larger one or 0 for off")
    return side // factor if side > 0 else side
