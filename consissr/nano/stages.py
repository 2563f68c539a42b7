"""The bundled models' variants of ConsisSR's stages: other errors, and the timesteps of few steps."""

import torch
from torch import Tensor

from consissr.errors import UserError
from consissr.models.denoiser import SoftPrompt
from consissr.models.vae.latents import Latents
from consissr.nano.config import NanoConfig
from consissr.training.stage import Batch
from consissr.training.tala import Tala
from consissr.weights.model import Model


def pixel_weights(latents: Latents) -> Tensor:
    """(C,) squared change in pixels per unit of each latent channel through the linear path, of mean 1."""
    if latents.linear is None:
        raise UserError("metric=pixels needs an autoencoder with a linear path: use metric=latents")
    power = latents.linear.synthesis.weight.detach().square().sum(dim=(0, 2, 3))  # weight (3 f^2, C, 1, 1)
    return power / power.mean()


def weighted(error: Tensor, weights: Tensor) -> Tensor:
    """Squared `error` (B, C, h, w) whose channels count by `weights` (C,), a mean over all elements."""
    return (error.square() * weights.to(error).view(1, -1, 1, 1)).mean()


class NanoTala(Tala):
    """Algorithm 1 under the errors and timesteps of `NanoTalaConfig`."""

    def __init__(self, config: NanoConfig, model: Model | None = None, soft_prompt: SoftPrompt | None = None) -> None:
        super().__init__(config, model, soft_prompt)
        self.weights = pixel_weights(self.latents) if config.tala.metric == "pixels" else None

    def timesteps(self, batch: Batch) -> Tensor:
        """Uniform, or (`tala.plan_share`) one of the sampler's, (B,)."""
        t = super().timesteps(batch)
        if share := self.config.tala.plan_share:
            times = t.new_tensor([step.t for step in self.plan])
            t = torch.where(batch.rand() < share, times[batch.randint(len(times))], t)
        return t

    def error(self, eps_hat: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Squared or absolute error of predicted noise (B, C, h, w) at `t` (B,), weighed as the config says."""
        c, error = self.config.tala, eps_hat - target
        if c.weighting == "v":  # at given z_t, an error of v is one of the noise over sqrt(alpha_bar)
            error = error / self.schedule.alpha_bar.to(error.device)[t].view(-1, 1, 1, 1).to(error).sqrt()
        if c.error == "absolute":
            return (error if self.weights is None else self.latents.linear.decode(error)).abs().mean()
        return error.square().mean() if self.weights is None else weighted(error, self.weights)
