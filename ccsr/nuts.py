"""Stage 'nuts': ControlNet and additions under non-uniform timestep sampling (Sec. III-B, CCSR).

What is trained stands in consissr/training/restoration.py: the ControlNet, what the model config adds (ConsisSR's image
branch, position embedding, transposed attention), and the parts of the UNet that `model.unet_trained` names. With
`nuts.losses: [l_diff]` this is ordinary ControlNet pre-training, which CCSR's release starts from.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ccsr.losses import nuts_losses
from ccsr.timesteps import sampler_plan, t_max_step, with_plan
from consissr.config.folder import FolderConfig
from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.models.denoiser import SoftPrompt
from consissr.training.restoration import Restoration, pixel_weights
from consissr.training.stage import Batch
from consissr.weights.model import Model

log = logging.getLogger(__name__)


class Nuts(Restoration):
    """l_diff at uniform t (Eq. 2, CCSR), l_T and l_tmax from the noisiest timestep (Eq. 3)."""

    def __init__(self, config: TrainConfig, model: Model | None = None, soft_prompt: SoftPrompt | None = None) -> None:
        super().__init__(config, model, soft_prompt)
        self.posterior = config.nuts.posterior
        self.weights = pixel_weights(self.latents) if config.nuts.metric == "pixels" else None
        s = config.sampler
        T = len(self.schedule)
        self.plan = sampler_plan(s, T)
        self.t_max = config.nuts.t_max_step or t_max_step(s.steps, config.nuts.t_max, s.grid, T)
        if not 0 < self.t_max < T:
            raise UserError(f"nuts.t_max_step is {self.t_max}: use a timestep from 1 to {T - 1}, or 0")
        trained = "l_tmax" in config.nuts.losses and not config.nuts.t_max_step
        if trained and s.plan == "nuts" and not s.timesteps and self.t_max != t_max_step(s.steps, s.t_max, s.grid, T):
            raise UserError(
                f"nuts.t_max is {config.nuts.t_max:g}, sampler.t_max {s.t_max:g}: the sampler would use a timestep "
                "that is not trained; make them equal, or set nuts.t_max_step"
            )

        self.t_first, self.t_end = self.diff_range()
        if self.augmentation != "off" and self.t_end <= self.t_max + 1:
            log.warning("latent augmentation is rare at t < %d: nuts.l_diff_t=all draws every timestep", self.t_end)

    def diff_range(self) -> tuple[int, int]:
        """First timestep that l_diff is trained at, and the one after the last."""
        c, s, T = self.config.nuts, self.config.sampler, len(self.schedule)
        if c.l_diff_t == "interval":  # "when t = T and t falls into the range of [t_max, t_min]" (Sec. III-B, CCSR)
            first = t_max_step(s.steps, s.t_min, s.grid, T) if round(s.steps * s.t_min) else 0
            return min(first, self.t_max), self.t_max + 1
        return 0, self.t_max if c.l_diff_t == "released" and "l_T" in c.losses else T

    def prepare(self, batch: Batch) -> None:
        """Latents of both images; the hint is z_lq, a sample where that is one."""
        super().prepare(batch)
        if self.hint_latents is None:
            batch.cache["hint"] = batch.cache["z_lq"]

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The configured losses, each with weight 1."""
        c = self.config.nuts
        z_hq, z_lq = batch.cache["z_hq"], batch.cache["z_lq"]
        condition = self.condition(batch)
        noises = [batch.randn(*z_hq.shape[1:]) for _ in range(3)]
        t = self.t_first + batch.randint(self.t_end - self.t_first)
        parts = nuts_losses(
            lambda z_t, t: self.denoiser(z_t, t, condition), z_hq, z_lq, t, noises, self.schedule, self.t_max, c.start,
            c.losses, self.weights, self.augmented(batch, t, noises[0]),
        )  # fmt: skip
        used = {name: parts[name] for name in c.losses}
        return {"loss": torch.stack(list(used.values())).sum(), **used}

    def one_step(self, batch: Batch) -> Tensor:
        """x0_from_T (B, C, h, w): the latent that one evaluation at the noisiest timestep gives."""
        z_lq = batch.cache["z_lq"]
        condition = self.condition(batch)
        last = torch.full((len(z_lq),), len(self.schedule) - 1, device=z_lq.device)
        z_T = self.schedule.add_noise(z_lq, batch.randn(*z_lq.shape[1:]), last)
        return self.schedule.x0_from_eps(z_T, self.denoiser(z_T, last, condition), last)

    def restore(self, batch: Batch) -> Tensor:
        """One-step result, or the sampler's where one step is not trained, at noise that depends on the image alone."""
        sampled = self.one_step(batch) if "l_T" in self.config.nuts.losses else self.sampled(batch, self.plan)
        return self.latents.decode(sampled)

    def folder_config(self) -> FolderConfig:
        """The model's configuration, its default plan spelled out so that sampling needs no knowledge of NUTS."""
        return FolderConfig(model=self.config.model, sampler=with_plan(self.config.sampler, len(self.schedule)))
