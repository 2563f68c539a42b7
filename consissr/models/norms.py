"""GroupNorms that share their statistics between the windows of one image.

A window's own statistics make each window sharpen a little differently. In many steps later ones even that out; in one
evaluation it is what tells a result in windows from one in a single piece. So a sample of small patches, spread evenly
over the latent, goes through the network first, side by side; every norm takes its statistics from all of them, and
keeps these for the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Statistics = dict[nn.GroupNorm, tuple[Tensor, Tensor]]
"""Mean and variance of every norm's groups, each (B, groups)."""


def gathered(norm: nn.GroupNorm, kept: Statistics, images: int, x: Tensor) -> Tensor:
    """`norm` of patches x (patches * B, C, h, w) by the statistics of each image's patches together, which are kept."""
    groups = x.float().unflatten(0, (-1, images)).unflatten(2, (norm.num_groups, -1)).flatten(3)  # (P, B, groups, n)
    variance, mean = torch.var_mean(groups, dim=(0, 3), correction=0)
    kept[norm] = mean, variance
    return normalized(norm, kept, x)


def normalized(norm: nn.GroupNorm, kept: Statistics, x: Tensor) -> Tensor:
    """`norm` of x (windows * B, C, h, w) by kept statistics."""
    mean, variance = kept[norm]
    width = x.shape[1] // norm.num_groups
    scale = norm.weight.float() * torch.rsqrt(variance + norm.eps).repeat_interleave(width, dim=1)  # (B, C)
    shift = norm.bias.float() - scale * mean.repeat_interleave(width, dim=1)
    times = len(x) // len(mean)
    scale, shift = (value.repeat(times, 1)[..., None, None].to(x.dtype) for value in (scale, shift))
    return torch.addcmul(shift, x, scale)


@contextmanager
def shared_norms(network: nn.Module, images: int, sample: Callable[[], Any]) -> Iterator[None]:
    """Inside, the norms of `network` have the statistics found by `sample()`, a call on patches of `images` images."""
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    kept: Statistics = {}
    try:
        for norm in norms:
            norm.forward = partial(gathered, norm, kept, images)
        sample()
        for norm in norms:
            norm.forward = partial(normalized, norm, kept)
        yield
    finally:
        for norm in norms:
            vars(norm).pop("forward", None)
