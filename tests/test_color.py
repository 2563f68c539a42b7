"""Colour transfer by hand, against the arrays that the authors' code produced, and its limits."""

import numpy as np
import pytest
import torch

from consissr.images import color
from consissr.images.moments import Moments


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


def test_adain_by_hand():
    """Two pixels 0 and 2 have mean 1 and unbiased variance 2; 1 and 9 have mean 5 and variance 32. Per channel."""
    content = torch.tensor([[0.0, 2.0], [7.0, 7.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    style = torch.tensor([[1.0, 9.0], [3.0, 5.0]], dtype=torch.float64).reshape(1, 2, 2, 1)
    step = (32 + 1e-5) ** 0.5 / (2 + 1e-5) ** 0.5
    assert color.adain(content, style)[0, 0].flatten().tolist() == pytest.approx([5 - step, 5 + step], rel=1e-12)
    assert color.adain(content, style)[0, 1].flatten().tolist() == [4, 4], "a flat channel takes the mean"
    assert content.max() == 7, "arguments are left as they were"
    alone = color.adain(content[:, :1], style[:, :1])
    assert torch.equal(alone, color.adain(content, style)[:, :1]), "a single channel is an image, too"


def test_moments_of_strips_are_those_of_the_whole():
    """Large images are coloured strip by strip; here no two strips are alike in height, mean or spread."""
    x = torch.rand(2, 3, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, :, 3:4] = 5 * x[:, :, 3:4] - 2
    x[:, :, 4:] += 1
    mean, variance = color.moments(x.split([3, 1, 8], dim=2))
    assert torch.allclose(mean[..., 0, 0], x.mean((2, 3)), rtol=1e-12)
    assert torch.allclose(variance[..., 0, 0], x.var((2, 3), correction=1), rtol=1e-12)


def test_moments_are_gathered_in_float64():
    """Of parts in float32, or in half precision read as that; the variance is the population's unless corrected."""
    x = torch.rand(2, 4, 6, 5, generator=torch.Generator().manual_seed(0)) + 10
    for kind in (torch.float32, torch.float16):
        gathered, wide = Moments(2), x.to(kind).double().reshape(2, 2, -1)
        for part in x.to(kind).split([1, 5], dim=2):
            gathered.add(part)
        for correction, wanted in ((0, wide.var(2, correction=0)), (1, wide.var(2))):
            mean, variance = gathered.result(correction)
            assert mean.dtype == variance.dtype == torch.float64
            torch.testing.assert_close(mean, wide.mean(2), rtol=1e-6, atol=0)
            torch.testing.assert_close(variance, wanted, rtol=1e-5, atol=0)
        assert torch.equal(gathered.result()[1], gathered.result(0)[1])


def test_part_of_the_colours():
    """A quarter of the way to the style's mean and standard deviation; a quarter of wavelet's change."""
    x = torch.tensor([0.0, 2.0], dtype=torch.float64).reshape(1, 1, 1, 2)  # mean 1, deviation sqrt 2
    mean, variance = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (5.0, 32.0))
    step = 0.75 + 0.25 * 4  # the style's deviation is 4 times its own
    found = color.adain_(x, color.moments([x]), (mean, variance), 0.25)
    assert found.flatten().tolist() == pytest.approx([2 - step, 2 + step], rel=1e-5)
    content, style = torch.rand(2, 1, 1, 9, 9, dtype=torch.float64)
    wanted = content + 0.25 * (color.wavelet(content, style) - content)
    pair = (content, style)
    found = color.wavelet_rows(*(lambda top, bottom, x=x: x[:, :, top:bottom] for x in pair), 9, 0.25)(0, 9)
    assert torch.allclose(found, wanted, rtol=1e-12)


def test_wavelet_in_strips_is_that_of_the_whole():
    """31 rows above and below a strip are read with it."""
    content, style = torch.rand(2, 1, 2, 120, 9, dtype=torch.float64)
    asked = []
    make = color.wavelet_rows(
        lambda top, bottom: content[:, :, top:bottom],
        lambda top, bottom: asked.append((top, bottom)) or style[:, :, top:bottom],
        120,
    )
    cuts = [(0, 20), (20, 47), (47, 90), (90, 120)]
    found = torch.cat([make(*cut) for cut in cuts], dim=2)
    assert torch.allclose(found, color.wavelet(content, style), rtol=1e-12, atol=1e-14)
    assert asked == [(0, 51), (0, 78), (16, 120), (59, 120)]


def test_wavelet_blurs_with_a_triangle():
    """[1 2 1] / 4 dilated 1, 2, 4, 8, 16, one after the other, is the triangle (32 - |n|) / 1024 along each axis."""
    point = torch.zeros(1, 1, 127, 127, dtype=torch.float64)
    point[..., 63, 63] = 1
    triangle = (32 - (torch.arange(127, dtype=torch.float64) - 63).abs()).clamp(min=0) / 1024
    blurred = torch.outer(triangle, triangle)
    assert torch.allclose(color.wavelet(torch.zeros_like(point), point)[0, 0], blurred, rtol=1e-12, atol=1e-15)
    assert torch.allclose(color.wavelet(point, torch.zeros_like(point)), point - blurred, rtol=1e-12, atol=1e-15)


def test_wavelet_repeats_the_edges(rng):
    style = rng.random((2, 3, 9, 20))
    blurred = style
    for reach in (1, 2, 4, 8, 16):
        for axis, length in ((2, 9), (3, 20)):
            before, after = (np.clip(np.arange(length) + step, 0, length - 1) for step in (-reach, reach))
            blurred = blurred.take(before, axis) / 4 + blurred / 2 + blurred.take(after, axis) / 4
    result = color.wavelet(torch.zeros(2, 3, 9, 20, dtype=torch.float64), torch.from_numpy(style))
    assert np.abs(result.numpy() - blurred).max() < 1e-12


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
