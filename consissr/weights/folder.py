"""The one loader and the one writer of model folders (their layout stands in files.py), and models that start anew."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consissr.config.folder import FolderConfig
from consissr.config.loading import changed, save_config
from consissr.config.model import ModelConfig
from consissr.errors import UserError
from consissr.models.controlnet import build_controlnet, empty_controlnet
from consissr.models.lora import add_lora, lora_state, merge_lora
from consissr.models.surgery import added_parameters, renew_copies, replace_blocks
from consissr.weights.base import Base, load_base
from consissr.weights.files import (
    LORA,
    UNET_ADAPTER,
    WEIGHTS,
    base_of,
    build,
    load_strict,
    read_config,
    read_json,
    read_weights,
    write_weights,
)
from consissr.weights.image_encoder import (
    find_tower,
    load_image_prompt,
    load_tower,
    new_image_prompt,
    save_image_prompt,
)
from consissr.weights.latents import load_latents, same_encoder, save_decoder, save_latents, stored_decoder
from consissr.weights.model import Model

log = logging.getLogger(__name__)

PROMPTS = "prompts.safetensors"
"""Embeddings of the prompts that a model samples with, where they are not the base's text encoder's to make."""


def load_model(
    folder: Path,
    base: str | None = None,
    dtype: torch.dtype = torch.float32,
    additions: ModelConfig | None = None,
    prompts: Sequence[str] | None = None,
    tuned_decoder: bool = True,
    **settings: Any,
) -> Model:
    """The model of a folder (see `find.find_model`) with its base: every network as `dtype` on the CPU, in memory once.

    base: another place of the base. additions: what a run's model has, on its own base; what the folder's model lacks
    of it starts as a no-op. prompts: what the text encoder encodes before it is let go (default: the sampler's two).
    tuned_decoder: false takes the base's decoder in place of one that the folder has tuned. settings: fields of
    SamplerConfig, in place of the folder's. Raises UserError.
    """
    config = read_config(folder)
    before, sampler = config.model, changed(config.sampler, settings)
    config = replace(config, model=additions or before, sampler=sampler)
    if additions is not None:
        check_additions(folder, before, config.model)
        base = base or additions.base
    known = load_prompts(folder)
    wanted = (sampler.positive, sampler.negative) if prompts is None else prompts
    base = base or base_of(folder, config)
    brought = Path(base).exists() and Path(base).resolve().is_relative_to(folder.resolve())  # which may be "."
    if not tuned_decoder and brought:
        raise UserError(f"keep_decoder=false: {folder} brings the base along that its decoder was tuned with; name "
                        "another by its folder, model.base=FOLDER")  # fmt: skip
    base_model = load_base(base, dtype, wanted if known is None else ())
    controlnet = load_controlnet(folder, config.model, dtype, before)
    check_fit(folder, controlnet, base_model.unet, known or {})
    load_unet_additions(folder, base_model.unet, config.model, before)
    lora = read_weights(folder / LORA) if before.unet_lora else None
    if additions is not None and config.model.unet_lora:
        add_lora(base_model.unet, config.model.unet_lora, lora)
    elif lora is not None:
        merge_lora(base_model.unet, lora)
    decoder, latents = stored_decoder(folder / "vae"), base_model.latents
    if decoder == "own" or (decoder == "tuned" and tuned_decoder):
        latents = load_latents(folder / "vae", latents, dtype)
    if not tuned_decoder:
        if decoder == "own" and not same_encoder(latents, base_model.latents):
            raise UserError(f"keep_decoder=false: {folder} has an encoder of its own, whose latents the base's decoder "
                            "does not read: leave keep_decoder out")  # fmt: skip
        decoder, latents = "base", base_model.latents
    return Model(
        config=config,
        unet=base_model.unet,
        controlnet=controlnet,
        latents=latents,
        decoder=decoder,
        hint_latents=load_latents(folder / "hint_vae", dtype=dtype) if (folder / "hint_vae").is_dir() else None,
        image_prompt=image_prompt_of(folder, config.model, before, base_model.unet.config.cross_attention_dim, dtype),
        prompts=base_model.prompts if known is None else known,
        own_prompts=known is not None,
        betas=base_model.betas,
        prediction_type=base_model.prediction_type,
    )


def new_model(config: ModelConfig, tower: str = "") -> Model:
    """An untrained model on the base of `config`, float32, with the embedding of the empty prompt.

    tower: a folder with the image tower that its image branch takes; empty: the one that `config` names.
    """
    base = load_base(config.base, prompts=[""])
    return untrained(config, base, lambda: load_tower(Path(tower))[0] if tower else find_tower(config))


def untrained(config: ModelConfig, base: Base, tower: Callable[[], nn.Module]) -> Model:
    """An untrained model on `base`, whose UNet takes what `config` adds. `tower`: makes the image branch's, if any."""
    controlnet = build_controlnet(base.unet, config)
    replace_blocks(base.unet, config)
    if config.unet_lora:
        add_lora(base.unet, config.unet_lora)
    prompt = None
    if config.image_prompt != "none":
        prompt = new_image_prompt(tower(), base.unet.config.cross_attention_dim, config)
    return Model(
        config=FolderConfig(model=config),
        unet=base.unet,
        controlnet=controlnet,
        latents=base.latents,
        image_prompt=prompt,
        prompts=base.prompts,
        betas=base.betas,
        prediction_type=base.prediction_type,
    )


def save_model(folder: Path, model: Model, dtype: torch.dtype | None = None, card: str = "") -> None:
    """Write a model folder, without its base; `dtype`: storage of the weights, None: as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(model.config, folder / "config.yaml")
    write_network(folder / "controlnet", model.controlnet, dtype)
    stored = set() if model.unet is None else own_parameters(model.unet, model.config.model)
    if stored:
        state = model.unet.state_dict()
        write_weights(folder / UNET_ADAPTER, {name: state[name] for name in stored}, dtype)
    if model.unet is not None and (lora := lora_state(model.unet)):
        write_weights(folder / LORA, lora, dtype)
    if model.decoder != "base":
        (save_decoder if model.decoder == "tuned" else save_latents)(folder / "vae", model.latents, dtype)
    if model.hint_latents is not None:
        save_latents(folder / "hint_vae", model.hint_latents, dtype)
    if model.image_prompt is not None:
        save_image_prompt(folder, model.image_prompt, dtype)
    if model.own_prompts:
        save_prompts(folder, model.prompts)
    (folder / "README.md").write_text(card or f"# {folder.name}\n\nWritten by scripts/train.py; see config.yaml.\n")


def write_network(folder: Path, network: Any, dtype: torch.dtype | None = None) -> None:
    """config.json and weights of a diffusers network."""
    folder.mkdir(parents=True, exist_ok=True)
    network.save_config(folder)
    write_weights(folder / WEIGHTS, network.state_dict(), dtype)


def save_base(folder: Path, model: Model, dtype: torch.dtype | None = None) -> None:
    """A model's base in diffusers' layout, without what the model adds (and without a text encoder)."""
    added = set(added_parameters(model.unet))
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    model.unet.save_config(folder / "unet")
    plain = {name: value for name, value in model.unet.state_dict().items() if name not in added}
    write_weights(folder / "unet" / WEIGHTS, plain, dtype)
    save_latents(folder / "vae", model.latents, dtype)
    write_scheduler(folder, model.betas, model.prediction_type)


def write_scheduler(folder: Path, betas: tuple[int, float, float], prediction_type: str) -> None:
    """scheduler/ of a base folder, in diffusers' words; `betas`: steps, first and last beta."""
    (folder / "scheduler").mkdir(exist_ok=True)
    schedule = dict(zip(("num_train_timesteps", "beta_start", "beta_end"), betas, strict=True))
    schedule |= {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "prediction_type": prediction_type}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=1))


