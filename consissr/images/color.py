"""Colour transfer: give a restored image the colours of the low-quality image.

Functions take NCHW tensors in one common range, whatever it is, and do not clamp. They were checked against
the arrays that the authors' code produces (StableSR's colour fix, which both releases use and neither paper mentions).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from consissr.images.moments import Moments
from consissr.images.rows import Make

_EPSILON = 1e-5  # added to the variance
_LEVELS = 5
_REACH = 2**_LEVELS - 1  # of all blurs together, in rows


def adain(content: Tensor, style: Tensor) -> Tensor:
    """Give `content` the mean and standard deviation of `style`, per image and channel (NCHW, any range).

    The 1e-5 is meant for images in [0, 1]; on [-1, 1] it is a quarter of that, which no 8-bit image shows.
    """
    return adain_(content.clone(), moments([content]), moments([style]))


def adain_(content: Tensor, own: tuple[Tensor, Tensor], style: tuple[Tensor, Tensor], strength: float = 1.0) -> Tensor:
    """The same in place on (B,C,h,w), all of an image with the `moments` own, or some rows of it.

    strength: 0 to 1, how far mean and standard deviation move towards the style's.
    """
    (own_mean, own_variance), (mean, variance) = own, style
    std, own_std = ((x + _EPSILON).sqrt() for x in (variance, own_variance))
    if strength != 1:
        mean, std = torch.lerp(own_mean, mean, strength), torch.lerp(own_std, std, strength)
    own_mean, own_std, std, mean = (x.to(content) for x in (own_mean, own_std, std, mean))
    return content.sub_(own_mean).div_(own_std).mul_(std).add_(mean)


def moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance (unbiased; 0 for a single pixel) per image and channel, float64 (B,C,1,1), of images that come
    in parts (B,C,h,w)."""
    total = None
    for part in parts:
        total = total or Moments(part.shape[1])
        total.add(part)
    mean, variance = total.result(correction=1)
    return mean[..., None, None], variance[..., None, None]


def wavelet(content: Tensor, style: Tensor) -> Tensor:
    """High frequencies of `content` on the low frequencies of `style` (NCHW, any range)."""
    return content - _low_frequencies(content) + _low_frequencies(style)


def wavelet_rows(content: Make, style: Make, height: int, strength: float = 1.0) -> Make:
    """The same of images of so many rows, of which some are made at a time. strength: 0 to 1, of the change."""

    def make(top: int, bottom: int) -> Tensor:
        first, last = max(top - _REACH, 0), min(bottom + _REACH, height)
        old = content(first, last)
        new = wavelet(old, style(first, last).to(old))
        return (new if strength == 1 else torch.lerp(old, new, strength))[:, :, top - first : bottom - first]

    return make


def _low_frequencies(x: Tensor) -> Tensor:
    """Five blurs with [1 2 1] x [1 2 1] / 16, dilated 1, 2, 4, 8, 16; the borders are repeated."""
    channels = x.shape[1]
    row = x.new_tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row).expand(channels, 1, 3, 3)
    for level in range(_LEVELS):
        reach = 2**level
        padded = F.pad(x, (reach,) * 4, mode="replicate")
        x = F.conv2d(padded, kernel, dilation=reach, groups=channels)
    return x
