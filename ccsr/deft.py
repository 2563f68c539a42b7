"""Stage 'deft': the VAE decoder tuned adversarially on stage-1 outputs (Sec. III-C, CCSR).

Of the first stage all but the decoder is frozen (`decoder_parameters` says what counts as it). The decoder is tuned on
x0_from_T, the first stage's one-step result; as in CCSR v2, it then serves any number of steps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccsr.adversary import build_adversary
from ccsr.nuts import Nuts
from ccsr.vgg import VggDistance
from consissr.config.deft import DeftConfig
from consissr.config.loading import changed_fields
from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.evaluation.learned import lpips_network
from consissr.models.vae.latents import narrowed
from consissr.training.restoration import model_of_init
from consissr.training.stage import Batch, Phase, Stage
from consissr.weights.model import Model


class Deft(Stage):
    """Two phases: the decoder, and the discriminator that it is tuned against."""

    def __init__(
        self,
        config: TrainConfig,
        model: Model | None = None,
        adversary: nn.Module | None = None,
        lpips: nn.Module | None = None,
    ) -> None:
        """Without `model`, the trained model is `init`'s, and the other networks are found as the config says."""
        self.config = config.deft
        model = model or trained_model(config)
        if config.deft.decoder_width != 1:
            model.latents, model.decoder = narrowed(model.latents, config.deft.decoder_width), "own"
        self.first = Nuts(first_stage(config, model), model)
        self.latents = self.first.latents
        model.decoder = "own" if model.decoder == "own" else "tuned"
        self.adversary = adversary or build_adversary(config.deft)
        self.networks = nn.ModuleDict({"first": self.first.networks, "adversary": self.adversary})
        self.lpips = lpips or self.perceptual_network(config.deft)
        if self.lpips is not None:
            self.networks["lpips"] = self.lpips
        self.compile_modules = [*self.first.compile_modules, self.latents.vae.decoder]
        if config.deft.discriminator == "patchgan":
            self.compile_modules.append(self.adversary)
        learned = dict(self.adversary.learned.named_parameters())
        self.phases = [
            Phase("decoder", self.decoder_parameters(), self.decoder_loss, config.optimizer),
            Phase("discriminator", learned, self.discriminator_loss, config.deft.optimizer),
        ]

    def decoder_loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The loss "the same as that of VAE" (Sec. III-C, CCSR): |D(z) - x| + LPIPS + weight * adversarial.

        LDM's VAE training scales the adversarial term to the other two's gradient (`deft.adaptive`). Its KL term
        belongs to the encoder, which is frozen here; its learned log-variance is left out. CCSR v2: 'l2' and
        `deft.clamp`.
        """
        c = self.config
        image = self.latents.decode(batch.cache["x0_from_T"]).float()  # (B, 3, S, S)
        image = image.clamp(-1, 1) if c.clamp else image
        batch.cache["image"] = image.detach()
        view = self.adversary.view(batch)
        logits, features = self.adversary(image, batch, view)
        losses = {"pixel": F.l1_loss(image, batch.hq) if c.reconstruction == "l1" else F.mse_loss(image, batch.hq)}
        reconstruction = losses["pixel"]
        if c.perceptual != "none":
            losses[c.perceptual] = self.perceptual(image, batch, view, features)
            reconstruction = reconstruction + c.perceptual_weight * losses[c.perceptual]
        losses["adversarial"] = -logits.mean()
        weight = c.adversarial_weight if step > c.adversarial_start else 0.0
        if c.adaptive and weight:
            last_layer = self.latents.vae.decoder.conv_out.weight
            losses["adaptive"] = adaptive_weight(reconstruction, losses["adversarial"], last_layer)
            weight = weight * losses["adaptive"]
        return {"loss": reconstruction + weight * losses["adversarial"], **losses}

    def discriminator_loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Hinge loss on the logits of photographs and of the decoder's images of this step.

        The hinge and its half are those of LDM's VAE training, which the paper points to, and of CCSR v1 and v2.
        """
        real, _ = self.adversary(batch.hq, batch, self.adversary.view(batch))
        fake, _ = self.adversary(batch.cache["image"], batch, self.adversary.view(batch))
        loss_real, loss_fake = F.relu(1 - real).mean(), F.relu(1 + fake).mean()
        return {"loss": 0.5 * (loss_real + loss_fake), "loss_real": loss_real, "loss_fake": loss_fake}

    def perceptual(self, image: Tensor, batch: Batch, view: Any, features: list[Tensor]) -> Tensor:
        """LPIPS (a scalar) between `image` (B, 3, S, S) and the photographs.

        view, features: how the adversary saw `image`, and its features (for other losses).
        """
        return self.lpips(image, batch.hq, normalize=False).mean()

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The discriminator's spectral norm vectors."""
        return dict(self.adversary.learned.named_buffers())

    def prepare(self, batch: Batch) -> None:
        """x0_from_T of the frozen first stage."""
        self.first.prepare(batch)
        batch.cache["x0_from_T"] = self.first.one_step(batch)
        self.adversary.prepare(batch)

    def perceptual_network(self, config: DeftConfig) -> nn.Module | None:
        """The frozen network that compares images, if any. UserError where its weights are missing."""
        if config.perceptual == "lpips":
            return lpips_network(Path(config.weights) if config.weights else None)
        return None

    def decoder_parameters(self) -> dict[str, nn.Parameter]:
        """What the first phase trains, by name."""
        decoder = dict(self.latents.vae.decoder.named_parameters())
        if self.latents.linear is not None:
            decoder["synthesis"] = self.latents.linear.synthesis.weight
        if self.config.post_quant_conv:
            convolution = self.latents.vae.post_quant_conv.named_parameters()
            decoder |= {f"post_quant_conv.{name}": parameter for name, parameter in convolution}
        return decoder

    @classmethod
    def untrained(cls, config: TrainConfig, model: Model) -> Deft:
        """The stage with `model` and, on the meta device, all other networks of the right sizes (dry runs)."""
        with torch.device("meta"):
            lpips = VggDistance(None) if config.deft.perceptual in ("lpips", "vgg") else None
            adversary = build_adversary(config.deft, untrained=True)
        return cls(config, model, adversary, lpips)

    def restore(self, batch: Batch) -> Tensor:
        """One-step result with the tuned decoder."""
        return self.latents.decode(batch.cache["x0_from_T"])

    def export(self, folder: Path) -> None:
        """The first stage's model folder, with the tuned decoder."""
        self.first.export(folder)


