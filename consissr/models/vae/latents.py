"""The one owner of latents: the autoencoder, its scaling factor, its total down-sampling, sample versus mode."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consissr.errors import UserError
from consissr.models.vae.narrow import empty_decoder, fill, narrow_widths

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


WIDTH = "decoder_width"
"""Entry of vae/config.json: the decoder's width as a share of what the other entries say; absent: 1."""


class LinearPath(nn.Module):
    """The part of the latent that is linear in f x f blocks of pixels, beside the autoencoder's networks.

    A small network learns natural images' principal components slowly, so `nano` is given them: its encoder and decoder
    only learn what is to be added. Both directions are trained on.
    """

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.analysis = nn.Conv2d(3 * factor**2, channels, 1, bias=False)
        self.synthesis = nn.Conv2d(channels, 3 * factor**2, 1, bias=False)

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/f, W/f)."""
        return self.analysis(F.pixel_unshuffle(x, self.factor))

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, h f, w f)."""
        return F.pixel_shuffle(self.synthesis(z), self.factor)


def posterior_sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """A draw (B, C, h, w) from the autoencoder's posterior by standard normal `noise`, not scaled."""
    return mean + torch.exp(0.5 * logvar) * noise


class Latents(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> scaled latents (B, C, H/f, W/f).

    Wraps a diffusers AutoencoderKL. Where its input has 3 p^2 channels instead of 3, pixels are folded into channels
    (space-to-depth by p) first and unfolded last, so that no convolution runs at full resolution. Where its config
    says `linear_path`, a LinearPath is added to the posterior's mean and to the decoder's output. (`nano` has both.)
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.scale: float = vae.config.scaling_factor
        if type(self.scale) not in (int, float) or not 0 < self.scale < 1e6:
            raise UserError(f"the autoencoder's scaling_factor is {self.scale!r}: it must be a number above 0")
        self.channels: int = vae.config.latent_channels
        self.patch: int = isqrt(vae.config.in_channels // 3)
        if 3 * self.patch**2 != vae.config.in_channels:
            raise UserError(
                f"the autoencoder takes {vae.config.in_channels} channels: use one that takes 3 p^2 with a whole p"
            )
        self.factor: int = self.patch * 2 ** (len(vae.config.block_out_channels) - 1)
        self.linear = LinearPath(self.channels, self.factor) if vae.config.get("linear_path") else None

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, unscaled, each (B, C, H/f, W/f)."""
        posterior = self.vae.encode(self._fold(x)).latent_dist
        mean = posterior.mean if self.linear is None else posterior.mean + self.linear.encode(x)
        return mean, posterior.logvar

    def encode(self, x: Tensor) -> Tensor:
        """Scaled latents (B, C, H/f, W/f) of images `x` (B, 3, H, W): the posterior's mode."""
        return self.moments(x)[0] * self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, h f, w f), about [-1, 1], not clamped, of scaled latents `z` (B, C, h, w)."""
        z = z / self.scale
        image = self._unfold(self.vae.decode(z).sample)
        return image if self.linear is None else image + self.linear.decode(z)

    def _fold(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x

    def _unfold(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x


def decoder_names(latents: Latents) -> set[str]:
    """Names in `Latents` of what turns latents into images, and may be tuned."""
    parts = ("vae.decoder.", "vae.post_quant_conv.", "linear.synthesis.")
    return {n for n, _ in latents.named_parameters() if n.startswith(parts)}


def empty_latents(settings: dict[str, Any]) -> Latents:
    """An untrained autoencoder of the sizes in a `vae/config.json`."""
    from diffusers import AutoencoderKL

    own = {name: settings[name] for name in ("linear_path", WIDTH) if name in settings}
    vae = AutoencoderKL.from_config({name: value for name, value in settings.items() if name not in own})
    if own.get(WIDTH, 1) != 1:
        vae.decoder = empty_decoder(vae.config, own[WIDTH])
    vae.register_to_config(**own)
    return Latents(vae)


def narrowed(latents: Latents, factor: float) -> Latents:
    """The same autoencoder, its encoder shared, with a decoder `factor` times as wide, to be tuned (stage 'deft').

    UserError for a factor outside (0, 1], or if the decoder is narrow already.
    """
    config = latents.vae.config
    if config.get(WIDTH, 1) != 1:
        raise UserError(f"this decoder is narrow already (factor {config[WIDTH]:g}): start from the full one")
    full = latents.vae.decoder
    with full.conv_in.weight.device:
        made = empty_latents(dict(config) | {WIDTH: factor})
    for name in ("encoder", "quant_conv", "post_quant_conv"):
        setattr(made.vae, name, getattr(latents.vae, name))
    made.linear = latents.linear
    groups = config.norm_num_groups
    fill(made.vae.decoder, full, narrow_widths(config.block_out_channels, factor, groups), groups)
    made.vae.decoder.to(full.conv_in.weight.dtype).train(full.training)
    return made
