"""Stage 'deft': the VAE decoder tuned adversarially on stage-1 outputs (Sec. III-C, CCSR).

Everything but `vae.decoder` is frozen. The decoder's input is x0_from_T, the one-step result, which serves any number
of steps: later steps' latents are of the same kind.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ccsr.losses import adaptive_weight, adversarial_weight, discriminator_hinge, generator_adversarial
from ccsr.nuts import Nuts
from ccsr.patchgan import PatchGAN
from consissr.errors import UserError
from consissr.models.folder import save_model
from consissr.train_config import TrainConfig
from consissr.training.stage import EXPORT, Batch, Phase


class Deft:
    """Two phases: the decoder (pixels, features, adversarial), then the discriminator (hinge)."""

    needs_lq = True

    def __init__(self, config: TrainConfig) -> None:
        if not config.init:
            raise UserError("stage 'deft' tunes the decoder of a trained model: give init=MODEL_FOLDER (stage 'nuts')")
        self.config = config.deft
        self.first = Nuts(config)
        self.latents = self.first.latents
        self.discriminator = PatchGAN(config.deft.discriminator_width)
        self.networks = nn.ModuleDict({"first": self.first.networks, "discriminator": self.discriminator})
        self.hot = [*self.first.hot, self.latents.vae.decoder, self.discriminator]
        self.buffers: dict[str, Tensor] = {}
        decoder = dict(self.latents.vae.decoder.named_parameters())
        if self.latents.linear is not None:
            decoder["synthesis"] = self.latents.linear.synthesis.weight
        self.phases = [
            Phase("decoder", decoder, self.decoder_loss, config.optimizer),
            Phase(
                "discriminator",
                dict(self.discriminator.named_parameters()),
                self.discriminator_loss,
                config.deft.optimizer,
            ),
        ]

    def prepare(self, batch: Batch) -> None:
        """x0_from_T of the frozen first stage."""
        self.first.prepare(batch)
        batch.cache["x0_T"] = self.first.one_step(batch)

    def decoder_loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Pixel loss + perceptual loss + adversarial loss, the last scaled to the others' gradient if `adaptive`."""
        c = self.config
        image = self.latents.decode(batch.cache["x0_T"]).float()  # (B, 3, S, S)
        batch.cache["image"] = image.detach()
        pixel = F.l1_loss(image, batch.hq) if c.reconstruction == "l1" else F.mse_loss(image, batch.hq)
        logits, features = self.discriminator(image)
        reconstruction = pixel
        parts = {"pixel": pixel}
        if c.perceptual == "features":
            with torch.no_grad():
                _, wanted = self.discriminator(batch.hq)
            parts["features"] = feature_distance(features, wanted)
            reconstruction = reconstruction + c.perceptual_weight * parts["features"]
        parts["adversarial"] = generator_adversarial(logits)
        weight = adversarial_weight(step, c.adversarial_weight, c.adversarial_start)
        if c.adaptive and weight:
            last_layer = self.latents.vae.decoder.conv_out.weight
            parts["adaptive"] = adaptive_weight(reconstruction, parts["adversarial"], last_layer)
            weight = weight * parts["adaptive"]
        return {"loss": reconstruction + weight * parts["adversarial"], **parts}

    def discriminator_loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Hinge loss on photographs and on the decoder's images of this step."""
        real, _ = self.discriminator(batch.hq)
        fake, _ = self.discriminator(batch.cache["image"])
        return discriminator_hinge(real, fake)

    def restore(self, batch: Batch) -> Tensor:
        """One-step result with the tuned decoder."""
        return self.latents.decode(batch.cache["x0_T"])

    def export(self, folder: Path) -> None:
        """A model folder with the tuned autoencoder."""
        first, denoiser = self.first, self.first.denoiser
        dtype = EXPORT[first.config.export_precision]
        save_model(folder, first.folder_config(), denoiser.controlnet, denoiser.unet, self.latents, dtype=dtype)


def feature_distance(features: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Mean over layers of the L1 distance between feature maps, relative to the wanted maps' mean size."""
    pairs = zip(features, wanted, strict=True)
    distances = [F.l1_loss(f.float(), w.float()) / w.float().abs().mean() for f, w in pairs]
    return torch.stack(distances).mean()