def save_prompts(folder: Path, prompts: dict[str, Tensor]) -> None:
    """Embeddings (1, L, D) of prompts, by a text encoder that the model's base does not have."""
    from safetensors.torch import save_file

    embedded = {str(i): tensor.float().cpu().contiguous() for i, tensor in enumerate(prompts.values())}
    save_file(embedded, folder / PROMPTS, metadata={"prompts": json.dumps(list(prompts))})


def load_prompts(folder: Path) -> dict[str, Tensor] | None:
    """Prompt -> embedding (1, L, D), or None where the base's text encoder makes them."""
    from safetensors import SafetensorError, safe_open

    path = folder / PROMPTS
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            listed = json.loads(file.metadata()["prompts"])
            embeddings = {str(prompt): file.get_tensor(str(i)) for i, prompt in enumerate(listed)}
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy or download the model again") from error
    if not embeddings or any(tensor.ndim != 3 or not tensor.is_floating_point() for tensor in embeddings.values()):
        raise UserError(f"{path} holds no embeddings (1, L, D) of prompts: copy or download the model again")
    return embeddings


def load_controlnet(
    folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32, before: ModelConfig | None = None
) -> nn.Module:
    """The ControlNet of a model folder, as `dtype` on the CPU, with the additions of `model`.

    Those that the folder's own model, `before`, lacks start as no-ops.
    """
    sizes, what = read_json(folder / "controlnet" / "config.json"), f"{folder.name}/controlnet"
    weights = read_weights(folder / "controlnet" / WEIGHTS)
    whole = before is None or before == model
    file = folder / "controlnet" / "config.json"
    controlnet = build(file, lambda: empty_controlnet(sizes, model), "meta" if whole else "cpu")
    if whole:
        load_strict(controlnet, weights, what, dtype=dtype)
    else:
        load_known(controlnet, weights, set(controlnet.state_dict()), what)
    return controlnet


