"""PSNR and SSIM as this field computes them. Needs torch only, so training may import it.

Images are float RGB, shape (N, 3, H, W), range [0, 1]; every function returns one float64 value per image, shape (N,).

The conventions were recovered from published per-image logs (OSEDiff's, which pyiqa 0.1.10 wrote) and reproduce them
to 1e-5 dB and 1e-6: PSNR on the unrounded Y of ITU-R BT.601 video range; SSIM on Y * 255 rounded to integers, with an
11 x 11 Gaussian window (sigma 1.5), no padding, and the contrast-structure map clamped at zero. pyiqa's own default
colour space ("yiq", full range) gives 20 log10(255 / 219) = 1.32 dB less PSNR.
"""

import torch

from consissr.errors import UserError

Y_WEIGHTS = (65.481, 128.553, 24.966)  # BT.601, for RGB in [0, 1] and Y in [16, 235]
Y_OFFSET = 16.0
PSNR_EPS, IDENTICAL = 1e-8, 80.0  # keeps identical images finite; their PSNR in dB
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def luma(image: torch.Tensor) -> torch.Tensor:
    """Y of YCbCr, (N, 3, H, W) in [0, 1] -> (N, 1, H, W) in [16/255, 235/255], unrounded, in the input's precision."""
    weights = image.new_tensor(Y_WEIGHTS).view(1, 3, 1, 1)
    return ((image * weights).sum(dim=1, keepdim=True) + Y_OFFSET) / 255.0


def crop_border(image: torch.Tensor, pixels: int) -> torch.Tensor:
    """`image` (..., H, W) without its outer `pixels` rows and columns; UserError if nothing would be left."""
    if pixels == 0:
        return image
    height, width = image.shape[-2:]
    if min(height, width) <= 2 * pixels:
        raise UserError(
            f"an image of {width}x{height} is too small to crop {pixels} pixels from each side: use another protocol"
        )
    return image[..., pixels:-pixels, pixels:-pixels]


def psnr(sr: torch.Tensor, hr: torch.Tensor, space: str = "y") -> torch.Tensor:
    """Peak signal-to-noise ratio in dB over Y (`space` "y") or over the three channels ("rgb")."""
    sr, hr = (_checked(image).double() for image in _pair(sr, hr))
    if space == "y":
        sr, hr = luma(sr), luma(hr)
    mse = (sr - hr).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(1.0 / (mse + PSNR_EPS))


def ssim(sr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) over the rounded Y."""
    sr, hr = (_checked(image).float() for image in _pair(sr, hr))
    if min(sr.shape[-2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM needs images of at least {SSIM_WINDOW} pixels, these have {tuple(sr.shape[-2:])}")
    x, y = ((luma(image) * 255.0).round().double() for image in (sr, hr))
    count = x.shape[0]
    blurred = gaussian_blur(torch.cat([x, y, x * x, y * y, x * y]), SSIM_WINDOW, SSIM_SIGMA)
    mean_x, mean_y, square_x, square_y, product = blurred.split(count)
    variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
    covariance = product - mean_x * mean_y
    contrast = (2 * covariance + SSIM_C2) / (variance_x + variance_y + SSIM_C2)
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    return (luminance * contrast.clamp(min=0)).flatten(1).mean(dim=1)


def gaussian_blur(image: torch.Tensor, size: int, sigma: float) -> torch.Tensor:
    """Separable Gaussian of `size` taps without padding: (N, 1, H, W) -> (N, 1, H - size + 1, W - size + 1).

    Terms are multiplied, then added in a fixed order, along rows, then along columns. A convolution leaves that order
    to the machine, which matters to NIQE (see there), and is eight times slower in float64.
    """
    offsets = torch.arange(size, dtype=image.dtype, device=image.device) - (size - 1) / 2
    taps = torch.exp(-(offsets**2) / (2 * sigma**2))
    taps = taps / taps.sum()
    for axis in (-1, -2):
        length = image.shape[axis] - size + 1
        image = sum(image.narrow(axis, index, length) * tap for index, tap in enumerate(taps))
    return image


def _checked(image: torch.Tensor) -> torch.Tensor:
    if image.ndim != 4 or image.shape[1] != 3:
        raise UserError(f"metrics take images of shape (N, 3, H, W), not {tuple(image.shape)}")
    low, high = image.amin().item(), image.amax().item()
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # written so that NaN fails too
        raise UserError(f"metrics take values in [0, 1], these lie in [{low:g}, {high:g}]")
    return image


def _pair(sr: torch.Tensor, hr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if sr.shape != hr.shape:
        raise UserError(f"the images have different shapes: {tuple(sr.shape)} and {tuple(hr.shape)}")
    return sr, hr
