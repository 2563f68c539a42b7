"""Stage 'prior': a diffusion UNet on the autoencoder's latents, in the place of SD2.1's (for `nano`).

The frozen text encoder of a clip run reads captions that are measured on the crops (captions.py), some of them dropped,
so that the empty prompt is the unconditional model.

The UNet predicts v (Salimans and Ho 2022), not the noise: at the noisiest timestep, where NUTS and one-step sampling
live, x0 then is the network's output itself, while noise prediction multiplies every error of a small network by 15.
"""

import shutil
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from consissr.config.sd21 import SD_BETAS
from consissr.diffusion.schedule import Schedule, alpha_bar
from consissr.errors import UserError
from consissr.nano.captions import caption
from consissr.nano.config import NanoConfig
from consissr.training.stage import EXPORT, Batch, Phase, Stage, check_crop
from consissr.weights.base import TextEncoder, load_text
from consissr.weights.folder import write_network, write_scheduler
from consissr.weights.latents import load_latents, save_latents

ENCODERS = ("text_encoder", "tokenizer", "image_encoder")
"""Folders of a clip run that become part of the base."""


def build_unet(config: NanoConfig, latent_channels: int, factor: int) -> nn.Module:
    """A diffusers UNet2DConditionModel of the configured widths, for latents `factor` times smaller than images."""
    from diffusers import UNet2DConditionModel

    c = config.prior
    return UNet2DConditionModel(
        sample_size=config.data.crop // factor,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=list(c.widths),
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in c.attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(c.attention)],
        layers_per_block=c.layers,
        attention_head_dim=c.heads,
        cross_attention_dim=c.context_dim,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def read_text(config: NanoConfig) -> TextEncoder:
    """The text encoder that `prior.text` names. UserError if it does not fit."""
    c = config.prior
    for name in ENCODERS:
        if not (Path(c.text) / name).is_dir():
            raise UserError(f"prior.text='{c.text}' has no {name}/: give the output_dir of a clip run")
    text = load_text(Path(c.text))
    width = text.model.config.hidden_size
    if width != c.context_dim:
        raise UserError(f"prior.context_dim={c.context_dim} must be the width of prior.text's encoder: use {width}")
    return text


class Prior(Stage):
    """Mean squared error on v at uniformly drawn timesteps."""

    needs_lq = False

    def __init__(self, config: NanoConfig, text: TextEncoder | None = None) -> None:
        """text: an encoder in place of the one that `prior.text` names."""
        vae = Path(config.init) / "vae"
        if not vae.is_dir():
            raise UserError(f"init='{config.init}': give the output_dir of an autoencoder run, which holds vae/")
        latents = load_latents(vae)
        check_crop(config.data.crop, latents.factor)
        unet = build_unet(config, latents.channels, latents.factor)
        self.config = config.prior
        self.text = text or read_text(config)
        self.networks = nn.ModuleDict({"latents": latents.requires_grad_(False), "unet": unet})
        self.compile_modules = [unet]
        self.export_dtype = EXPORT[config.export_precision]
        self.schedule = Schedule(alpha_bar())
        self.phases = [Phase("unet", dict(unet.named_parameters()), self.loss, config.optimizer)]

    def prepare(self, batch: Batch) -> None:
        """Latents of the photographs, and embeddings of their captions, of which some are dropped."""
        batch.cache["z"] = self.networks["latents"].encode(batch.hq).float()  # (B, C, h, w)
        shown = captions(batch, self.config.caption_dropout)
        batch.cache["text"] = self.text.encode(shown).to(batch.hq.device)  # (B, L, D)

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0."""
        z = batch.cache["z"]
        t = batch.randint(len(self.schedule))
        eps = batch.randn(*z.shape[1:])
        a = self.schedule.alpha_bar.to(t.device)[t].view(-1, 1, 1, 1)
        target = (a.sqrt() * eps - (1 - a).sqrt() * z).float()
        v = self.networks["unet"](self.schedule.add_noise(z, eps, t), t, batch.cache["text"]).sample.float()
        loss = F.mse_loss(v, target)
        return {"loss": loss}

    def export(self, folder: Path) -> None:
        """A base folder in diffusers' layout: unet/, vae/, scheduler/, and the encoders of the clip run."""
        write_network(folder / "unet", self.networks["unet"], self.export_dtype)
        save_latents(folder / "vae", self.networks["latents"], self.export_dtype)
        write_scheduler(folder, SD_BETAS, "v_prediction")
        for name in ENCODERS:
            shutil.copytree(Path(self.config.text) / name, folder / name, dirs_exist_ok=True)


def captions(batch: Batch, dropout: float) -> list[str]:
    """Captions of the photographs, a share `dropout` of them replaced by the empty prompt."""
    dropped = (batch.rand() < dropout).tolist()
    return ["" if d else caption(x) for x, d in zip(batch.hq, dropped, strict=True)]
