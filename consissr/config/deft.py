"""Stage 'deft'."""

from dataclasses import dataclass, field
from typing import ClassVar

from consissr.config.loading import check_word
from consissr.config.optimizer import OptimizerConfig
from consissr.errors import UserError


@dataclass(kw_only=True)
class DeftConfig:
    """Stage 'deft' (Sec. III-C, CCSR): the decoder tuned adversarially on stage-1 outputs."""

    PERCEPTUAL: ClassVar[tuple[str, ...]] = ("lpips", "none")

    reconstruction: str = "l1"
    """Pixel loss: 'l1' (paper: "the same as that of VAE") or 'l2' (as released)."""
    clamp: bool = False
    """Clamp decoded images to [-1, 1] before the losses: what lies outside has no gradient (as released)."""
    perceptual: str = "lpips"
    """'lpips' (on VGG features; paper: "the same as that of VAE") or 'none' (CCSR v2 as released at first: by mistake,
    says its author, who corrected it)."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss."""
    weights: str = ""
    """Folder with LPIPS's weight files; empty: the folders where torchvision and pyiqa keep theirs."""
    discriminator: str = "patchgan"
    """'patchgan' (LDM's VAE training, whose loss the paper takes over; CCSR v1) or 'dino' (heads on a frozen DINO:
    CCSR v2)."""
    dino: str = "timm/vit_small_patch16_224.dino"
    """DINO ViT-S/16 that the discriminator judges by: a file (dino_deitsmall16_pretrain.pth) or timm's hub id."""
    dino_v2: str = "timm/vit_small_patch14_dinov2.lvd142m"
    """DINOv2 ViT-S/14 whose summary of the LQ image is its condition: a file (dinov2_vits14_pretrain.pth) or hub id."""
    decoder_width: float = 1.0
    """Below 1, tune a decoder so much narrower, which begins with the full one's strongest channels (ours)."""
    post_quant_conv: bool = False
    """Tune the convolution before the decoder, too (CCSR v1 as released)."""
    adversarial_weight: float = 0.5
    """Weight of the generator's adversarial loss, before the adaptive factor."""
    adaptive: bool = True
    """Scale the adversarial loss by the ratio of gradient norms at the last layer (LDM's VAE training)."""
    adversarial_start: int = 0
    """Last optimiser step, counted from 0, without the adversarial loss for the decoder; -1: there is none."""
    discriminator_width: int = 64
    """Channels of the first layer of the PatchGAN (LDM's VAE training: 64)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The discriminator's optimiser."""

    def __post_init__(self) -> None:
        if not 0 < self.decoder_width <= 1:
            raise UserError(f"deft.decoder_width is {self.decoder_width}: use a share above 0, at most 1")
        check_word(self.reconstruction, ("l1", "l2"), "deft.reconstruction")
        check_word(self.perceptual, self.PERCEPTUAL, "deft.perceptual")
        check_word(self.discriminator, ("patchgan", "dino"), "deft.discriminator")
        if self.discriminator_width < 4 or self.discriminator_width % 4:
            raise UserError(f"deft.discriminator_width is {self.discriminator_width}: use a multiple of 4, such as 32")
