"""How much memory a device has, what tiles fit into it, and whether an error says that it ran out."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from consissr.config.sampler import SamplerConfig
from consissr.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD = -1, -3, 2**25
"""glibc's names (malloc.h), and the largest value that it takes."""
LITTLE, KEPT = 2**30, 2**28
"""Models of fewer bytes keep so many freed ones on the CPU: the system takes a tenth of their time to provide them."""
GLIBC_KEPT = 2**26
"""What glibc keeps by itself once it has freed large blocks: twice LARGEST_MMAP_THRESHOLD."""
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
SMALLEST_TILE = 16
"""Latent pixels; smaller tiles are not tried when memory runs out."""
LARGEST_TILE = 128
"""Latent pixels; larger autoencoder tiles save no time."""
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED")
"""What plain RuntimeErrors say of it: the CPU's allocator, CUDA's driver, cuBLAS and cuDNN, which allocate by
themselves."""
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
        shrunk = Tiles(halves[0], max(halves[0] * 3 // 4, 1), halves[1])
        return None if shrunk == self or largest <= SMALLEST_TILE else shrunk


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a device; for the CPU what the container may use. The same at every call, so that choices
    made from it, and with them the results, do not depend on what else is running."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    limits = [psutil.virtual_memory().total]
    for path in map(Path, CGROUP_LIMITS):
        text = path.read_text().strip() if path.is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def weight_bytes(networks: Iterable[nn.Module]) -> int:
    """Bytes of their parameters."""
    return sum(parameter.nbytes for network in networks for parameter in network.parameters())


def c_function(name: str) -> Callable[..., int]:
    """A function of glibc's heap; one that does nothing where there is no glibc, whose ways they correct."""
    found = getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
    return found or (lambda *arguments: 0)


def keep_freed(size: int) -> None:
    """Let the heap keep up to `size` bytes that were freed: to take them again costs a page fault every 4 KB."""
    c_function("mallopt")(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    c_function("mallopt")(M_TRIM_THRESHOLD, size)


def give_back() -> None:
    """Hand freed memory back to the system between stages: glibc keeps it, though the next needs other sizes."""
    c_function("malloc_trim")(0)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate memory, on an accelerator or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


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
