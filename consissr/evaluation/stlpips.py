"""ST-LPIPS, a learned distance between two images (Ghildyal and Liu, "Shift-tolerant perceptual similarity metric",
ECCV 2022): LPIPS on an AlexNet whose strided layers blur before they skip pixels. Lower is closer.

It is not the LPIPS of tables, whose AlexNet was trained on other data without blurs. Its weights come with the package
stlpips-pytorch (BSD-2), so nothing is downloaded. The package is not imported: its modules ask for IPython and
torchsummary, and some carry a non-commercial licence. The network below is written from the papers.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

from consissr.errors import UserError

FILE = "weights/vST0.0/alex_shift_tolerant.pth"
DIGEST = "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"
"""SHA-256 of the file that the package's version 0.0.2 holds."""
SMALLEST = 16
"""Pixels per side below which a reflecting border is wider than the features."""


@lru_cache
def weights_file() -> Path | None:
    """The file of weights in the installed package; None without it. UserError if it is not the known one."""
    package = find_spec("stlpips_pytorch")  # finds the folder without importing the package
    path = Path(package.origin).parent / FILE if package and package.origin else None
    if path is None or not path.is_file():
        return None
    if hashlib.sha256(path.read_bytes()).hexdigest() != DIGEST:
        raise UserError(f"{path} is not the file of stlpips-pytorch 0.0.2: pip install stlpips-pytorch==0.0.2")
    return path


class ShiftTolerantLpips:
    """A callable on two images (1, 3, H, W) in [0, 1]."""

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        state = torch.load(weights, map_location=device, weights_only=True)
        self.shift, self.scale = state["scaling_layer.shift"], state["scaling_layer.scale"]
        self.convolutions = [
            (state[f"net.{name}.weight"], state[f"net.{name}.bias"])
            for name in ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")
        ]
        self.blurs = [state[f"net.{name}.filt"] for name in ("slice1.1", "slice2.4", "slice3.8")]
        self.linear = [state[f"lin{i}.model.1.weight"] for i in range(len(self.convolutions))]

        self.hr, self.hr_features = None, []

    @torch.inference_mode()
    def __call__(self, sr: torch.Tensor, hr: torch.Tensor) -> float:
        if min(sr.shape[-2:]) < SMALLEST:
            raise UserError(f"ST-LPIPS needs images of at least {SMALLEST} pixels, these have {tuple(sr.shape[-2:])}")
        if self.hr is None or not torch.equal(self.hr, hr):  # results of one image follow one another
            self.hr, self.hr_features = hr, [unit_length(x) for x in self.features(hr)]
        distance = 0.0
        for features, reference, weights in zip(self.features(sr), self.hr_features, self.linear, strict=True):
            # (Eq. 1, Zhang et al. 2018): unit length over channels, weighted squared differences, mean over places
            difference = (unit_length(features) - reference).square()
            distance += F.conv2d(difference, weights).mean().item()
        return distance

    def features(self, image: torch.Tensor) -> Iterator[torch.Tensor]:
        """Outputs of AlexNet's five rectified convolutions: (1, 3, H, W) in [0, 1] -> five (1, C, H', W')."""
        x = (2 * image.to(self.shift.device, torch.float32) - 1 - self.shift) / self.scale
        for layer, (weight, bias) in enumerate(self.convolutions):
            if layer in (1, 2):
                x = self._blur(F.max_pool2d(x, 3, stride=1), layer)
            x = F.conv2d(x, weight, bias, padding=(2, 2, 1, 1, 1)[layer])
            x = F.relu(self._blur(x, 0) if layer == 0 else x)
            yield x

    def _blur(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Every second pixel of the blurred features, borders mirrored."""
        return F.conv2d(F.pad(x, [2] * 4, mode="reflect"), self.blurs[index], stride=2, groups=x.shape[1])


def unit_length(features: torch.Tensor) -> torch.Tensor:
    """Features (1, C, H, W) whose channels have length 1 at every place."""
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
