"""The autoencoder in strips equals diffusers' own within rounding, takes less memory, and leaves other blocks alone."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D

from consissr.models.fast import for_inference
from consissr.models.vae import strips
from consissr.models.vae.latents import Latents


@pytest.fixture(scope="module")
def latents():
    """Widths at which the fast convolution pays, random norms, and values far from zero."""
    torch.manual_seed(0)
    kinds = {"down_block_types": 2 * ["DownEncoderBlock2D"], "up_block_types": 2 * ["UpDecoderBlock2D"]}
    vae = AutoencoderKL(**kinds, block_out_channels=(128, 160), layers_per_block=1, latent_channels=4)
    for parameter in vae.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter))
    return Latents(vae).eval().requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 64, 72), (3, 33, 30)])
def test_equal_within_rounding(latents, size, monkeypatch):
    fast = copy.deepcopy(latents)
    for_inference(fast, "cpu")
    z = torch.randn(size[0], 4, *size[1:])
    reads = []
    monkeypatch.setattr(strips, "convolve_rows", lambda *a, f=strips.convolve_rows: reads.append(a[1]) or f(*a))
    decoded, plain = fast.decode(z), latents.decode(z)
    assert len(reads) >= 4  # the strips were used
    assert (decoded - plain).norm() < 1e-5 * plain.norm()
    images = plain.clamp(-1, 1)
    for one, other in zip(fast.moments(images), latents.moments(images), strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


@torch.no_grad()
def test_statistics_far_from_zero():
    x = 100 + torch.randn(2, 64, 50, 60) * torch.linspace(0.5, 2, 64)[:, None, None]
    mean, variance = strips.statistics(x, 8)
    wanted = torch.var_mean(x.double().view(2, 8, -1), 2, correction=0)
    assert torch.allclose(mean, wanted[1].float().repeat_interleave(8, 1))
    assert torch.allclose(variance, wanted[0].float().repeat_interleave(8, 1), rtol=1e-4)


def test_blocks_with_more_stay():
    timed = ResnetBlock2D(in_channels=128, out_channels=128, temb_channels=16)
    assert strips.use_strips(timed) == 0 and type(timed) is ResnetBlock2D


def test_with_gradients_as_before(latents):
    fast = copy.deepcopy(latents)
    for_inference(fast, "cpu")
    z = torch.randn(1, 4, 64, 64)
    assert torch.allclose(fast.decode(z), latents.decode(z), atol=1e-5)
