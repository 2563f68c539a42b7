"""Stage 'deft': the VAE decoder tuned adversarially on stage-1 outputs (Sec. III-C, CCSR).

Everything but the decoder is frozen. The decoder's input is x0_from_T, the one-step result, which serves any number
of steps: later steps' latents are of the same kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccsr.adversary import ADVERSARIES
from ccsr.losses import adaptive_weight, adversarial_weight, discriminator_hinge, generator_adversarial
from ccsr.nuts import Nuts
from ccsr.vgg import VggDistance
from consissr.config.stages import DeftConfig
from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.evaluation.learned import lpips_network
from consissr.models.vae.narrow import narrow_decoder
from consissr.training.stage import Batch, Phase
from consissr.weights.model import Model


class Deft:
    """Two phases: the decoder (pixels, features, adversarial), then the discriminator (hinge)."""

    needs_lq = True

    def __init__(
        self,
        config: TrainConfig,
        model: Model | None = None,
        adversary: nn.Module | None = None,
        lpips: nn.Module | None = None,
    ) -> None:
        """Without `model`, the trained model is `init`'s, and the other networks are found as the config says."""
        if not config.init:
            raise UserError("stage 'deft' tunes the decoder of a trained model: give init=MODEL_FOLDER (stage 'nuts')")
        self.config = config.deft
        self.first = Nuts(config, model)
        model, width = self.first.model, config.deft.decoder_width
        if width != 1:
            self.first.latents = self.first.networks["latents"] = narrow_decoder(model.latents, width)
        model.decoder = "tuned" if model.decoder != "own" and width == 1 else "own"
        self.latents = self.first.latents
        self.adversary = adversary or ADVERSARIES[config.deft.discriminator](config.deft)
        self.networks = nn.ModuleDict({"first": self.first.networks, "adversary": self.adversary})
        self.lpips = lpips or perceptual_network(config.deft)
        if self.lpips is not None:
            self.networks["lpips"] = self.lpips
        self.compile_modules = [*self.first.compile_modules, self.latents.vae.decoder]
        if config.deft.discriminator == "patchgan":
            self.compile_modules.append(self.adversary)
        decoder = dict(self.latents.vae.decoder.named_parameters())
        if self.latents.linear is not None:
            decoder["synthesis"] = self.latents.linear.synthesis.weight
        if config.deft.post_quant_conv:
            convolution = self.latents.vae.post_quant_conv.named_parameters()
            decoder |= {f"post_quant_conv.{name}": parameter for name, parameter in convolution}
        learned = dict(self.adversary.learned.named_parameters())
        self.phases = [
            Phase("decoder", decoder, self.decoder_loss, config.optimizer),
            Phase("discriminator", learned, self.discriminator_loss, config.deft.optimizer),
        ]

    @classmethod
    def untrained(cls, config: TrainConfig, model: Model) -> Deft:
        """The stage with `model` and, on the meta device, all other networks of the right sizes (dry runs)."""
        with torch.device("meta"):
            lpips = VggDistance(None) if config.deft.perceptual in ("lpips", "vgg") else None
            adversary = ADVERSARIES[config.deft.discriminator](config.deft, untrained=True)
        return cls(config, model, adversary, lpips)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The discriminator's spectral norm vectors."""
        return dict(self.adversary.learned.named_buffers())

    def prepare(self, batch: Batch) -> None:
        """x0_from_T of the frozen first stage."""
        self.first.prepare(batch)
        batch.cache["x0_T"] = self.first.one_step(batch)
        self.adversary.prepare(batch)

    def decoder_loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Pixel loss + perceptual loss + adversarial loss, the last scaled to the others' gradient if `adaptive`."""
        c = self.config
        image = self.latents.decode(batch.cache["x0_T"]).float()  # (B, 3, S, S)
        image = image.clamp(-1, 1) if c.clamp else image
        batch.cache["image"] = image.detach()
        view = self.adversary.view(batch)
        logits, features = self.adversary(image, batch, view)
        pixel = F.l1_loss(image, batch.hq) if c.reconstruction == "l1" else F.mse_loss(image, batch.hq)
        parts = {"pixel": pixel}
        reconstruction = pixel
        if c.perceptual != "none":
            parts[c.perceptual] = self.perceptual(image, batch, view, features)
            reconstruction = reconstruction + c.perceptual_weight * parts[c.perceptual]
        parts["adversarial"] = generator_adversarial(logits)
        weight = adversarial_weight(step, c.adversarial_weight, c.adversarial_start)
        if c.adaptive and weight:
            last_layer = self.latents.vae.decoder.conv_out.weight
            parts["adaptive"] = adaptive_weight(reconstruction, parts["adversarial"], last_layer)
            weight = weight * parts["adaptive"]
        return {"loss": reconstruction + weight * parts["adversarial"], **parts}

    def perceptual(self, image: Tensor, batch: Batch, view: Any, features: list[Tensor]) -> Tensor:
        """Distance (a scalar) of `image` (B, 3, S, S) to the photographs: LPIPS, VGG's or in the adversary's features.

        The photographs are shown to it under the same `view` that gave the image's `features`.
        """
        if self.lpips is not None:
            return self.lpips(image, batch.hq, normalize=False).mean()
        with torch.no_grad():
            _, wanted = self.adversary(batch.hq, batch, view)
        return feature_distance(features, wanted)

    def discriminator_loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Hinge loss on photographs and on the decoder's images of this step; 0 before `discriminator_start`."""
        real, _ = self.adversary(batch.hq, batch, self.adversary.view(batch))
        fake, _ = self.adversary(batch.cache["image"], batch, self.adversary.view(batch))
        parts = discriminator_hinge(real, fake)
        return parts | {"loss": parts["loss"] * (step >= self.config.discriminator_start)}

    def restore(self, batch: Batch) -> Tensor:
        """One-step result with the tuned decoder."""
        return self.latents.decode(batch.cache["x0_T"])

    def export(self, folder: Path) -> None:
        """The first stage's model folder, with the tuned decoder."""
        self.first.export(folder)
        if self.config.decoder_width != 1:
            with open(folder / "README.md", "a") as card:
                width = self.config.decoder_width
                card.write(f"\nIts decoder is {width:g} times as wide: a different, faster model.\n")


def perceptual_network(config: DeftConfig) -> nn.Module | None:
    """The frozen network that compares images, if `config.perceptual` needs one. UserError where it lacks weights."""
    if config.perceptual == "vgg":
        if not config.weights:
            raise UserError(
                "deft.perceptual=vgg needs deft.weights=FILE: VGG16's weights, which `python -m ccsr.vgg` converts"
            )
        return VggDistance(Path(config.weights))
    if config.perceptual == "lpips":
        return lpips_network(Path(config.weights) if config.weights else None)
    return None


def feature_distance(features: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Mean over layers of the L1 distance between maps of equal shapes, relative to the wanted maps' mean size."""
    pairs = zip(features, wanted, strict=True)
    distances = [F.l1_loss(f.float(), w.float()) / w.float().abs().mean() for f, w in pairs]
    return torch.stack(distances).mean()
