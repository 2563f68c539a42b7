"""CLIP's image tower: reading and writing an image_encoder/ folder, and where a new image branch takes one from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from consissr.config.model import ModelConfig
from consissr.errors import UserError, reason_of
from consissr.models.image_prompt import ImagePrompt, build_tower, new_adapter, prompt_config, tower_config
from consissr.weights.base import find_base
from consissr.weights.files import ASSETS, BUNDLED, build, load_strict, read_json, read_weights, write_weights

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

IMAGE_WEIGHTS = "model.safetensors"
"""Weights in an image_encoder/ folder; the tower's names begin with "tower."."""

OPEN_CLIP = "open_clip:"


def save_tower(folder: Path, tower: VisionTransformer, dtype: torch.dtype | None = None) -> None:
    """Write an image tower without an adapter to `folder`/image_encoder; `dtype`: storage, None: the tower's own."""
    state = {f"tower.{name}": value for name, value in tower.state_dict().items()}
    write_weights(folder / "image_encoder" / IMAGE_WEIGHTS, state, dtype)
    (folder / "image_encoder" / "config.json").write_text(json.dumps(tower_config(tower), indent=1))


def load_tower(folder: Path) -> tuple[VisionTransformer, dict[str, Any]]:
    """The image tower of `folder`/image_encoder, float32 on the CPU, and its "embed_dim" and "vision_cfg".

    `folder`: a base, a run's output_dir or a model folder, whose adapter is left out. UserError if there is no tower.
    """
    encoder = folder / "image_encoder"
    if not (encoder / "config.json").is_file():
        raise UserError(f"{folder} has no image_encoder/config.json: give a folder with an image tower (stage 'clip')")
    settings = read_json(encoder / "config.json")
    tower = build(encoder / "config.json", lambda: build_tower(settings["embed_dim"], settings["vision_cfg"]), "cpu")
    weights = read_weights(encoder / IMAGE_WEIGHTS)
    own = {name.removeprefix("tower."): value for name, value in weights.items() if name.startswith("tower.")}
    load_strict(tower, own, str(encoder))
    return tower, {name: settings[name] for name in ("embed_dim", "vision_cfg")}


def has_tower(folder: str | Path) -> bool:
    """Whether `folder` holds an image_encoder/ of ours."""
    return (Path(folder) / "image_encoder" / "config.json").is_file()


def find_tower(config: ModelConfig) -> VisionTransformer:
    """The image tower that `config.image_encoder` names, float32 on the CPU. Raises UserError if there is none."""
    name = config.image_encoder
    if name.startswith(OPEN_CLIP):
        return open_clip_tower(name.removeprefix(OPEN_CLIP))
    folders = find_base(config.base) if name == "base" else [str(ASSETS / "nano" / name) if name in BUNDLED else name]
    for folder in folders:
        if has_tower(folder):
            return load_tower(Path(folder))[0]
    raise UserError(
        f"model.image_encoder is '{name}', but {' and '.join(folders)} holds no image_encoder/config.json: name a "
        f"folder with one (a run of stage 'rclip'), or for SD2.1 {OPEN_CLIP}ViT-H-14/laion2b_s32b_b79k"
    )


def open_clip_tower(name: str) -> VisionTransformer:
    """The image tower of an open_clip model, named 'MODEL/TAG' (downloaded) or 'MODEL/WEIGHTS_FILE'."""
    import open_clip

    model, _, weights = name.partition("/")
    if model not in open_clip.list_models() or not weights:
        raise UserError(
            f"model.image_encoder '{OPEN_CLIP}{name}' is not of the form {OPEN_CLIP}NAME/TAG or {OPEN_CLIP}NAME/FILE "
            "with a model of open_clip: use ViT-H-14 for SD2.1"
        )
    if open_clip.get_model_config(model).get("quick_gelu"):
        raise UserError(f"open_clip's {model} uses QuickGELU, which SD2.1's tower does not: use ViT-H-14")
    try:
        clip = open_clip.create_model(model, pretrained=weights)
    except (RuntimeError, OSError) as error:
        reason = reason_of(error)
        raise UserError(
            f"open_clip weights '{weights}' of {model} could not be loaded ({reason}): download them where there is a "
            f"network and give the file, model.image_encoder={OPEN_CLIP}{model}/FILE"
        ) from error
    settings = tower_config(clip.visual)
    tower = build_tower(settings["embed_dim"], settings["vision_cfg"])
    load_strict(tower, clip.visual.state_dict(), name)
    return tower


def new_image_prompt(tower: VisionTransformer, width: int, model: ModelConfig) -> ImagePrompt:
    """A new adapter to tokens of `width` channels behind an image tower."""
    return ImagePrompt(tower, new_adapter(tower.output_dim, width, model), model.image_tokens)


def build_image_prompt(settings: dict[str, Any], model: ModelConfig) -> ImagePrompt:
    """A new image tower and adapter; `settings`: open_clip's "embed_dim" and "vision_cfg", and the tokens' "width"."""
    return new_image_prompt(build_tower(settings["embed_dim"], settings["vision_cfg"]), settings["width"], model)


def save_image_prompt(folder: Path, prompt: ImagePrompt, dtype: torch.dtype | None = None) -> None:
    """Write image tower and adapter to `folder`/image_encoder; `dtype`: storage, None: their own."""
    write_weights(folder / "image_encoder" / IMAGE_WEIGHTS, prompt.state_dict(), dtype)
    (folder / "image_encoder" / "config.json").write_text(json.dumps(prompt_config(prompt), indent=1))


def load_image_prompt(folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32) -> ImagePrompt:
    """Image tower and adapter of a model folder, as `dtype` on the CPU."""
    encoder = folder / "image_encoder"
    settings = read_json(encoder / "config.json")
    prompt = build(encoder / "config.json", lambda: build_image_prompt(settings, model))
    load_strict(prompt, read_weights(encoder / IMAGE_WEIGHTS), str(encoder), dtype=dtype)
    return prompt
