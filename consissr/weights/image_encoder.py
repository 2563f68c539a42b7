"""Where a new image branch takes CLIP's image tower from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from consissr.config.model import ModelConfig
from consissr.errors import UserError
from consissr.models.image_prompt import build_tower, load_tower, tower_config
from consissr.weights.base import find_base
from consissr.weights.files import BUNDLED, find_model, load_strict

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

OPEN_CLIP = "open_clip:"


def has_tower(folder: str | Path) -> bool:
    """Whether `folder` holds an image_encoder/ of ours."""
    return (Path(folder) / "image_encoder" / "config.json").is_file()


def find_tower(config: ModelConfig) -> VisionTransformer:
    """The image tower that `config.image_encoder` names, float32 on the CPU. Raises UserError if there is none."""
    name = config.image_encoder
    if name.startswith(OPEN_CLIP):
        return open_clip_tower(name.removeprefix(OPEN_CLIP))
    folders = find_base(config.base) if name == "base" else [str(find_model(name)) if name in BUNDLED else name]
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
        reason = str(error).splitlines()[0]
        raise UserError(
            f"open_clip weights '{weights}' of {model} could not be loaded ({reason}): download them where there is a "
            f"network and give the file, model.image_encoder={OPEN_CLIP}{model}/FILE"
        ) from error
    settings = tower_config(clip.visual)
    tower = build_tower(settings["embed_dim"], settings["vision_cfg"])
    load_strict(tower, clip.visual.state_dict(), name)
    return tower
