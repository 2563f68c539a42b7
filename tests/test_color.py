"""Colour transfer against the arrays that the authors' code produced, and its limits."""

import numpy as np
import pytest
import torch

from consissr.images import color


@pytest.mark.parametrize("name", ["adain", "wavelet"])
def test_float_conformance(shared, name):
    arrays = np.load(shared / "conformance" / "consissr_common" / "colorfix.npz")
    content, style, expected = (torch.from_numpy(arrays[key]) for key in ("content", "style", name))
    assert (getattr(color, name)(content, style) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["adain", "wavelet"])
def test_uint8_conformance(shared, name):
    """CCSR's script works on 8-bit images and cuts off the fraction."""
    arrays = np.load(shared / "conformance" / "ccsr_A" / "color_fix.npz")
    content, style = (torch.from_numpy(arrays[k]).permute(2, 0, 1)[None] / 255 for k in ("target", "source"))
    result = (getattr(color, name)(content, style).clamp(0, 1) * 255).to(torch.uint8)[0].permute(1, 2, 0)
    assert np.abs(result.numpy().astype(int) - arrays[name]).max() <= 1
    assert (result.numpy() == arrays[name]).mean() > 0.999


def test_adain_gives_the_moments_of_the_style():
    content, style = torch.rand(2, 3, 40, 30), torch.rand(2, 3, 20, 25) * 0.3 + 0.5
    result = color.adain(content, style)
    assert torch.allclose(result.mean((2, 3)), style.mean((2, 3)), atol=1e-6)
    assert torch.allclose(result.std((2, 3)), style.std((2, 3)), rtol=1e-3)


def test_wavelet_keeps_detail_and_takes_colour():
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    checks = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2) * 0.2 - 0.1
    result = color.wavelet(ramp.flip(-1) + checks, ramp)
    inner = (slice(None), slice(None), slice(24, 40), slice(24, 40))
    assert torch.allclose(result[inner], (ramp + checks)[inner], atol=0.02)


@pytest.mark.parametrize("name", ["adain", "wavelet"])
def test_one_pixel(name):
    content, style = torch.rand(1, 3, 1, 1), torch.rand(1, 3, 1, 1)
    assert torch.allclose(getattr(color, name)(content, style), style, atol=1e-6)
