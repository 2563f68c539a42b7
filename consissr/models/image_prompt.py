"""Image tokens for the hybrid prompt adapter: CLIP's image tower on the LQ image (Sec. 3.3, ConsisSR), then the
release's adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consissr.config.model import ModelConfig
from consissr.config.sd21 import CLIP_MEAN, CLIP_STD
from consissr.errors import UserError
from consissr.images.device import to_device
from consissr.models.attention import zeroed

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer


def build_tower(embed_dim: int, vision: dict[str, Any]) -> VisionTransformer:
    """An untrained open_clip image tower (GELU).

    `vision` has the keys of open_clip's `vision_cfg`: image_size, patch_size, width, layers, head_width.
    """
    from open_clip.transformer import VisionTransformer

    sizes = {name: vision[name] for name in ("image_size", "patch_size", "width", "layers")}
    heads = vision["width"] // vision["head_width"]
    return VisionTransformer(**sizes, heads=heads, mlp_ratio=4.0, output_dim=embed_dim)


def clip_input(x: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> CLIP's normalised input (B, 3, size, size), bicubic without antialiasing."""
    x = F.interpolate((x + 1) / 2, size=(size, size), mode="bicubic")
    mean, std = to_device(torch.tensor([CLIP_MEAN, CLIP_STD], dtype=x.dtype).view(2, 3, 1, 1), x.device)
    return (x - mean) / std


def tower_features(tower: VisionTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled feature (B, E) and patch features (B, P, E) of images (B, 3, H, W) in [-1, 1], not L2-normalised.

    Patch tokens pass the tower's final norm and projection, as the pooled token does.
    """
    features = tower.forward_intermediates(
        clip_input(x, tower.image_size[0]), indices=1, normalize_intermediates=True, output_fmt="NLC"
    )
    return features["image_features"], features["image_intermediates"][-1] @ tower.proj


class Adapter(nn.Module):
    """Features (B, N, E) -> image tokens (B, N, D): LayerNorm and three linear layers with GELU between them.

    It is the release's: in the paper RCLIP's embedding is fed to keys and values as it is (`model.adapter: none`).
    `init` 'as_released' sets the last layer to zero. With the zero output layer of the image branch behind it, neither
    then ever receives a gradient that depends on the image; 'default' keeps PyTorch's initialisation.
    """

    def __init__(self, features: int, width: int, init: str = "default") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)
        self.linear_3 = nn.Linear(width, width)
        if init == "as_released":
            zeroed(self.linear_3)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, E) -> (B, N, D), every token on its own."""
        hidden = F.gelu(self.linear_1(self.norm(features)))
        return self.linear_3(F.gelu(self.linear_2(hidden)))


def new_adapter(features: int, width: int, config: ModelConfig) -> nn.Module:
    """What `config` puts between features (B, N, E) and image tokens (B, N, D), untrained; an Identity for nothing."""
    if config.adapter == "mlp":
        return Adapter(features, width, config.adapter_init)
    if features != width:
        raise UserError(
            f"model.adapter is none, but the image encoder's embedding has {features} channels and the text's {width}: "
            "use model.adapter=mlp, or an encoder of that width"
        )
    return nn.Identity()


class ImagePrompt(nn.Module):
    """Image -> image tokens, with 'pooled' (one) or 'patches' (one per patch of the tower) `tokens`."""

    def __init__(self, tower: VisionTransformer, adapter: nn.Module, tokens: str = "pooled") -> None:
        super().__init__()
        self.tower = tower
        self.adapter = adapter
        self.tokens = tokens

    def features(self, x: Tensor) -> Tensor:
        """The tower's features (B, N, E) of images (B, 3, H, W) in [-1, 1]."""
        pooled, patches = tower_features(self.tower, x)
        return pooled[:, None] if self.tokens == "pooled" else patches

    def encode(self, x: Tensor) -> Tensor:
        """Image tokens (B, N, D) of images (B, 3, H, W) in [-1, 1]; the tower runs without gradients."""
        with torch.no_grad():
            features = self.features(x)
        return self.adapter(features)


def tower_config(tower: VisionTransformer) -> dict[str, Any]:
    """open_clip's "embed_dim" and "vision_cfg" of an image tower: what `build_tower` builds it from."""
    heads = tower.transformer.resblocks[0].attn.num_heads
    vision = {
        "image_size": tower.image_size[0],
        "patch_size": tower.patch_size[0],
        "width": tower.transformer.width,
        "layers": tower.transformer.layers,
        "head_width": tower.transformer.width // heads,
    }
    return {"embed_dim": tower.output_dim, "vision_cfg": vision}


def prompt_config(prompt: ImagePrompt) -> dict[str, Any]:
    """Sizes of an image prompt: what `build_image_prompt` makes it from, and a model folder stores."""
    adapter = prompt.adapter
    return tower_config(prompt.tower) | {
        "width": adapter.linear_3.out_features if isinstance(adapter, Adapter) else prompt.tower.output_dim
    }
