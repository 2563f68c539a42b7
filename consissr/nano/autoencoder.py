"""Stage 'autoencoder': a small KL autoencoder with space-to-depth ends, trained from scratch for `nano`."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consissr.data.datasets import PhotoDataset
from consissr.models.vae.latents import Latents, LinearPath, posterior_sample
from consissr.nano.config import NanoConfig
from consissr.training.stage import EXPORT, Batch, Phase, Stage, check_crop, held_out
from consissr.training.validation import VALIDATION_SEED
from consissr.weights.latents import save_latents

MEASURED = 64
"""Training crops on which the scaling factor is measured where there is no validation set."""


def build_vae(config: NanoConfig) -> torch.nn.Module:
    """A diffusers AutoencoderKL of the configured widths, without mid-block attention (any size costs linearly)."""
    from diffusers import AutoencoderKL

    c = config.autoencoder
    vae = AutoencoderKL(
        in_channels=3 * c.patch**2,
        out_channels=3 * c.patch**2,
        down_block_types=["DownEncoderBlock2D"] * len(c.widths),
        up_block_types=["UpDecoderBlock2D"] * len(c.widths),
        block_out_channels=list(c.widths),
        layers_per_block=c.layers,
        latent_channels=c.latent_channels,
        norm_num_groups=8,
        sample_size=config.data.crop,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    vae.register_to_config(linear_path=c.linear_path)
    return vae


@torch.no_grad()
def fit_linear(path: LinearPath, x: Tensor, whitening: float) -> None:
    """Principal components of images `x` (B, 3, H, W), of unit mean variance; `whitening` 1 makes all variances 1.

    Component i with variance v_i is scaled by v_i^(-whitening / 2).
    """
    blocks = F.pixel_unshuffle(x, path.factor).permute(0, 2, 3, 1).flatten(0, 2).double()  # (blocks, 3 f^2)
    variance, axes = torch.linalg.eigh(blocks.T @ blocks / len(blocks))
    count = path.analysis.out_channels
    variance, axes = variance.flip(0)[:count], axes.flip(1)[:, :count]
    gain = variance.pow(-whitening / 2)
    gain = gain / (variance * gain**2).mean().sqrt()
    path.analysis.weight.copy_((axes * gain).T[:, :, None, None])
    path.synthesis.weight.copy_((axes / gain)[:, :, None, None])


@torch.no_grad()
def start_linear(latents: Latents, config: NanoConfig) -> None:
    """Start as the linear code alone: principal components of the first crops, networks that add nothing."""
    dataset = PhotoDataset(config.data, config.seed)
    crops = torch.stack([dataset[n]["hq"] for n in range(256)])
    fit_linear(latents.linear, crops, config.autoencoder.whitening)
    vae = latents.vae
    for layer in (vae.quant_conv, vae.decoder.conv_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    vae.quant_conv.bias[latents.channels :] = -5.0  # a posterior of standard deviation 0.08


class Autoencoder(Stage):
    """L1 on pixels and on their differences, plus a small Kullback-Leibler term."""

    needs_lq = False

    def __init__(self, config: NanoConfig, fit: bool = True) -> None:
        """fit=False leaves the linear path random, for which no photographs are needed."""
        self.config, self.data = config.autoencoder, config.data
        self.seed, self.micro_batch = config.seed, config.micro_batch
        self.export_dtype = EXPORT[config.export_precision]
        self.networks = Latents(build_vae(config))
        check_crop(config.data.crop, self.networks.factor)
        if self.config.linear_path and fit:
            start_linear(self.networks, config)
        self.phases = [
            Phase("autoencoder", dict(self.networks.named_parameters()), self.loss, config.optimizer),
        ]
        self.compile_modules = [self.networks.vae.encoder, self.networks.vae.decoder]

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Reconstruction of `batch.hq` from a posterior sample."""
        mean, logvar = self.networks.moments(batch.hq)
        mean, logvar = mean.float(), logvar.float()  # (B, C, h, w)
        z = posterior_sample(mean, logvar, batch.randn(*mean.shape[1:]))
        difference = self.networks.decode(z).float() - batch.hq
        l1 = difference.abs().mean()
        edges = (difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()) / 2
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        total = l1 + self.config.gradient_weight * edges + self.config.kl_weight * kl
        return {"loss": total, "l1": l1, "edges": edges, "kl": kl}

    def restore(self, batch: Batch) -> Tensor:
        """Reconstruction from the mode."""
        return self.networks.decode(self.networks.encode(batch.hq))

    @torch.no_grad()
    def latent_variance(self) -> float:
        """Of all elements of the modes of the validation set or, without one, of the first training crops."""
        dataset, numbers = PhotoDataset(self.data, self.seed), range(MEASURED)
        if self.data.validation:
            dataset = held_out(self.data, VALIDATION_SEED)
            numbers = range(min(self.data.validation_count, len(dataset)))
        device = next(self.networks.parameters()).device
        count, total, squares = 0, 0.0, 0.0
        for first in range(0, len(numbers), self.micro_batch):
            crops = torch.stack([dataset[n]["hq"] for n in numbers[first : first + self.micro_batch]])
            z = self.networks.encode(crops.to(device)).cpu().double()
            count, total, squares = count + z.numel(), total + float(z.sum()), squares + float(z.square().sum())
        return squares / count - (total / count) ** 2

    def export(self, folder: Path) -> None:
        """`folder/vae`, with the scaling factor that gives latents unit variance."""
        self.networks.vae.register_to_config(scaling_factor=round(self.latent_variance() ** -0.5, 5))
        save_latents(folder / "vae", self.networks, self.export_dtype)
