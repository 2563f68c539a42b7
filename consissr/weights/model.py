"""One model in memory: what the loader returns, the readers of releases make, and the writer stores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from consissr.config.folder import FolderConfig
from consissr.config.sd21 import SD_BETAS
from consissr.diffusion.schedule import alpha_bar
from consissr.models.denoiser import Denoiser
from consissr.models.image_prompt import ImagePrompt
from consissr.models.residual import ResidualDenoiser
from consissr.models.text import OpenClipText
from consissr.models.vae.latents import Latents
from consissr.weights.ldm import KeyReport

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel


@dataclass(kw_only=True)
class Model:
    """The networks of one super-resolution model, on the CPU, and what its folder says of them."""

    config: FolderConfig
    """What the weights need, and how the model samples."""
    controlnet: ControlNetModel
    unet: UNet2DConditionModel | None
    """The base's UNet with what the model adds to it; None only where a release's folder brings none."""
    latents: Latents | None
    """The autoencoder; None only where a release's folder brings none."""
    decoder: str = "base"
    """What is not the base's in `latents`: nothing ('base'), the decoder ('tuned') or all of it ('own')."""
    hint_latents: Latents | None = None
    """The encoder of the ControlNet's hint, where it is another than `latents` (converted releases)."""
    image_prompt: ImagePrompt | None = None
    """Image tower and adapter, where the model has an image branch."""
    prompts: dict[str, Tensor] = field(default_factory=dict)
    """Prompt -> its embedding (1, L, D), float32."""
    own_prompts: bool = False
    """Whether `prompts` are stored with the model, because its base's text encoder doesn't make them."""
    betas: tuple[int, float, float] = SD_BETAS
    """Arguments of `diffusion.schedule.alpha_bar`: timesteps T, first and last beta."""
    prediction_type: str = "epsilon"
    """What the UNet puts out: 'epsilon' or 'v_prediction'."""

    @property
    def alpha_bar(self) -> Tensor:
        """The noise schedule (T,), float64."""
        return alpha_bar(*self.betas)

    def denoiser(self) -> Denoiser:
        """UNet and ControlNet as one network that predicts noise."""
        networks = self.unet, self.controlnet, self.alpha_bar, self.prediction_type
        residual = self.config.model.residual
        return ResidualDenoiser(*networks, residual=residual) if residual else Denoiser(*networks)


@dataclass(kw_only=True)
class Released(Model):
    """A published model: what its authors' files hold."""

    kind: str
    """'ConsisSR', 'ConsisSR's first stage (RCLIP)', 'CCSR v1' or 'CCSR v2'."""
    text: OpenClipText | None = None
    """The text encoder that came in the file."""
    report: KeyReport = field(default_factory=KeyReport)
    """What became of every key."""