def trained_model(config: TrainConfig) -> Model:
    """The model of `init`, as its own config.yaml describes it; `model.base` may name another place of its base."""
    if not config.init:
        raise UserError("stage 'deft' tunes the decoder of a trained model: give init=MODEL_FOLDER (stage 'nuts')")
    fresh = type(config)()
    own = [(name, changed_fields(getattr(config, name), getattr(fresh, name))) for name in ("model", "sampler", "nuts")]
    given = [f"{name}.{field}" for name, fields in own for field in fields if (name, field) != ("model", "base")]
    if given:
        raise UserError(f"stage 'deft' has its model and sampler from init's config.yaml: leave out {', '.join(given)}")
    return model_of_init(config)


def first_stage(config: TrainConfig, model: Model) -> TrainConfig:
    """The run's configuration with the frozen first stage's model and sampler."""
    stored = model.config
    # no loss of the first stage is trained here: its checks are to pass whatever its plan is
    nuts = replace(config.nuts, posterior=stored.sampler.posterior, losses=["l_T"])
    tala = replace(config.tala, probability="off")
    return replace(config, model=stored.model, sampler=stored.sampler, nuts=nuts, tala=tala)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, limit: float = 1e4) -> Tensor:
    """||grad reconstruction|| / ||grad adversarial|| at the decoder's last layer, detached (LDM's VAE, CCSR v1)."""
    (g_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (g_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (g_reconstruction.norm() / (g_adversarial.norm() + 1e-4)).clamp(0, limit).detach()
