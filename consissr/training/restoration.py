"""What the stages 'tala', 'nuts' and 'deft' share: the networks that restore, which of them learn, and the result.

`starting_model` finds them (new ones on a base, or those of `init`); `Restoration` holds them, makes a batch's latents
and condition, and writes a model folder.
"""

import logging
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from consissr.config.folder import FolderConfig
from consissr.config.model import ModelConfig
from consissr.config.training import TrainConfig
from consissr.diffusion.plans import Step
from consissr.diffusion.sampler import sample, start_latent
from consissr.diffusion.schedule import Schedule
from consissr.errors import UserError
from consissr.models.denoiser import Condition, SoftPrompt
from consissr.models.lora import lora_parameters
from consissr.models.surgery import added_parameters, trainable_parameters
from consissr.models.vae.latents import posterior_sample
from consissr.training.stage import EXPORT, Batch, Phase, Stage, check_crop
from consissr.weights.files import base_of, read_config
from consissr.weights.find import find_model
from consissr.weights.folder import load_model, new_model, own_parameters, save_model
from consissr.weights.image_encoder import has_tower
from consissr.weights.model import Model

log = logging.getLogger(__name__)

TEXT_ATTENTION = re.compile(r"transformer_blocks\.\d+\.(attn2|norm2)\.")
"""The cross-attention to text in a network's parameter names."""


def starting_model(config: TrainConfig) -> Model:
    """The model that a run starts from.

    `init` is a model folder (training goes on from its weights, on its own base unless the run names one; what `model`
    adds begins as a no-op) or a folder with image_encoder/ alone (stage 'rclip'), which a new model takes.
    """
    if not config.init or tower_only(config.init):
        return new_model(config.model, tower=config.init)
    model = model_of_init(config, config.model)
    s = config.sampler
    unknown = {s.positive, s.negative if s.guidance != 1 else s.positive} - model.prompts.keys()
    if model.own_prompts and unknown:
        raise UserError(
            f"{config.init} has no text encoder and keeps the prompts {sorted(model.prompts)} alone: "
            f"'{min(unknown)}' of sampler.positive or sampler.negative cannot be encoded"
        )
    if model.decoder != "base":
        log.warning(
            "%s: its decoder was tuned on its results and stays: tune it again (stage deft), or use keep_decoder=false",
            config.init,
        )
    return model


def model_of_init(config: TrainConfig, described: ModelConfig | None = None) -> Model:
    """The model of `init` as `described` (None: as it is), on its own base unless `model.base` names another."""
    folder = find_model(config.init)
    whole = replace(described or read_config(folder).model, base=base_for(config.model, folder))
    model = load_model(folder, additions=whole, prompts=[""], tuned_decoder=config.keep_decoder)
    if "" not in model.prompts:
        raise UserError(f"{config.init} holds no embedding of the empty prompt, which training needs: convert it again")
    return model


def base_for(model: ModelConfig, folder: Path) -> str:
    """The base that `model` names, or of the model in `folder` where it names none but the default."""
    return model.base if model.base != ModelConfig().base else base_of(folder, read_config(folder))


def tower_only(init: str) -> bool:
    """Whether `init` is a folder with nothing but an image tower."""
    return has_tower(init) and not (Path(init) / "config.yaml").is_file()


def learning(model: Model) -> dict[str, nn.Parameter]:
    """What is trained, by name: the ControlNet, what was added to the UNet, `model.unet_trained` or LoRA, and the
    release's adapter behind RCLIP.

    With an image branch the ControlNet's text cross-attention stays as it is ("we keep all projection layers fixed in
    our HPA for both denoising UNet and ControlNet", Sec. 3.3, ConsisSR), and the norm before it, as released.
    """
    controlnet, unet, config = model.controlnet, model.unet, model.config.model
    added = {network: set(added_parameters(network)) for network in (controlnet, unet)}
    copies = {network: added[network] - set(trainable_parameters(network)) for network in (controlnet, unet)}
    fixed = {n for n, _ in controlnet.named_parameters() if TEXT_ATTENTION.search(n)} - added[controlnet]
    if config.image_prompt == "none":
        fixed = set()
    trained = {n: p for n, p in controlnet.named_parameters() if n not in fixed | copies[controlnet]}
    of_unet = own_parameters(unet, config) - copies[unet] | lora_parameters(unet).keys()
    trained |= {f"unet.{n}": p for n, p in unet.named_parameters() if n in of_unet}
    if model.image_prompt is not None:
        trained |= {f"adapter.{n}": p for n, p in model.image_prompt.adapter.named_parameters()}
    return trained


