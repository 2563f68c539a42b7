"""Stage 'tala': ControlNet, additions and adapter under time-aware latent augmentation (Algorithm 1, ConsisSR)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from consissr.config.training import TrainConfig
from consissr.diffusion.plans import check_plan, ddpm_plan
from consissr.errors import UserError
from consissr.models.denoiser import Condition, SoftPrompt
from consissr.training.restoration import Restoration, pixel_weights
from consissr.training.stage import Batch
from consissr.weights.model import Model


class Prediction(NamedTuple):
    """One evaluation of the denoiser."""

    z_t: Tensor
    """Its input (B, C, h, w)."""
    t: Tensor
    """Timesteps (B,)."""
    target: Tensor
    """The noise that leads from z_t to z_hq (B, C, h, w)."""
    eps: Tensor
    """The noise predicted (B, C, h, w)."""


class Tala(Restoration):
    """Squared error of the noise that leads to z_hq, at uniform t (Eq. 4, ConsisSR).

    soft_prompt: tokens appended to the text's, from an encoder of one's own (Table 3, ConsisSR: DAPE).
    """

    probability = "power"

    def __init__(self, config: TrainConfig, model: Model | None = None, soft_prompt: SoftPrompt | None = None) -> None:
        if config.sampler.plan == "nuts" and not config.sampler.timesteps:
            raise UserError("stage 'tala' trains for sampler.plan=ddpm (or explicit sampler.timesteps), not nuts")
        super().__init__(config, model, soft_prompt, config.tala.encoder_gradients)
        self.posterior = config.tala.posterior
        self.weights = pixel_weights(self.latents) if config.tala.metric == "pixels" else None
        if config.tala.hint_dropout and self.image_prompt is None:
            raise UserError(
                "tala.hint_dropout needs image tokens to do without the hint: choose model.image_prompt=hpa"
            )
        s = config.sampler
        self.plan = check_plan(s.timesteps or ddpm_plan(s.steps, len(self.schedule)), len(self.schedule))

    def predict(self, batch: Batch) -> Prediction:
        """Lines 3 to 9 of Algorithm 1."""
        t = batch.randint(len(self.schedule))
        eps = batch.randn(*batch.cache["z_hq"].shape[1:])
        if share := self.config.tala.plan_share:
            times = t.new_tensor([step.t for step in self.plan])
            t = torch.where(batch.rand() < share, times[batch.randint(len(times))], t)
        z_t, target = self.augmented(batch, t, eps)
        condition = self.condition(batch)
        if self.config.tala.hint_dropout:
            condition = self.some_blind(condition, batch.rand() < self.config.tala.hint_dropout)
        return Prediction(z_t, t, target, self.denoiser(z_t, t, condition))

    def some_blind(self, condition: Condition, blind: Tensor) -> Condition:
        """The condition with the ControlNet's view of z_lq taken from the images (B,) that `blind` says."""
        features = self.denoiser.controlnet.controlnet_cond_embedding(condition.hint)
        return replace(condition, cache=condition.cache | {"hint": features * ~blind.view(-1, 1, 1, 1)})

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Line 10 of Algorithm 1."""
        return {"loss": self.error(self.predict(batch))}

    def error(self, found: Prediction) -> Tensor:
        """Squared (or absolute) error of a prediction, a mean over elements; weighted where the config says so."""
        # eps_hat - (z_t - sqrt(a) z_hq) / sqrt(1 - a)  (Eq. 4, ConsisSR)
        error = found.eps - found.target
        if self.config.tala.weighting == "v":  # at given z_t, an error of v is one of the noise over sqrt(a)
            error = error / self.schedule.alpha_bar.to(error.device)[found.t].view(-1, 1, 1, 1).to(error).sqrt()
        if self.config.tala.error == "absolute":
            return (error if self.weights is None else self.latents.linear.decode(error)).abs().mean()
        error = error.square()
        return (error if self.weights is None else error * self.weights.to(error).view(1, -1, 1, 1)).mean()

    @torch.no_grad()
    def restore(self, batch: Batch) -> Tensor:
        """The sampler's result without guidance, at noise that depends on the image alone."""
        return self.latents.decode(self.sampled(batch, self.plan))
