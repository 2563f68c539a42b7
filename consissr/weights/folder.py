"""Saving and loading the parts of a model folder (its layout stands in files.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from consissr.config.folder import FolderConfig
from consissr.config.loading import save_config
from consissr.config.model import ModelConfig
from consissr.diffusion.schedule import SD_BETAS
from consissr.errors import UserError
from consissr.models.attention import added_parameters, replace_blocks
from consissr.models.controlnet import empty_controlnet
from consissr.models.image_prompt import Adapter, ImagePrompt, build_tower
from consissr.models.vae.latents import Latents
from consissr.weights.files import UNET_ADAPTER, WEIGHTS, load_strict, read_json, read_weights, write_weights
from consissr.weights.image_encoder import IMAGE_WEIGHTS
from consissr.weights.latents import save_latents

PROMPTS = "prompts.safetensors"
"""Embeddings of the prompts that a model samples with, where they are not the base's text encoder's to make."""


def save_model(
    folder: Path,
    config: FolderConfig,
    controlnet: nn.Module,
    unet: nn.Module | None = None,
    latents: Latents | None = None,
    image_prompt: ImagePrompt | None = None,
    image_settings: dict[str, Any] | None = None,
    card: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model folder. `unet`: what is not its base's is stored; `latents`: a tuned autoencoder; `dtype`: storage.

    image_prompt: image tower and adapter, with the `image_settings` that `build_image_prompt` makes them from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    write_network(folder / "controlnet", controlnet, dtype)
    if latents is not None:
        save_latents(folder / "vae", latents, dtype)
    if image_prompt is not None:
        write_weights(folder / "image_encoder" / IMAGE_WEIGHTS, image_prompt.state_dict(), dtype)
        (folder / "image_encoder" / "config.json").write_text(json.dumps(image_settings, indent=1))
    stored = own_parameters(unet, config.model) if unet is not None else set()
    if stored:
        state = unet.state_dict()
        write_weights(folder / UNET_ADAPTER, {name: state[name] for name in stored}, dtype)
    (folder / "README.md").write_text(card or f"# {folder.name}\n\nWritten by scripts/train.py; see config.yaml.\n")


def write_network(folder: Path, network: Any, dtype: torch.dtype | None = None) -> None:
    """config.json and weights of a diffusers network."""
    folder.mkdir(parents=True, exist_ok=True)
    network.save_config(folder)
    write_weights(folder / WEIGHTS, network.state_dict(), dtype)


def save_base(
    folder: Path,
    unet: nn.Module,
    latents: Latents,
    dtype: torch.dtype | None = None,
    betas: tuple[int, float, float] = SD_BETAS,
    prediction_type: str = "epsilon",
) -> None:
    """A base model in diffusers' layout from parts of a checkpoint (text-free: see `save_prompts`).

    `betas`: steps, first and last beta; both defaults are SD2.1-base's.
    """
    added = set(added_parameters(unet))
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    unet.save_config(folder / "unet")
    plain = {name: value for name, value in unet.state_dict().items() if name not in added}
    write_weights(folder / "unet" / WEIGHTS, plain, dtype)
    save_latents(folder / "vae", latents, dtype)
    write_scheduler(folder, betas, prediction_type)


def write_scheduler(folder: Path, betas: tuple[int, float, float], prediction_type: str) -> None:
    """scheduler/ of a base folder, in diffusers' words."""
    (folder / "scheduler").mkdir(exist_ok=True)
    schedule = dict(zip(("num_train_timesteps", "beta_start", "beta_end"), betas, strict=True))
    schedule |= {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "prediction_type": prediction_type}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=1))


def save_prompts(folder: Path, encoder: Any, prompts: list[str]) -> None:
    """Embeddings of `prompts` by a text encoder that the model folder itself does not keep."""
    from safetensors.torch import save_file

    listed = list(dict.fromkeys(prompts))
    embedded = {str(i): encoder.encode([prompt]).float().cpu().contiguous() for i, prompt in enumerate(listed)}
    save_file(embedded, folder / PROMPTS, metadata={"prompts": json.dumps(listed)})


def load_prompts(folder: Path) -> dict[str, torch.Tensor] | None:
    """Prompt -> embedding (1, L, D), or None where the base's text encoder makes them."""
    from safetensors import SafetensorError, safe_open

    if not (folder / PROMPTS).is_file():
        return None
    try:
        with safe_open(folder / PROMPTS, "pt") as file:
            return {prompt: file.get_tensor(str(i)) for i, prompt in enumerate(json.loads(file.metadata()["prompts"]))}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / PROMPTS} cannot be read ({error}): copy or download the model again") from error


def load_controlnet(folder: Path, config: FolderConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The ControlNet of a model folder, as `dtype` on the CPU."""
    sizes = read_json(folder / "controlnet" / "config.json")
    with torch.device("meta"):
        controlnet = empty_controlnet(sizes, config.model)
    weights = read_weights(folder / "controlnet" / WEIGHTS)
    load_strict(controlnet, weights, f"{folder.name}/controlnet", dtype=dtype)
    return controlnet


def load_unet_additions(folder: Path, unet: nn.Module, config: FolderConfig) -> None:
    """Replace the base UNet's blocks as the model asks and load what was added, in place."""
    replace_blocks(unet, config.model)
    stored = own_parameters(unet, config.model)
    if stored:
        load_strict(unet, read_weights(folder / UNET_ADAPTER), f"{folder.name}/{UNET_ADAPTER}", subset=stored)


def own_parameters(unet: nn.Module, config: ModelConfig) -> set[str]:
    """Names of the UNet's parameters that belong to the model and not to its base: added or trained ones."""
    trained = {n for n, _ in unet.named_parameters() if n.startswith(tuple(config.unet_trained))}
    if config.unet_trained and not trained:
        raise UserError(f"model.unet_trained {config.unet_trained} names no part of the base's UNet")
    return trained | set(added_parameters(unet))


def build_image_prompt(settings: dict[str, Any], config: ModelConfig) -> ImagePrompt:
    """A new image tower and adapter; `settings`: open_clip's "embed_dim" and "vision_cfg", and the tokens' "width"."""
    tower = build_tower(settings["embed_dim"], settings["vision_cfg"])
    adapter = Adapter(settings["embed_dim"], settings["width"], config.adapter_init)
    return ImagePrompt(tower, adapter, config.image_tokens)


def load_image_prompt(folder: Path, config: FolderConfig, dtype: torch.dtype = torch.float32) -> ImagePrompt | None:
    """Image tower and adapter of a model folder, as `dtype` on the CPU, or None where the model has no image branch."""
    if config.model.image_prompt == "none":
        return None
    encoder = folder / "image_encoder"
    with torch.device("meta"):
        prompt = build_image_prompt(read_json(encoder / "config.json"), config.model)
    load_strict(prompt, read_weights(encoder / IMAGE_WEIGHTS), str(encoder), dtype=dtype)
    return prompt
