"""Blur kernels of the Real-ESRGAN degradation: six Gaussian-like families and the circular low-pass (sinc) filter.

The formulas are those of basicsr's `degradations.py` (Wang et al., "Real-ESRGAN", 2021, section 3.1; generalized
Gaussian: Pascal et al. 2013). Every function returns a float32 tensor [k, k] that sums to one.
"""

import math

import torch

FAMILIES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
SIZES = (7, 9, 11, 13, 15, 17, 19, 21)


def _offsets(size: int) -> torch.Tensor:
    """Integer distances to the kernel's centre, [size] float64."""
    return torch.arange(size, dtype=torch.float64) - (size - 1) / 2


def gaussian_like(family: str, size: int, sigma_x: float, sigma_y: float, angle: float, beta: float) -> torch.Tensor:
    """One kernel [size, size] of a family. Sigmas in pixels, angle in radians, beta the shape (1 is the Gaussian).

    With q the squared Mahalanobis distance: exp(-q^beta / 2) for (generalized) Gaussians, 1 / (1 + q^beta) for
    plateaus. The isotropic families ignore `sigma_y` and `angle`, the plain ones ignore `beta`.
    """
    along = _offsets(size)
    y, x = along[:, None], along[None, :]
    if family.endswith("aniso"):
        cos, sin = math.cos(angle), math.sin(angle)
        q = ((x * cos + y * sin) / sigma_x) ** 2 + ((y * cos - x * sin) / sigma_y) ** 2
    else:
        q = (x**2 + y**2) / sigma_x**2
    if family.startswith("plateau"):
        kernel = 1 / (1 + q**beta)
    elif family.startswith("generalized"):
        kernel = torch.exp(-0.5 * q**beta)
    else:
        kernel = torch.exp(-0.5 * q)
    return (kernel / kernel.sum()).float()


def low_pass(size: int, cutoff: float) -> torch.Tensor:
    """Circular low-pass filter [size, size]; `cutoff` in radians per pixel, pi at most.

    cutoff J1(cutoff r) / (2 pi r), at the centre its limit cutoff^2 / (4 pi).
    """
    along = _offsets(size)
    r = (along[:, None] ** 2 + along[None, :] ** 2).sqrt()
    r[size // 2, size // 2] = 1
    kernel = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return (kernel / kernel.sum()).float()
