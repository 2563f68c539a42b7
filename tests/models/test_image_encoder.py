"""Where a new image branch's tower comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from consissr.config.model import ModelConfig
from consissr.errors import UserError
from consissr.models.image_prompt import build_tower, clip_input, tower_features
from consissr.weights.image_encoder import find_tower, save_tower

VISION = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1}


def test_a_folder_gives_its_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = build_tower(8, VISION)
    save_tower(tmp_path, tower)
    for config in (ModelConfig(image_encoder=str(tmp_path)), ModelConfig(base=str(tmp_path))):
        found = find_tower(config).state_dict()
        assert all(torch.equal(value, found[name]) for name, value in tower.state_dict().items())


@torch.no_grad()
def test_weights_of_open_clip_give_their_tower(tmp_path: Path) -> None:
    import open_clip

    (tmp_path / "tiny-test-tower.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(tmp_path / "tiny-test-tower.json")
    clip = open_clip.create_model("tiny-test-tower").eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    tower = find_tower(ModelConfig(image_encoder=f"open_clip:tiny-test-tower/{tmp_path}/clip.pt")).eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.allclose(tower_features(tower, x)[0], clip.encode_image(clip_input(x, 32)), atol=1e-6)
    with pytest.raises(UserError, match="give the file"):
        find_tower(ModelConfig(image_encoder=f"open_clip:tiny-test-tower/{tmp_path}/missing.pt"))


def test_a_missing_tower_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="open_clip:ViT-H-14"):
        find_tower(ModelConfig(base=str(tmp_path)))
