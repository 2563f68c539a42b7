"""What the stages 'tala', 'nuts' and 'deft' share: the networks that restore, which of them learn, and the result.

`starting_model` finds them (new ones on a base, or those of `init`); `Restoration` holds them, makes a batch's latents
and condition, and writes a model folder.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consissr.config.folder import FolderConfig
from consissr.config.model import ModelConfig
from consissr.config.training import TrainConfig
from consissr.diffusion.plans import Step
from consissr.diffusion.sampler import sample, start_latent
from consissr.diffusion.schedule import Schedule
from consissr.diffusion.tala import probability, tala_inputs
from consissr.errors import UserError
from consissr.models.denoiser import Condition, SoftPrompt
from consissr.models.lora import lora_parameters
from consissr.models.surgery import added_parameters, trainable_parameters
from consissr.models.vae.latents import Latents
from consissr.training.stage import EXPORT, Batch, Phase, check_crop
from consissr.weights.base import idle_without_text
from consissr.weights.folder import load_model, new_model, own_parameters, save_model
from consissr.weights.image_encoder import has_tower
from consissr.weights.model import Model

log = logging.getLogger(__name__)

ENCODER = ("time_embedding.", "conv_in.", "down_blocks.", "mid_block.")
"""Parts of the UNet that come before its decoder."""

TEXT_ATTENTION = re.compile(r"transformer_blocks\.\d+\.(attn2|norm2)\.")
"""The cross-attention to text in a network's parameter names."""


def starting_model(config: TrainConfig) -> Model:
    """The model that a run starts from.

    `init` may be a model folder, whose weights go on (what `model` adds to it starts as a no-op), or a folder with
    nothing but image_encoder/ (stage 'rclip'), whose tower the image branch of a new model takes.
    """
    if not config.init or tower_only(config.init):
        return new_model(config.model, tower=config.init)
    model = load_model(config.init, additions=config.model, prompts=[""])
    if "" not in model.prompts:
        raise UserError(f"{config.init} holds no embedding of the empty prompt, which training needs: convert it again")
    if config.stage != "deft" and model.decoder != "base":
        log.warning("%s: its decoder was tuned on its results and stays: tune it again (stage deft)", config.init)
    return model


def tower_only(init: str) -> bool:
    """Whether `init` is a folder with nothing but an image tower."""
    return has_tower(init) and not (Path(init) / "config.yaml").is_file()


def learning(found: Model, model: ModelConfig, encoder_gradients: bool = True) -> dict[str, nn.Parameter]:
    """What is trained, by name: the ControlNet, what was added to the UNet, `model.unet_trained`, and the adapter.

    With an image branch the ControlNet's text cross-attention stays as it is ("we keep all projection layers fixed in
    our HPA for both denoising UNet and ControlNet", Sec. 3.3, ConsisSR), and the norm before it, as released. Left out
    is also what can get no gradient.
    """
    controlnet, unet = found.controlnet, found.unet
    added = {network: set(added_parameters(network)) for network in (controlnet, unet)}
    copies = {network: added[network] - set(trainable_parameters(network)) for network in (controlnet, unet)}

    def learns(name: str) -> bool:
        if name in added[controlnet]:
            return name not in copies[controlnet]
        if model.image_prompt != "none" and TEXT_ATTENTION.search(name):
            return False
        return not (found.text_free and idle_without_text(name))

    trained = {name: p for name, p in controlnet.named_parameters() if learns(name)}
    of_unet = own_parameters(unet, model) - copies[unet] | lora_parameters(unet).keys()
    if not encoder_gradients:
        of_unet = {name for name in of_unet if not name.startswith(ENCODER)}
    trained |= {f"unet.{name}": p for name, p in unet.named_parameters() if name in of_unet}
    if found.image_prompt is not None:
        trained |= {f"adapter.{name}": p for name, p in found.image_prompt.adapter.named_parameters()}
    return trained


