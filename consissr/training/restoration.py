"""What the stages 'tala', 'nuts' and 'deft' share: the networks that restore, which of them learn, and the result.

`starting_parts` finds them (a base, and a ControlNet, additions and image branch, new or from `init`); `Restoration`
holds them, makes a batch's latents and condition, and writes a model folder.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from consissr.config.folder import FolderConfig
from consissr.config.model import ModelConfig
from consissr.config.training import TrainConfig
from consissr.diffusion.plans import Step
from consissr.diffusion.sampler import sample, start_latent
from consissr.diffusion.schedule import Schedule, alpha_bar
from consissr.diffusion.tala import probability, tala_inputs
from consissr.errors import UserError
from consissr.models.attention import added_parameters, renew_copies, replace_blocks, trainable_parameters
from consissr.models.controlnet import build_controlnet, empty_controlnet
from consissr.models.denoiser import Condition, Denoiser, SoftPrompt
from consissr.models.image_prompt import Adapter, ImagePrompt, prompt_config
from consissr.models.vae.latents import Latents
from consissr.training.stage import EXPORT, Batch, Phase, check_crop
from consissr.weights.base import Base, idle_without_text, load_base
from consissr.weights.files import UNET_ADAPTER, WEIGHTS, find_model, load_strict, read_config, read_weights
from consissr.weights.folder import PROMPTS, load_image_prompt, load_prompts, own_parameters, save_model
from consissr.weights.image_encoder import find_tower, has_tower, load_tower
from consissr.weights.latents import load_latents, save_latents

log = logging.getLogger(__name__)

ENCODER = ("time_embedding.", "conv_in.", "down_blocks.", "mid_block.")
"""Parts of the UNet that come before its decoder."""

TEXT_ATTENTION = re.compile(r"transformer_blocks\.\d+\.(attn2|norm2)\.")
"""The cross-attention to text in a network's parameter names."""


@dataclass
class Parts:
    """Networks that restore together, float32 on the CPU."""

    unet: nn.Module
    controlnet: nn.Module
    latents: Latents
    text: Tensor
    """Embedding of the empty prompt (1, L, D): training is captionless (Algorithm 1, ConsisSR; CCSR v2)."""
    table: Tensor
    """alpha_bar (T,)."""
    prediction_type: str = "epsilon"
    image_prompt: ImagePrompt | None = None
    hint_latents: Latents | None = None
    """The encoder of the ControlNet's hint, where it is another than `latents` (converted releases)."""
    text_free: bool = False
    """Whether the base was trained without text."""


def starting_parts(config: TrainConfig) -> Parts:
    """The parts that a run starts from.

    `init` may be a model folder, whose weights go on (what `model` adds to it starts as a no-op), or a folder with
    nothing but image_encoder/ (stage 'rclip'), whose tower the image branch of a new model takes.
    """
    folder = initial_model(config.init)
    prompts = None if folder is None else load_prompts(folder)
    base = load_base(config.model.base, sha256=config.model.base_sha256, prompts=[""] if prompts is None else ())
    if prompts is not None and "" not in prompts:
        raise UserError(f"{config.init} holds no embedding of the empty prompt, which training needs: convert it again")
    hint = None if folder is None else folder / "hint_vae"
    if config.stage != "deft" and folder is not None and (folder / "vae").is_dir():
        log.warning("%s: its decoder was tuned on its results; this run's result has the base's: tune it again (stage "
                    "deft)", config.init)  # fmt: skip
    return Parts(
        controlnet=new_controlnet(base, config.model) if folder is None else grown(folder, base, config.model),
        image_prompt=start_image_prompt(config, folder, base.unet.config.cross_attention_dim),
        unet=base.unet,
        latents=base.latents,
        text=(base.prompts if prompts is None else prompts)[""],
        table=alpha_bar(*base.betas),
        prediction_type=base.prediction_type,
        hint_latents=load_latents(hint) if hint is not None and hint.is_dir() else None,
        text_free=prompts is None and base.text_free,
    )