def check_fit(folder: Path, controlnet: Any, unet: Any, prompts: dict[str, Tensor]) -> None:
    """UserError where ControlNet or prompts are made for another UNet than the base's."""
    for name in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim"):
        ours, base = getattr(controlnet.config, name), getattr(unet.config, name)
        if as_tuple(ours) != as_tuple(base):
            file = folder / "controlnet" / "config.json"
            raise UserError(f"{file} says {name} {ours}, the base's UNet {base}: the model belongs to another base")
    width = unet.config.cross_attention_dim
    if wrong := [prompt for prompt, embedding in prompts.items() if embedding.shape[-1] != width]:
        raise UserError(f"{folder / PROMPTS}: '{wrong[0]}' is not {width} wide: the model belongs to another base")


def as_tuple(value: Any) -> Any:
    """Lists of a config.json as tuples."""
    return tuple(value) if isinstance(value, list) else value


def load_unet_additions(folder: Path, unet: nn.Module, model: ModelConfig, before: ModelConfig | None = None) -> None:
    """Give the base's UNet the additions of `model` and load what the folder stores of them, in place."""
    replace_blocks(unet, model)
    stored = own_parameters(unet, model)
    if before is None or before == model:
        if stored:
            load_strict(unet, read_weights(folder / UNET_ADAPTER), f"{folder.name}/{UNET_ADAPTER}", subset=stored)
        return
    trained = tuple(before.unet_trained)
    if lost := {n for n in unet.state_dict() if n.startswith(trained)} - stored:
        raise UserError(
            f"{folder} holds a trained {min(lost)} of the UNet, which this run would lose: use "
            f"model.unet_trained=[{','.join(trained)}]"
        )
    wanted = {n for n in unet.state_dict() if n.startswith(trained)} | set(added_parameters(unet))
    weights = read_weights(folder / UNET_ADAPTER) if (folder / UNET_ADAPTER).is_file() else {}
    load_known(unet, weights, wanted, f"{folder.name}/{UNET_ADAPTER}")


def load_known(network: nn.Module, weights: dict[str, Tensor], wanted: set[str], what: str) -> None:
    """Load `weights` into `network`: all names of `wanted` but additions that are new, which keep their start."""
    fresh = wanted & (set(added_parameters(network)) - weights.keys())
    if fresh:
        log.info("%s: %d parameters are new in %s", what, len(fresh), type(network).__name__)
    if wanted - fresh or weights:
        load_strict(network, weights, f"{what} (as the run's model describes it)", subset=wanted - fresh)
    renew_copies(network, fresh)


def check_additions(folder: Path, before: ModelConfig, model: ModelConfig) -> None:
    """UserError where `model` leaves out what the folder's model has, or reads its output in another way."""
    words = ["hint", "position_embedding", "transposed_attention", "residual", "unet_lora"]
    words += ["image_prompt"] if model.image_prompt == "none" else ["adapter"] if before.image_prompt != "none" else []
    differ = {name: getattr(before, name) for name in words if getattr(before, name) != getattr(model, name)}
    lost = [f"model.{name}={value}" for name, value in differ.items() if value or name == "residual"]
    if lost:
        raise UserError(f"{folder} was trained with what this run leaves out or does otherwise: use {' '.join(lost)}")


def image_prompt_of(folder: Path, model: ModelConfig, before: ModelConfig, width: int, dtype: torch.dtype):
    """The folder's image tower and adapter; where `model` alone has an image branch a new one, on the named tower."""
    if model.image_prompt == "none":
        return None
    if before.image_prompt == "none":
        return new_image_prompt(find_tower(model), width, model)
    return load_image_prompt(folder, model, dtype)


def own_parameters(unet: nn.Module, config: ModelConfig) -> set[str]:
    """Names of the UNet's parameters that belong to the model and not to its base: added or trained ones."""
    trained = {n for n, _ in unet.named_parameters() if n.startswith(tuple(config.unet_trained))}
    if config.unet_trained and not trained:
        raise UserError(f"model.unet_trained {config.unet_trained} names no part of the base's UNet")
    return trained | set(added_parameters(unet))
