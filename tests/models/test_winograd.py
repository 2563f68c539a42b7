"""The fast 3x3 convolution equals the direct one within rounding, and is used where it should be."""

import pytest
import torch
from torch import nn

from consissr.models.vae.winograd import WinogradConv2d, convolve_padded, use_winograd


@pytest.mark.parametrize("size", [(1, 64, 64), (4, 33, 30), (16, 16, 17)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_equals_the_direct_convolution(size, order):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(128, 160, 3, padding=1)).to(memory_format=order)
    x = torch.randn(size[0], 128, *size[1:]).to(memory_format=order)
    direct = network(x)
    assert use_winograd(network) == 1 and type(network[0]) is WinogradConv2d
    fast = network(x)
    assert fast.shape == direct.shape
    assert not torch.equal(fast, direct)  # it went the other way
    assert ((fast - direct).norm() / direct.norm()) < 1e-5
    inner, rest = convolve_padded(x, network[0]), direct[..., 1:-1, 1:-1]
    assert inner.shape == rest.shape and ((inner - rest).norm() / rest.norm()) < 1e-5


def test_what_keeps_the_direct_way():
    kinds = [nn.Conv2d(64, 128, 3, padding=1), nn.Conv2d(128, 128, 3, stride=2, padding=1), nn.Conv2d(128, 128, 1)]
    assert use_winograd(nn.Sequential(*kinds, nn.Conv2d(128, 128, 3), nn.Conv2d(128, 128, 3, padding=1, groups=2))) == 0
    network = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1))
    x = torch.randn(1, 128, 32, 32)
    direct = network(x)
    use_winograd(network)
    assert torch.equal(network(x), direct)  # with gradients
    with torch.no_grad():
        assert torch.equal(network(x[..., :8, :8]), network[0]._conv_forward(x[..., :8, :8], *network[0].parameters()))
