"""NIQE, the natural image quality evaluator (Mittal, Soundararajan, Bovik: "Making a completely blind image quality
analyzer", 2012). Lower is better; natural photographs lie near 3 to 6.

Written from the paper. The statistics of its pristine photographs (mean and covariance of 36 features) are the
authors', in niqe_pristine.json beside this file, which names its source and terms. Two conventions follow pyiqa, whose
values the SR papers print: luminance is full-range 0.299 R + 0.587 G + 0.114 B rounded to integers, and borders of the
7 x 7 Gaussian repeat the edge pixel.
"""

import json
from functools import lru_cache
from importlib.resources import files

import torch
import torch.nn.functional as F

from consissr.errors import UserError
from consissr.evaluation.metrics import gaussian_blur

BLOCK = 96  # pixels per side of a patch at the first scale, half of it at the second
WINDOW, SIGMA = 7, 7 / 6
GRAY_WEIGHTS = (299, 587, 114)  # per thousand: whole numbers keep ties exact, so every machine rounds alike
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))  # neighbours: right, below, and the two diagonals
HALVING_TAPS = (-0.01171875, -0.03515625, 0.11328125, 0.43359375)  # see `halve`


def niqe(image: torch.Tensor) -> torch.Tensor:
    """NIQE of RGB images: (N, 3, H, W) in [0, 1], at least 2 blocks of 96 x 96 -> (N,) float64.

    NaN for an image with fewer than two blocks that are not flat.
    """
    rows, columns = image.shape[-2] // BLOCK, image.shape[-1] // BLOCK
    if rows * columns < 2:
        raise UserError(
            f"NIQE needs an image of at least {BLOCK}x{2 * BLOCK}, this one is {image.shape[-1]}x{image.shape[-2]}"
        )
    levels = (image.double() * 255.0).round()[..., : rows * BLOCK, : columns * BLOCK]
    gray = ((levels * levels.new_tensor(GRAY_WEIGHTS).view(1, 3, 1, 1)).sum(1, keepdim=True) / 1000).round()
    features = torch.cat([block_features(gray, BLOCK), block_features(halve(gray), BLOCK // 2)], dim=-1)
    return torch.stack([distance(blocks) for blocks in features])  # features: (N, blocks, 36)


def distance(blocks: torch.Tensor) -> torch.Tensor:
    """Distance between the Gaussian of an image's blocks, (blocks, 36), and that of pristine photographs (Eq. 10).

    A block with an undefined feature (it is flat) leaves the covariance, and that feature leaves the mean. Two blocks
    must remain for a covariance, else the distance is NaN.
    """
    whole = blocks[~blocks.isnan().any(dim=1)]
    if len(whole) < 2:
        return blocks.new_tensor(float("nan"))
    pristine_mean, pristine_covariance = pristine()
    mean = blocks.nanmean(dim=0)
    covariance = whole.T.cov()
    difference = pristine_mean - mean
    return (difference @ torch.linalg.pinv((pristine_covariance + covariance) / 2) @ difference).sqrt()


def block_features(gray: torch.Tensor, size: int) -> torch.Tensor:
    """18 features of each size x size block: (N, 1, H, W) in [0, 255] -> (N, blocks, 18)."""
    blocks = F.unfold(normalized(gray), size, stride=size).transpose(1, 2).unflatten(2, (size, size))
    alpha, left, right = asymmetric_gaussian(blocks)
    features = [alpha, (left + right) / 2]
    for shift in SHIFTS:
        alpha, left, right = asymmetric_gaussian(blocks * blocks.roll(shift, dims=(2, 3)))
        mean = (right - left) * torch.exp(torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha))  # Eq. 8
        features += [alpha, mean, left, right]
    return torch.stack(features, dim=-1)


def normalized(gray: torch.Tensor) -> torch.Tensor:
    """Local mean removed, local contrast divided out (Eq. 1): (N, 1, H, W), 0..255 -> the same shape.

    In perfectly flat areas (saturated sky) the mean differs from the pixel by rounding alone, and the fits below count
    the sign of that difference. `gaussian_blur` adds in a fixed order; other orders move NIQE by up to 0.1.
    """
    padded = F.pad(gray, [WINDOW // 2] * 4, mode="replicate")
    mean = gaussian_blur(padded, WINDOW, SIGMA)
    deviation = (gaussian_blur(padded**2, WINDOW, SIGMA) - mean**2).abs().sqrt()
    return (gray - mean) / (deviation + 1)


def asymmetric_gaussian(samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moment fit of the asymmetric generalised Gaussian (Eq. 7).

    (..., h, w) -> shape, left scale and right scale, each (...).
    """
    square = samples**2
    left, right = (
        torch.sqrt((square * side).sum(dim=(-1, -2)) / side.sum(dim=(-1, -2))) for side in (samples < 0, samples > 0)
    )
    gamma = left / right
    ratio = samples.abs().mean(dim=(-1, -2)) ** 2 / square.mean(dim=(-1, -2))
    ratio = ratio * (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1) ** 2
    alphas, moments = shape_table()
    alpha = alphas[(moments - ratio.unsqueeze(-1)).abs().argmin(dim=-1)]
    scale = torch.exp((torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)) / 2)
    return alpha, left * scale, right * scale


def halve(gray: torch.Tensor) -> torch.Tensor:
    """Half-size bicubic (a = -0.5) with antialiasing and mirrored borders: (N, 1, H, W), H and W even.

    At exactly one half every output pixel uses the same eight taps: the cubic at 1.75, 1.25, 0.75 and 0.25, halved.
    """
    taps = gray.new_tensor(HALVING_TAPS + HALVING_TAPS[::-1]).view(1, 1, 1, 8)
    padded = torch.cat([gray[..., :3].flip(-1), gray, gray[..., -3:].flip(-1)], dim=-1)
    padded = torch.cat([padded[..., :3, :].flip(-2), padded, padded[..., -3:, :].flip(-2)], dim=-2)
    return F.conv2d(F.conv2d(padded, taps, stride=(1, 2)), taps.transpose(2, 3), stride=(2, 1))


@lru_cache(maxsize=1)
def shape_table() -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes 0.2 ... 10 in steps of 0.001, and Gamma(2/a)**2 / (Gamma(1/a) Gamma(3/a)) of each."""
    alpha = 0.2 + 0.001 * torch.arange(9801, dtype=torch.float64)
    return alpha, torch.exp(2 * torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha))


@lru_cache(maxsize=1)
def pristine() -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (36,) and covariance (36, 36) of the pristine photographs' features."""
    stored = json.loads(files("consissr.evaluation").joinpath("niqe_pristine.json").read_text(encoding="utf-8"))
    mean = torch.tensor(stored["mean"], dtype=torch.float64)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for row, values in enumerate(stored["covariance"]):  # the lower triangle
        covariance[row, : row + 1] = covariance[: row + 1, row] = torch.tensor(values, dtype=torch.float64)
    return mean, covariance