def initial_model(init: str) -> Path | None:
    """The model folder that `init` names; None for '' and for a folder with nothing but a tower."""
    tower_only = bool(init) and has_tower(init) and not (Path(init) / "config.yaml").is_file()
    return find_model(init) if init and not tower_only else None


def new_controlnet(base: Base, model: ModelConfig) -> nn.Module:
    """A new ControlNet; the base's UNet gets the additions, in place."""
    controlnet = build_controlnet(base.unet, model)
    replace_blocks(base.unet, model)
    return controlnet


def grown(folder: Path, base: Base, model: ModelConfig) -> nn.Module:
    """The ControlNet of a model folder with the additions of `model`; the base's UNet gets both, in place.

    Additions that the folder's model lacks start as no-ops. UserError where it has some that `model` leaves out, or
    reads the network's output in another way.
    """
    before = read_config(folder).model
    check_additions(folder, before, model)
    controlnet = empty_controlnet(json.loads((folder / "controlnet" / "config.json").read_text()), model)
    replace_blocks(base.unet, model)
    stored = {controlnet: read_weights(folder / "controlnet" / WEIGHTS), base.unet: {}}
    if (folder / UNET_ADAPTER).is_file():
        stored[base.unet] = read_weights(folder / UNET_ADAPTER)
    trained = tuple(before.unet_trained)
    kept = own_parameters(base.unet, model)
    if lost := {n for n in base.unet.state_dict() if n.startswith(trained)} - kept:
        raise UserError(
            f"{folder} holds a trained {min(lost)} of the UNet, which this run would lose: use "
            f"model.unet_trained=[{','.join(trained)}]"
        )
    for network, state in stored.items():
        added = set(added_parameters(network))
        names = set(network.state_dict())
        wanted = names if network is controlnet else {n for n in names if n.startswith(trained)} | added
        fresh = wanted & (added - state.keys())
        if fresh:
            log.info("%s: %d parameters are new in %s", folder.name, len(fresh), type(network).__name__)
        if wanted - fresh or state:
            load_strict(network, state, f"{folder.name} (as the run's model describes it)", subset=wanted - fresh)
        renew_copies(network, fresh)
    return controlnet


def check_additions(folder: Path, before: ModelConfig, model: ModelConfig) -> None:
    """UserError where `model` leaves out what the folder's model has, or reads its output in another way."""
    words = ["hint", "position_embedding", "transposed_attention", "residual"]
    words += ["image_prompt"] if model.image_prompt == "none" else []
    differ = {name: getattr(before, name) for name in words if getattr(before, name) != getattr(model, name)}
    lost = [f"model.{name}={value}" for name, value in differ.items() if value or name == "residual"]
    if lost:
        raise UserError(f"{folder} was trained with what this run leaves out or does otherwise: use {' '.join(lost)}")


def start_image_prompt(config: TrainConfig, folder: Path | None, width: int) -> ImagePrompt | None:
    """The image branch of `folder`'s model, or a new one on the tower that `init` or the model's config names.

    `model.adapter_init` unit begins the adapter anew, on the folder's tower, unless the folder's began so.
    """
    model = config.model
    if model.image_prompt == "none":
        return None
    if folder is not None and (before := read_config(folder).model).image_prompt != "none":
        found = load_image_prompt(folder, FolderConfig(model=model))
        if model.adapter_init == "unit" != before.adapter_init:
            log.info("%s: its image adapter begins anew (model.adapter_init=unit)", folder.name)
            found.adapter = Adapter(found.tower.output_dim, width, "unit")
        return found
    tower = load_tower(Path(config.init))[0] if config.init and folder is None else find_tower(model)
    return ImagePrompt(tower, Adapter(tower.output_dim, width, model.adapter_init), model.image_tokens)


