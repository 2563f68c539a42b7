"""The bundled models' variants of CCSR's stages: errors weighed by pixels, and a perceptual loss without weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccsr.deft import Deft
from ccsr.nuts import Nuts
from ccsr.vgg import VggDistance
from consissr.errors import UserError
from consissr.models.denoiser import SoftPrompt
from consissr.nano.config import NanoConfig, NanoDeftConfig
from consissr.nano.stages import pixel_weights, weighted
from consissr.training.stage import Batch
from consissr.weights.model import Model


class NanoNuts(Nuts):
    """NUTS' losses under `nuts.metric`."""

    def __init__(self, config: NanoConfig, model: Model | None = None, soft_prompt: SoftPrompt | None = None) -> None:
        super().__init__(config, model, soft_prompt)
        self.weights = pixel_weights(self.latents) if config.nuts.metric == "pixels" else None

    def error(self, value: Tensor, target: Tensor) -> Tensor:
        """Squared error of latents or noises (B, C, h, w), weighed as the config says."""
        return super().error(value, target) if self.weights is None else weighted(value - target, self.weights)


class NanoDeft(Deft):
    """DeFT whose images may be compared in the discriminator's own features, or in those of any VGG16."""

    def perceptual_network(self, config: NanoDeftConfig) -> nn.Module | None:
        """The frozen network that compares images, if any. UserError where its weights are missing."""
        if config.perceptual != "vgg":
            return super().perceptual_network(config)
        if not config.weights:
            raise UserError(
                "deft.perceptual=vgg needs deft.weights=FILE: VGG16's weights, which `python -m ccsr.vgg` converts"
            )
        return VggDistance(Path(config.weights))

    def perceptual(self, image: Tensor, batch: Batch, view: Any, features: list[Tensor]) -> Tensor:
        """Distance of `features` to those of the photographs under the same `view`, or of a network's."""
        if self.lpips is not None:
            return super().perceptual(image, batch, view, features)
        with torch.no_grad():
            _, wanted = self.adversary(batch.hq, batch, view)
        return feature_distance(features, wanted)


def feature_distance(features: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Mean over layers of the L1 distance between maps of equal shapes, relative to the wanted maps' mean size."""
    pairs = zip(features, wanted, strict=True)
    distances = [F.l1_loss(f.float(), w.float()) / w.float().abs().mean() for f, w in pairs]
    return torch.stack(distances).mean()