class Restoration(Stage):
    """A stage whose networks restore images. Subclasses give `loss` and `restore`.

    posterior: z_hq and z_lq are the 'mode' or a 'sample' of the VAE posterior; the hint is the mode (stage 'nuts': it
    is z_lq).
    """

    def __init__(
        self, config: TrainConfig, model: Model | None, soft_prompt: SoftPrompt | None, posterior: str
    ) -> None:
        self.model = model = model or starting_model(config)
        check_crop(config.data.crop, model.latents.factor)
        self.config, self.posterior = config, posterior
        self.schedule = Schedule(model.alpha_bar)
        self.denoiser = model.denoiser()
        self.latents, self.hint_latents = model.latents, model.hint_latents
        self.image_prompt, self.soft_prompt = model.image_prompt, soft_prompt
        self.text = model.prompts[""]  # both releases train with the empty prompt
        parts = {"denoiser": self.denoiser, "latents": self.latents, "hint_latents": self.hint_latents}
        parts |= {"image_prompt": self.image_prompt, "soft_prompt": soft_prompt}
        self.networks = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
        self.compile_modules = [model.unet, model.controlnet, model.latents.vae.encoder]
        if model.image_prompt is not None:
            self.compile_modules += model.image_prompt.tower.transformer.resblocks
        if config.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
            model.controlnet.enable_gradient_checkpointing()
        self.phases = [Phase("controlnet", learning(model), self.loss, config.optimizer)]

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The losses to log, by name, and their sum "loss"."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> None:
        """Latents z_hq, z_lq (B, C, h, w) of both images, that of the hint, and the image tower's features."""
        mean, logvar = (part.float() for part in self.latents.moments(torch.cat([batch.hq, batch.lq])))
        z = mean * self.latents.scale
        batch.cache["hint"] = z.chunk(2)[1] if self.hint_latents is None else self.hint_latents.encode(batch.lq).float()
        if self.posterior == "sample":
            noise = torch.cat([batch.randn(*mean.shape[1:]) for _ in range(2)])
            z = posterior_sample(mean, logvar, noise) * self.latents.scale
        batch.cache["z_hq"], batch.cache["z_lq"] = z.chunk(2)
        if self.image_prompt is not None:
            batch.cache["features"] = self.image_prompt.features(batch.lq)  # (B, N, E): the tower is frozen
        if self.soft_prompt is not None:
            batch.cache["soft"] = self.soft_prompt.encode(batch.lq)

    def condition(self, batch: Batch) -> Condition:
        """The empty prompt (and soft tokens after it), the LQ latent, and the image tokens."""
        hint = batch.cache["hint"]
        image = None if self.image_prompt is None else self.image_prompt.adapter(batch.cache["features"])
        self.text = self.text.to(hint.device)  # once: a copy at every step would wait for the device
        condition = Condition(self.text.expand(len(hint), -1, -1), hint, image)
        return condition.with_soft(batch.cache.get("soft"))

    def form(self, default: str) -> str:
        """The form of p(t) (`diffusion/augmentation.py`): the config's, or the stage's `default`."""
        word = self.config.tala.probability
        return default if word == "default" else word

    @torch.no_grad()
    def sampled(self, batch: Batch, plan: list[Step]) -> Tensor:
        """What the sampler makes of a batch without guidance, (B, C, h, w), at noise of each image's own."""
        condition = self.condition(batch)

        def draw(name: str, shape: tuple[int, ...]) -> Tensor:
            return batch.randn(*shape[1:])

        start = start_latent(self.config.sampler.start, batch.cache["z_lq"], self.schedule, draw)
        return sample(lambda z_t, t: self.denoiser(z_t, t, condition), plan, start, self.schedule, draw)

    def export(self, folder: Path) -> None:
        """Write a model folder, which scripts/infer.py restores with as it is."""
        model = replace(self.model, config=self.folder_config())
        save_model(folder, model, EXPORT[self.config.export_precision])

    def folder_config(self) -> FolderConfig:
        """The model's configuration, its plan included."""
        return FolderConfig(model=self.model.config.model, sampler=self.config.sampler)
