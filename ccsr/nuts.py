"""Stage 'nuts': non-uniform timestep sampling in training (Sec. III-B, CCSR). Its plan in sampling: timesteps.py.

What is trained stands in consissr/training/restoration.py: the ControlNet (as in CCSR v1 and v2), what the model config
adds (ConsisSR's image branch, position embedding, transposed attention), and the parts of the UNet that
`model.unet_trained` names. With `nuts.losses: [l_diff]` this is ordinary ControlNet pre-training, which CCSR v2 starts
from.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ccsr.timesteps import sampler_plan, t_max_step, with_plan
from consissr.config.folder import FolderConfig
from consissr.config.training import TrainConfig
from consissr.diffusion.augmentation import probability
from consissr.diffusion.sampler import start_latent
from consissr.diffusion.schedule import Schedule
from consissr.errors import UserError
from consissr.models.denoiser import SoftPrompt
from consissr.training.restoration import Restoration
from consissr.training.stage import Batch
from consissr.weights.model import Model

log = logging.getLogger(__name__)

LOSSES = ("l_diff", "l_T", "l_tmax")


def nuts_losses(
    denoise: Callable[[Tensor, Tensor], Tensor],
    z_hq: Tensor,
    z_start: Tensor,
    t: Tensor,
    noises: Sequence[Tensor],
    schedule: Schedule,
    t_max: int,
    losses: Sequence[str] = LOSSES,
    error: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
) -> dict[str, Tensor]:
    """Eq. 1 to 3 of CCSR: the wanted `losses` by name; the network runs for them alone.

    denoise(z_t, t) -> eps_theta. Latents and noises are (B, C, h, w); t (B,) are l_diff's timesteps; z_start is the
    latent that is noised to T (z_hq in the paper); x0_from_T is noised again to `t_max`. The three noises are for t, T
    and t_max. CCSR v1 and v2: each loss is a mean over all elements where the paper has a squared norm, and l_tmax's
    gradient flows back through x0_from_T, on which the paper is silent.
    """
    T, tmax = torch.full_like(t, len(schedule) - 1), torch.full_like(t, t_max)
    terms = {}
    if "l_diff" in losses:
        z_t = schedule.add_noise(z_hq, noises[0], t)  # (Eq. 1)
        terms["l_diff"] = error(denoise(z_t, t), noises[0])  # (Eq. 2)
    if "l_T" in losses or "l_tmax" in losses:
        z_T = schedule.add_noise(z_start, noises[1], T)  # (Eq. 1)
        x0_from_T = schedule.x0_from_eps(z_T, denoise(z_T, T), T)
        terms["l_T"] = error(x0_from_T, z_hq)
    if "l_tmax" in losses:
        z_tmax = schedule.add_noise(x0_from_T, noises[2], tmax)
        x0_from_tmax = schedule.x0_from_eps(z_tmax, denoise(z_tmax, tmax), tmax)
        terms["l_tmax"] = error(x0_from_tmax, z_hq)  # the second term of Eq. 3; the first is l_T
    return {name: terms[name] for name in losses}


class Nuts(Restoration):
    """l_diff at uniform t (Eq. 2, CCSR), l_T and l_tmax from the noisiest timestep (Eq. 3)."""

    def __init__(self, config: TrainConfig, model: Model | None = None, soft_prompt: SoftPrompt | None = None) -> None:
        super().__init__(config, model, soft_prompt, config.nuts.posterior)
        s, T = config.sampler, len(self.schedule)
        self.plan = sampler_plan(s, T)
        self.t_max = config.nuts.t_max_step or t_max_step(s.steps, s.t_max, s.grid, T)
        if not 0 < self.t_max < T:
            raise UserError(f"nuts.t_max_step is {self.t_max}: use a timestep from 1 to {T - 1}, or 0")
        self.t_first, self.t_end = self.diff_range()
        self.check_trained()
        self.augmentation = self.form("off")
        if self.augmentation != "off" and "l_diff" not in config.nuts.losses:
            raise UserError(
                "tala.probability: latent augmentation acts on l_diff, which nuts.losses leaves out: add it"
            )
        if self.augmentation != "off" and self.t_end <= self.t_max + 1:
            log.warning("latent augmentation is rare at t < %d: nuts.l_diff_t=all draws every timestep", self.t_end)

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The configured losses (`nuts_losses`) of every batch, summed with weight 1 each as in CCSR v2.

        In the paper l_diff is the loss at other timesteps than T, and l_T + l_tmax the one at T (Eq. 3); how often each
        is drawn it leaves open.
        """
        c = self.config.nuts
        z_hq, z_lq = batch.cache["z_hq"], batch.cache["z_lq"]
        condition = self.condition(batch)
        noises = [batch.randn(*z_hq.shape[1:]) for _ in range(3)]
        t = self.t_first + batch.randint(self.t_end - self.t_first)

        def denoise(z_t: Tensor, t: Tensor) -> Tensor:
            return self.denoiser(z_t, t, condition)

        hybrid = "l_diff" in c.losses and self.augmentation != "off"
        wanted = [name for name in c.losses if name != "l_diff"] if hybrid else c.losses
        z_start = z_lq if c.start == "lq" else z_hq  # lq is ours, hq the paper's
        losses = nuts_losses(denoise, z_hq, z_start, t, noises, self.schedule, self.t_max, wanted, self.error)
        if hybrid:
            losses["l_diff"] = self.augmented_loss(denoise, batch, t, noises[0])
        # l_diff at other timesteps (Eq. 2, CCSR) + l_T + l_tmax, the loss at T (Eq. 3, CCSR)
        return {"loss": torch.stack([losses[name] for name in c.losses]).sum(), **losses}

    def augmented_loss(self, denoise: Callable[..., Tensor], batch: Batch, t: Tensor, eps: Tensor) -> Tensor:
        """l_diff under ConsisSR's augmentation (Algorithm 1, lines 7 to 10, ConsisSR): a hybrid of ours."""
        z_hq, z_lq, c = batch.cache["z_hq"], batch.cache["z_lq"], self.config.tala
        r = batch.rand()[:1] if c.shared_draw else batch.rand()
        from_lq = (r < probability(t, self.augmentation, c.gamma, len(self.schedule))).view(-1, 1, 1, 1)
        z_t = self.schedule.add_noise(torch.where(from_lq, z_lq, z_hq), eps, t)
        return self.error(denoise(z_t, t), self.schedule.eps_from_x0(z_t, z_hq, t))

    def error(self, value: Tensor, target: Tensor) -> Tensor:
        """Squared error of latents or noises (B, C, h, w), a mean over all elements."""
        return F.mse_loss(value, target)

    def check_trained(self) -> None:
        """UserError where l_tmax is trained, but not at every timestep that the model will be sampled with.

        Not checked where `nuts.t_max_step` asks for another.
        """
        c, noisiest = self.config.nuts, len(self.schedule) - 1
        trained = {noisiest, self.t_max} | set(range(self.t_first, self.t_end) if "l_diff" in c.losses else ())
        never = [step.t for step in self.plan if step.t not in trained]
        if never and "l_tmax" in c.losses and not c.t_max_step:
            raise UserError(
                f"the sampler evaluates t={', '.join(map(str, never))}, which these losses never train (l_tmax: "
                f"{self.t_max}): leave out sampler.timesteps and use sampler.plan=nuts, train l_diff at all t with "
                "nuts.l_diff_t=all, or give the timestep that l_tmax shall train, nuts.t_max_step"
            )

    def diff_range(self) -> tuple[int, int]:
        """First timestep that l_diff is trained at, and the one after the last."""
        c, s, T = self.config.nuts, self.config.sampler, len(self.schedule)
        if c.l_diff_t == "interval":  # "when t = T and t falls into the range of [t_max, t_min]" (Sec. III-B, CCSR)
            first = t_max_step(s.steps, s.t_min, s.grid, T) if round(s.steps * s.t_min) else 0
            return min(first, self.t_max), self.t_max + 1
        return 0, self.t_max if c.l_diff_t == "as_released" and "l_T" in c.losses else T

    def prepare(self, batch: Batch) -> None:
        """Latents of both images; the hint is z_lq, a sample where that is one (CCSR v2)."""
        super().prepare(batch)
        if self.hint_latents is None:
            batch.cache["hint"] = batch.cache["z_lq"]

    def one_step(self, batch: Batch) -> Tensor:
        """x0_from_T (B, C, h, w): what one evaluation at the noisiest timestep gives, from where sampling starts."""
        z_lq = batch.cache["z_lq"]
        T = torch.full((len(z_lq),), len(self.schedule) - 1, device=z_lq.device)
        start = self.config.sampler.start
        z_T = start_latent(start, z_lq, self.schedule, lambda _, shape: batch.randn(*shape[1:]))
        return self.schedule.x0_from_eps(z_T, self.denoiser(z_T, T, self.condition(batch)), T)

    def restore(self, batch: Batch) -> Tensor:
        """One-step result, or the sampler's where one step is not trained, at noise that depends on the image alone."""
        sampled = self.one_step(batch) if "l_T" in self.config.nuts.losses else self.sampled(batch, self.plan)
        return self.latents.decode(sampled)

    def folder_config(self) -> FolderConfig:
        """The model's configuration, its default plan spelled out so that sampling needs no knowledge of NUTS."""
        return FolderConfig(model=self.model.config.model, sampler=with_plan(self.config.sampler, len(self.schedule)))
