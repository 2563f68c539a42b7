"""Which tiles the networks work in: as the settings ask, else what an image's size and the memory call for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from consissr.config.sampler import SamplerConfig
from consissr.errors import UserError
from consissr.models.denoiser import Denoiser
from consissr.models.memory import total_memory
from consissr.models.vae.latents import Latents

SMALLEST_TILE = 16
"""Latent pixels; smaller tiles are not tried when memory runs out."""
LARGEST_TILE = 128
"""Latent pixels; larger autoencoder tiles save no time."""
UNTILED_AREA = 4
"""Latents up to this many times the area that the UNet was trained at are denoised in one piece, memory permitting."""


@dataclass(frozen=True)
class Tiles:
    """Tile sides in latent pixels; 0 means in one piece."""

    diffusion: int
    stride: int
    vae: int

    def smaller(self, height: int, width: int) -> Tiles | None:
        """Half the tiles, for a latent of height x width; None when they cannot get smaller."""
        largest = max(height, width)
        halves = [max(min(side or largest, largest) // 2, SMALLEST_TILE) for side in (self.diffusion, self.vae)]
        halved = Tiles(halves[0], max(halves[0] * 3 // 4, 1), halves[1])
        return None if halved == self or largest <= SMALLEST_TILE else halved


def tiles_for(
    config: SamplerConfig, denoiser: Denoiser, latents: Latents, size: tuple[int, int], count: int, device: torch.device
) -> Tiles:
    """Tiles for `count` prepared images of `size` (H, W) in pixels."""
    unet, vae, factor = denoiser.unet, latents.vae.config, latents.factor
    one_size = any(name.endswith("position_emb") for name, _ in unet.named_parameters())
    per_value = next(unet.parameters()).dtype.itemsize * count
    bytes_per_latent_pixel = (
        100 * unet.config.block_out_channels[0] * per_value,
        8 * vae.block_out_channels[0] * (factor // latents.patch) ** 2 * per_value,
    )
    latent = (size[0] // factor, size[1] // factor)
    trained = unet.config.sample_size
    side = trained if isinstance(trained, int) else max(latent)
    return choose_tiles(config, latent, factor, side, one_size, bytes_per_latent_pixel, total_memory(device))


def choose_tiles(
    config: SamplerConfig,
    latent_size: tuple[int, int],
    factor: int,
    trained_side: int,
    one_size: bool,
    bytes_per_latent_pixel: tuple[int, int],
    memory: int,
) -> Tiles:
    """Tiles as `config` asks, or where it leaves the choice (-1) by these rules.

    The UNet works in tiles of the side it was trained at when the latent is larger than that and either the model knows
    one size only (`one_size`: learned positions), or its area is UNTILED_AREA times larger, or a quarter of the memory
    would not do. The autoencoder works in tiles when a quarter of the memory would not do. bytes_per_latent_pixel:
    working memory of (UNet, autoencoder), estimated.
    """
    area, largest = latent_size[0] * latent_size[1], max(latent_size)
    unet_bytes, vae_bytes = (area * each for each in bytes_per_latent_pixel)
    diffusion = _in_latents(config.tile, factor, "tile")
    if diffusion < 0:
        must = one_size or area > UNTILED_AREA * trained_side**2 or unet_bytes > memory / 4
        diffusion = trained_side if must and largest > trained_side else 0
    vae = _in_latents(config.vae_tile, factor, "vae_tile")
    if vae < 0:
        fitting = int((memory / 16 / bytes_per_latent_pixel[1]) ** 0.5)
        vae = min(max(fitting, SMALLEST_TILE), LARGEST_TILE) if vae_bytes > memory / 4 else 0
    overlap = diffusion // 4 if config.tile_overlap < 0 else config.tile_overlap // factor
    if diffusion and overlap >= diffusion:
        raise UserError(f"tile overlap {config.tile_overlap} must be smaller than the tile, {diffusion * factor} px")
    return Tiles(diffusion, diffusion - overlap, vae)


def _in_latents(side: int, factor: int, name: str) -> int:
    """Pixels to latent pixels; 0 and -1 keep their meaning."""
    if 0 < side < factor:
        raise UserError(f"{name} {side} is smaller than one latent pixel, {factor} px: use a larger one or 0 for off")
    return side // factor if side > 0 else side
