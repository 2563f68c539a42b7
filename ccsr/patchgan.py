"""PatchGAN: a small convolutional discriminator with one logit per image patch ("the same as that of VAE", CCSR)."""

from torch import Tensor, nn
from torch.nn import functional as F


class PatchGAN(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> logits (B, 1, about H/8, W/8) and the features of every layer.

    Isola et al.'s (2017) with three stride-2 convolutions, and a last layer of 8 times the first's `width`, as in LDM's
    VAE training. Two things differ from it: group instead of batch normalisation, so that an image's
    logits do not depend on the batch it is in, and PyTorch's initial weights.
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

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(logits, features)."""
        features = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
            features.append(x)
        return self.head(x).float(), features
