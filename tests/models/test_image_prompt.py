"""Image tokens: preprocessing, pooled and patch features, the adapter's two initialisations."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from consissr.config.model import ModelConfig
from consissr.config.sd21 import CLIP_MEAN, CLIP_STD
from consissr.errors import UserError
from consissr.models.image_prompt import (
    Adapter,
    ImagePrompt,
    build_tower,
    clip_input,
    new_adapter,
    prompt_config,
    tower_config,
    tower_features,
)
from consissr.weights.image_encoder import build_image_prompt

VISION = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return build_tower(20, VISION).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_clips_constants():
    from open_clip import constants

    assert (CLIP_MEAN, CLIP_STD) == (constants.OPENAI_DATASET_MEAN, constants.OPENAI_DATASET_STD)


def test_clip_input_is_normalised_and_resized_without_antialiasing():
    x = images(2, 3, 64, 64)
    got = clip_input(x, 64)
    for channel in range(3):
        assert torch.allclose(
            got[:, channel], ((x[:, channel] + 1) / 2 - CLIP_MEAN[channel]) / CLIP_STD[channel], atol=1e-6
        )
    large = images(1, 3, 128, 96)
    resized = F.interpolate((large + 1) / 2, (64, 64), mode="bicubic", align_corners=False)
    back = clip_input(large, 64) * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)
    assert torch.allclose(back, resized, atol=1e-5)
    assert clip_input(x.bfloat16(), 64).dtype == torch.bfloat16, "a rounded tower is given what it can read"
    assert clip_input(x.to("meta"), 64).is_meta


@torch.no_grad()
def test_features_are_the_towers_own(tower):
    x = images(2, 3, 64, 64)
    pooled, patches = tower_features(tower, x)
    assert torch.allclose(pooled, tower(clip_input(x, 64)), atol=1e-6)
    assert patches.shape == (2, 16, 20)
    tower.output_tokens = True
    tokens = tower(clip_input(x, 64))[1]
    assert torch.allclose(patches, tokens @ tower.proj, atol=1e-6)


@pytest.mark.parametrize(("kind", "count"), [("pooled", 1), ("patches", 16)])
def test_tokens_and_gradients(tower, kind, count):
    prompt = ImagePrompt(tower, Adapter(20, 24), kind)
    tokens = prompt.encode(images(2, 3, 100, 70))
    assert tokens.shape == (2, count, 24)
    tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prompt.adapter.parameters())
    assert all(p.grad is None for p in tower.parameters()), "the tower is not trained through its tokens"
    if kind == "pooled":
        assert torch.equal(ImagePrompt(tower, prompt.adapter).encode(images(2, 3, 100, 70)), tokens), "the default"
    if kind == "patches":
        assert (tokens[0, 0] - tokens[0, -1]).abs().max() > 1e-3, "patches must differ"


def test_the_released_initialisation_gives_a_zero_token(tower):
    features = torch.randn(2, 1, 20)
    assert Adapter(20, 24, "as_released")(features).abs().max() == 0
    assert Adapter(20, 24)(features).abs().max() > 0


@torch.no_grad()
def test_adapter_is_its_formula():
    """Norm, then three linear layers with GELU between them, for every token on its own."""
    adapter = Adapter(20, 24)
    features = images(2, 3, 20)
    normed = (features - features.mean(-1, keepdim=True)) / (features.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    one, two, three = ((layer.weight, layer.bias) for layer in (adapter.linear_1, adapter.linear_2, adapter.linear_3))
    wanted = F.linear(F.gelu(F.linear(F.gelu(F.linear(normed, *one)), *two)), *three)
    assert torch.allclose(adapter(features), wanted, atol=1e-5)


@torch.no_grad()
def test_without_an_adapter_the_embedding_is_the_token(tower):
    """The literal paper (Sec. 3.3): RCLIP's embedding is fed to keys and values, which must be as wide."""
    config = ModelConfig(image_prompt="hpa", adapter="none")
    prompt = ImagePrompt(tower, new_adapter(20, 20, config))
    x = images(1, 3, 50, 60)
    assert torch.equal(prompt.encode(x)[:, 0], tower_features(tower, x)[0]) and not list(prompt.adapter.parameters())
    again = build_image_prompt(json.loads(json.dumps(prompt_config(prompt))), config).eval()
    again.load_state_dict(prompt.state_dict())
    assert torch.equal(again.encode(x), prompt.encode(x))
    with pytest.raises(
        UserError, match="has 20 channels and the text's 24: use model.adapter=mlp, or an encoder of that width$"
    ):
        new_adapter(20, 24, config)


@torch.no_grad()
def test_a_tower_has_the_sizes_that_it_tells():
    tower = build_tower(20, VISION | {"layers": 1})
    assert tower.transformer.resblocks[0].mlp.c_fc.out_features == 4 * 32, "layers are four times as wide inside"
    assert tower_config(tower) == {"embed_dim": 20, "vision_cfg": VISION | {"layers": 1}}


@torch.no_grad()
def test_sizes_are_enough_to_build_it_again(tower):
    prompt = ImagePrompt(tower, Adapter(20, 24), "patches")
    sizes = json.loads(json.dumps(prompt_config(prompt)))
    assert sizes["vision_cfg"] == VISION
    again = build_image_prompt(sizes, ModelConfig(image_prompt="hpa", image_tokens="patches")).eval()
    again.load_state_dict(prompt.state_dict())
    x = images(1, 3, 50, 60)
    assert torch.equal(again.encode(x), prompt.encode(x))
    assert build_image_prompt(sizes, ModelConfig(adapter_init="as_released")).encode(x).abs().max() == 0