def learning(parts: Parts, model: ModelConfig, encoder_gradients: bool = True) -> dict[str, nn.Parameter]:
    """What is trained, by name: the ControlNet, what was added to the UNet, `model.unet_trained`, and the adapter.

    With an image branch the ControlNet's text cross-attention stays as it is ("we keep all projection layers fixed in
    our HPA for both denoising UNet and ControlNet", Sec. 3.3, ConsisSR), and the norm before it, as released. Left out
    is also what can get no gradient.
    """
    controlnet, unet = parts.controlnet, parts.unet
    added = {network: set(added_parameters(network)) for network in (controlnet, unet)}
    copies = {network: added[network] - set(trainable_parameters(network)) for network in (controlnet, unet)}

    def learns(name: str) -> bool:
        if name in added[controlnet]:
            return name not in copies[controlnet]
        if model.image_prompt != "none" and TEXT_ATTENTION.search(name):
            return False
        return not (parts.text_free and idle_without_text(name))

    found = {name: p for name, p in controlnet.named_parameters() if learns(name)}
    of_unet = own_parameters(unet, model) - copies[unet]
    if not encoder_gradients:
        of_unet = {name for name in of_unet if not name.startswith(ENCODER)}
    found |= {f"unet.{name}": p for name, p in unet.named_parameters() if name in of_unet}
    if parts.image_prompt is not None:
        found |= {f"adapter.{name}": p for name, p in parts.image_prompt.adapter.named_parameters()}
    return found


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
        parts: Parts | None = None,
        soft_prompt: SoftPrompt | None = None,
        encoder_gradients: bool = True,
    ) -> None:
        parts = parts or starting_parts(config)
        check_crop(config.data.crop, parts.latents.factor)
        self.config = config
        self.schedule = Schedule(parts.table)
        self.denoiser = Denoiser(
            parts.unet, parts.controlnet, parts.table, parts.prediction_type, encoder_gradients, config.model.residual
        )
        self.latents, self.hint_latents = parts.latents, parts.hint_latents
        self.image_prompt, self.soft_prompt, self.text = parts.image_prompt, soft_prompt, parts.text
        networks = {"denoiser": self.denoiser, "latents": self.latents, "hint_latents": self.hint_latents}
        networks |= {"image_prompt": self.image_prompt, "soft_prompt": soft_prompt}
        self.networks = nn.ModuleDict({name: part for name, part in networks.items() if isinstance(part, nn.Module)})
        self.hot = [parts.unet, parts.controlnet, parts.latents.vae.encoder]
        self.buffers: dict[str, Tensor] = {}
        if config.gradient_checkpointing:
            parts.unet.enable_gradient_checkpointing()
            parts.controlnet.enable_gradient_checkpointing()
        trained = learning(parts, config.model, encoder_gradients)
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
        dtype, prompt = EXPORT[self.config.export_precision], self.image_prompt
        save_model(
            folder,
            self.folder_config(),
            self.denoiser.controlnet,
            self.denoiser.unet,
            image_prompt=prompt,
            image_settings=None if prompt is None else prompt_config(prompt),
            dtype=dtype,
        )
        start = initial_model(self.config.init)
        if start is not None and (start / PROMPTS).is_file():
            shutil.copyfile(start / PROMPTS, folder / PROMPTS)  # the base has no text encoder for them
        if self.hint_latents is not None:
            save_latents(folder / "hint_vae", self.hint_latents, dtype)

    def folder_config(self) -> FolderConfig:
        """The model's configuration, its plan included."""
        return FolderConfig(model=self.config.model, sampler=self.config.sampler)


def pixel_weights(latents: Latents) -> Tensor:
    """(C,) squared change in pixels per unit of each latent channel through the linear path, of mean 1."""
    if latents.linear is None:
        raise UserError("metric=pixels needs an autoencoder with a linear path: use metric=latents")
    power = latents.linear.synthesis.weight.detach().square().sum(dim=(0, 2, 3))  # weight (3 f^2, C, 1, 1)
    return power / power.mean()
