"""Stage 'nuts': the ControlNet under non-uniform timestep sampling (Sec. III-B, CCSR).

The ControlNet is trained, and those parts of the UNet that `model.unet_trained` names; all else is frozen. With
`nuts.losses: [l_diff]` this is ordinary ControlNet pre-training, which CCSR's release starts from.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ccsr.losses import nuts_losses
from ccsr.timesteps import t_max_step, with_plan
from consissr.checkpoint import find_model, read_config
from consissr.config import FolderConfig
from consissr.diffusion.schedule import Schedule, alpha_bar
from consissr.errors import UserError
from consissr.models.attention import replace_blocks
from consissr.models.base import NullText, idle_without_text, load_base
from consissr.models.controlnet import build_controlnet
from consissr.models.denoiser import Condition, Denoiser
from consissr.models.folder import load_controlnet, load_unet_additions, own_parameters, save_model
from consissr.models.latents import Latents
from consissr.train_config import TrainConfig
from consissr.training.stage import EXPORT, Batch, Phase


class Nuts:
    """l_diff at uniform t < t_max, l_T and l_tmax at the noisiest timestep (Eq. 2 and 3, CCSR)."""

    needs_lq = True

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        base = load_base(config.model.base, sha256=config.model.base_sha256)
        if config.init:
            folder = find_model(config.init)
            controlnet = load_controlnet(folder, read_config(folder))
            load_unet_additions(folder, base.unet, read_config(folder))
        else:
            controlnet = build_controlnet(base.unet, config.model)
            replace_blocks(base.unet, config.model)
        table = alpha_bar(*base.betas)
        self.schedule = Schedule(table)
        self.denoiser = Denoiser(base.unet, controlnet, table, base.prediction_type)
        self.latents = base.latents
        self.networks = nn.ModuleDict({"denoiser": self.denoiser, "latents": self.latents})
        self.hot = [base.unet, controlnet]
        self.buffers: dict[str, Tensor] = {}
        self.text = base.text.encode([""])  # (1, L, D): training is captionless (CCSR v2)
        if config.gradient_checkpointing:
            self.denoiser.unet.enable_gradient_checkpointing()
            controlnet.enable_gradient_checkpointing()
        self.weights = pixel_weights(self.latents) if config.nuts.metric == "pixels" else None
        s = config.sampler
        self.t_max = t_max_step(s.steps, config.nuts.t_max, s.grid, len(table))
        text_free = isinstance(base.text, NullText)
        trained = {n: p for n, p in controlnet.named_parameters() if not (text_free and idle_without_text(n))}
        own = own_parameters(base.unet, config.model)
        trained |= {f"unet.{n}": p for n, p in base.unet.named_parameters() if n in own}
        self.phases = [Phase("controlnet", trained, self.loss, config.optimizer)]

    def prepare(self, batch: Batch) -> None:
        """Latents of both images."""
        z = self.latents.encode(torch.cat([batch.hq, batch.lq])).float()
        batch.cache["z_hq"], batch.cache["z_lq"] = z.chunk(2)  # (B, C, h, w) each
        if self.config.nuts.posterior == "sample":
            for name, image in (("z_hq", batch.hq), ("z_lq", batch.lq)):
                noise = batch.randn(*z.shape[1:])
                batch.cache[name] = self.latents.encode(image, "sample", noise).float()

    def condition(self, batch: Batch) -> Condition:
        """Empty prompt and the LQ latent."""
        z_lq = batch.cache["z_lq"]
        return Condition(self.text.to(z_lq.device).expand(len(z_lq), -1, -1), z_lq)

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The configured losses, each with weight 1."""
        c = self.config.nuts
        z_hq, z_lq = batch.cache["z_hq"], batch.cache["z_lq"]
        condition = self.condition(batch)
        noises = [batch.randn(*z_hq.shape[1:]) for _ in range(3)]
        t = batch.randint(self.t_max if "l_T" in c.losses else len(self.schedule))
        parts = nuts_losses(
            lambda z_t, t: self.denoiser(z_t, t, condition), z_hq, z_lq, t, noises, self.schedule, self.t_max, c.start,
            c.losses, self.weights,
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
        """One-step result at noise that depends on the image alone."""
        return self.latents.decode(self.one_step(batch))

    def export(self, folder: Path) -> None:
        """A model folder."""
        dtype = EXPORT[self.config.export_precision]
        save_model(folder, self.folder_config(), self.denoiser.controlnet, self.denoiser.unet, dtype=dtype)

    def folder_config(self) -> FolderConfig:
        """The model's configuration, its default plan spelled out so that sampling needs no knowledge of NUTS."""
        return FolderConfig(model=self.config.model, sampler=with_plan(self.config.sampler, len(self.schedule)))




def pixel_weights(latents: Latents) -> Tensor:
    """(C,) squared change in pixels per unit of each latent channel through the linear path, of mean 1."""
    if latents.linear is None:
        raise UserError("nuts.metric=pixels needs an autoencoder with a linear path: use nuts.metric=latents")
    power = latents.linear.synthesis.weight.detach().square().sum(dim=(0, 2, 3))  # weight (3 f^2, C, 1, 1)
    return power / power.mean()