def cut_encoder(unet: nn.Module) -> None:
    """Let no gradient reach the UNet's encoder and middle, or pass through them, as ConsisSR's release trains."""

    def detached(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else tuple(detached(part) for part in value)

    for part in (unet.time_embedding, unet.conv_in, *unet.down_blocks, unet.mid_block):
        part.register_forward_hook(lambda module, given, output: detached(output))


class Restoration:
    """A stage whose networks restore images. Subclasses give `loss` and `restore`."""

    needs_lq = True
    probability = "off"
    """p(t) of this stage where `tala.probability` is 'default'."""
    posterior = "mode"
    """z_hq and z_lq are the 'mode' or a 'sample' of the VAE posterior; the hint is the mode."""

    def __init__(
        self,
        config: TrainConfig,
        model: Model | None = None,
        soft_prompt: SoftPrompt | None = None,
        encoder_gradients: bool = True,
    ) -> None:
        self.model = model = model or starting_model(config)
        check_crop(config.data.crop, model.latents.factor)
        self.config = config
        self.schedule = Schedule(model.alpha_bar)
        self.denoiser = model.denoiser()
        if not encoder_gradients:
            cut_encoder(model.unet)
        self.latents, self.hint_latents = model.latents, model.hint_latents
        self.image_prompt, self.soft_prompt = model.image_prompt, soft_prompt
        self.text = model.prompts[""]  # training is captionless (Algorithm 1, ConsisSR; CCSR v2)
        networks = {"denoiser": self.denoiser, "latents": self.latents, "hint_latents": self.hint_latents}
        networks |= {"image_prompt": self.image_prompt, "soft_prompt": soft_prompt}
        self.networks = nn.ModuleDict({name: part for name, part in networks.items() if isinstance(part, nn.Module)})
        self.compile_modules = [model.unet, model.controlnet, model.latents.vae.encoder]
        self.buffers: dict[str, Tensor] = {}
        if config.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
            model.controlnet.enable_gradient_checkpointing()
        trained = learning(model, config.model, encoder_gradients)
        self.phases = [Phase("controlnet", trained, self.loss, config.optimizer)]

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The parts to log, and their sum "loss"."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> None:
        """Latents z_hq, z_lq (B, C, h, w) of both images, that of the hint, and the image tower's features."""
        mean, logvar = (part.float() for part in self.latents.moments(torch.cat([batch.hq, batch.lq])))
        z = mean * self.latents.scale
        batch.cache["hint"] = z.chunk(2)[1] if self.hint_latents is None else self.hint_latents.encode(batch.lq).float()
        if self.posterior == "sample":
            noise = torch.cat([batch.randn(*mean.shape[1:]) for _ in range(2)])
            z = (mean + torch.exp(0.5 * logvar) * noise) * self.latents.scale
        batch.cache["z_hq"], batch.cache["z_lq"] = z.chunk(2)
        if self.image_prompt is not None:
            batch.cache["features"] = self.image_prompt.features(batch.lq)  # (B, N, E): the tower is frozen
        if self.soft_prompt is not None:
            batch.cache["soft"] = self.soft_prompt.encode(batch.lq)

    def condition(self, batch: Batch) -> Condition:
        """The empty prompt (and soft tokens after it), the LQ latent, and the image tokens."""
        hint = batch.cache["hint"]
        image = None if self.image_prompt is None else self.image_prompt.adapter(batch.cache["features"])
        condition = Condition(self.text.to(hint.device).expand(len(hint), -1, -1), hint, image)
        return condition.with_soft(batch.cache.get("soft"))

    @property
    def augmentation(self) -> str:
        """The form of p(t) that this run uses, or 'off'."""
        form = self.config.tala.probability
        return self.probability if form == "default" else form

    def augmented(self, batch: Batch, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """z_t and the noise to predict, both (B, C, h, w), under time-aware latent augmentation (Algorithm 1)."""
        c = self.config.tala
        p = probability(t, self.augmentation, c.gamma, len(self.schedule))
        r = batch.rand() if self.augmentation != "off" else torch.ones_like(p)
        r = r[:1] if c.shared_draw else r
        return tala_inputs(batch.cache["z_hq"], batch.cache["z_lq"], eps, t, r, p, self.schedule)[:2]

    @torch.no_grad()
    def sampled(self, batch: Batch, plan: list[Step]) -> Tensor:
        """What the sampler makes of a batch without guidance, (B, C, h, w), at noise of each image's own."""
        condition = self.condition(batch)

        def draw(name: str, shape: tuple[int, ...]) -> Tensor:
            return batch.randn(*shape[1:])

        start = start_latent(self.config.sampler.start, batch.cache["z_lq"], self.schedule, draw)
        return sample(lambda z_t, t: self.denoiser(z_t, t, condition), plan, start, self.schedule, draw)

    def export(self, folder: Path) -> None:
        """A model folder, which scripts/infer.py restores with as it is."""
        model = replace(self.model, config=self.folder_config(), latents=self.latents)
        save_model(folder, model, EXPORT[self.config.export_precision])

    def folder_config(self) -> FolderConfig:
        """The model's configuration, its plan included."""
        return FolderConfig(model=self.config.model, sampler=self.config.sampler)


def pixel_weights(latents: Latents) -> Tensor:
    """(C,) squared change in pixels per unit of each latent channel through the linear path, of mean 1."""
    if latents.linear is None:
        raise UserError("metric=pixels needs an autoencoder with a linear path: use metric=latents")
    power = latents.linear.synthesis.weight.detach().square().sum(dim=(0, 2, 3))  # weight (3 f^2, C, 1, 1)
    return power / power.mean()
