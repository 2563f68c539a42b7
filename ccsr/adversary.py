"""DeFT's adversaries under one interface: the discriminator, its random views, what it learns from.

`view(batch)` draws how images are seen (both losses draw one for each image that they judge); calling gives (logits,
features) of images under a view.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from ccsr.discriminator import Augmentation, ProjectedDiscriminator, ViT, condition_of, draw_windows, read_dino
from consissr.config.deft import DeftConfig
from consissr.training.stage import Batch


class PatchGAN(nn.Module):
    """A small convolutional discriminator with one logit per image patch (LDM's; the paper names no other).

    Isola et al.'s (2017) with three stride-2 convolutions, and a last layer of 8 times the first's `width`, as in LDM's
    VAE training. Three things differ from it: group instead of batch normalisation, so that an image's logits do not
    depend on the batch it is in, biases in every convolution, and PyTorch's initial weights.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 8 * width]
        strides = [2, 2, 2, 1]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=stride, padding=1)
            for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.norms = nn.ModuleList([nn.Identity(), *(nn.GroupNorm(8, after) for after in widths[2:])])
        self.head = nn.Conv2d(widths[-1], 1, 4, padding=1)

    @property
    def learned(self) -> nn.Module:
        """What is trained: all of it."""
        return self

    def prepare(self, batch: Batch) -> None:
        """Needs nothing of a batch."""

    def view(self, batch: Batch) -> None:
        """Images are seen as they are."""

    def forward(self, x: Tensor, batch: Batch | None = None, view: None = None) -> tuple[Tensor, list[Tensor]]:
        """Images (B, 3, H, W) in [-1, 1] -> logits (B, 1, about H/8, W/8) and the features of every layer."""
        features = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
            features.append(x)
        return self.head(x).float(), features


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


def build_adversary(config: DeftConfig, untrained: bool = False) -> PatchGAN | DinoAdversary:
    """The one that `deft.discriminator` names. untrained: nothing is read (PatchGAN always starts so)."""
    if config.discriminator == "patchgan":
        return PatchGAN(config.discriminator_width)
    return DinoAdversary(config, untrained)
