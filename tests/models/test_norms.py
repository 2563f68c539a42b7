"""Norms of an image's windows by the statistics of its patches."""

import pytest
import torch
from torch import nn

from consissr.models.norms import shared_norms

NET = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.SiLU(), nn.GroupNorm(4, 4), nn.Conv2d(4, 2, 1)).double()


def quarters(x: torch.Tensor) -> torch.Tensor:
    """Images (B, C, 8, 8) in four windows, (4 B, C, 4, 4), a window's images together."""
    return torch.cat([x[..., top : top + 4, left : left + 4] for top in (0, 4) for left in (0, 4)])


@torch.no_grad()
def test_patches_that_cover_the_image_make_windows_exact() -> None:
    """Of two images, whose statistics stay apart; the network is as it was afterwards."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    x[..., :4] += 3  # the left windows are unlike the right ones
    for parameter in NET.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw))
    whole = NET(x)
    with shared_norms(NET, 2, lambda: NET(quarters(x))):
        windows = NET(quarters(x))
        one = NET(x[..., 4:, :4])
    torch.testing.assert_close(windows, quarters(whole), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one, whole[..., 4:, :4], rtol=1e-5, atol=1e-5)
    assert (NET(quarters(x)) - quarters(whole)).abs().max() > 0.1
    assert torch.equal(NET(x), whole)


def test_norms_are_their_own_again_after_an_error() -> None:
    with pytest.raises(KeyError), shared_norms(NET, 1, lambda: {}["memory"]):
        pass
    assert all("forward" not in vars(module) for module in NET)
