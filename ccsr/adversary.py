"""DeFT's adversaries under one interface: the discriminator, its random views, what it learns from.

`view(batch)` draws how both images of a comparison are seen; calling gives (logits, features) of images under a view.
"""

from torch import Tensor, nn

from ccsr.discriminator import Augmentation, ProjectedDiscriminator, ViT, condition_of, draw_windows, read_dino
from ccsr.patchgan import PatchGAN
from consissr.config.deft import DeftConfig
from consissr.training.stage import Batch


class PatchAdversary(nn.Module):
    """PatchGAN (the paper: "the same as that of VAE"): sees images as they are."""

    def __init__(self, config: DeftConfig, untrained: bool = True) -> None:
        """It always starts untrained."""
        super().__init__()
        self.discriminator = PatchGAN(config.discriminator_width)
        self.learned = self.discriminator

    def prepare(self, batch: Batch) -> None:
        """Nothing to prepare."""

    def view(self, batch: Batch) -> None:
        """Nothing to draw."""

    def forward(self, x: Tensor, batch: Batch, view: None) -> tuple[Tensor, list[Tensor]]:
        """(logits, features) of images (B, 3, H, W) in [-1, 1]."""
        return self.discriminator(x)


class DinoAdversary(nn.Module):
    """The release's: heads on a frozen DINO's features of augmented images, told by DINOv2 of the LQ image."""

    def __init__(self, config: DeftConfig, untrained: bool = False) -> None:
        """untrained: random networks of the released sizes, for which nothing is read."""
        super().__init__()
        self.summary = ViT(518, 14, 384, 12, 6, layer_scale=True) if untrained else read_dino(config.dino_v2)
        judge = ViT(224, 16, 384, 12, 6) if untrained else read_dino(config.dino)
        self.discriminator = ProjectedDiscriminator(judge, self.summary.cls_token.shape[-1])
        self.learned = self.discriminator.heads

    def prepare(self, batch: Batch) -> None:
        """DINOv2's summary of the LQ images."""
        batch.cache["summary"] = condition_of(self.summary, batch.lq)

    def view(self, batch: Batch) -> tuple[Augmentation, list]:
        """Shifts, cutouts and windows, each image's from its own generator."""
        height, width = batch.hq.shape[2:]
        augmentation = Augmentation.draw(batch.generators, height, width)
        return augmentation, draw_windows(batch.generators, height, width, self.discriminator.vit.side)

    def forward(self, x: Tensor, batch: Batch, view: tuple[Augmentation, list]) -> tuple[Tensor, list[Tensor]]:
        """(logits, features) of images (B, 3, H, W) in [-1, 1]."""
        return self.discriminator(x, batch.cache["summary"], *view)


ADVERSARIES = {"patchgan": PatchAdversary, "dino": DinoAdversary}
"""By the config word `deft.discriminator`."""
