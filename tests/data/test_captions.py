"""Captions say what an image shows: checked on images whose colours, light, texture and direction are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from consissr.nano.captions import WORDS, caption


def plain(*rgb: float) -> Tensor:
    """A 64x64 image of one colour, given in [0, 1]."""
    return torch.tensor(rgb).view(3, 1, 1).expand(3, 64, 64) * 2 - 1


def waves(degrees: float, period: float, amplitude: float) -> Tensor:
    """A gray 96x96 image of sinusoidal lines at an angle to the horizontal, `amplitude` about 0 in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    angle = math.radians(degrees)
    phase = (x * math.sin(angle) + y * math.cos(angle)) * 2 * math.pi / period
    return (amplitude * phase.sin()).expand(3, 96, 96)


@pytest.mark.parametrize(
    ("rgb", "word"),
    [
        ((0.9, 0.1, 0.1), "red"),
        ((0.95, 0.1, 0.2), "red"),
        ((0.95, 0.55, 0.1), "orange"),
        ((0.9, 0.85, 0.1), "yellow"),
        ((0.1, 0.7, 0.2), "green"),
        ((0.1, 0.3, 0.9), "blue"),
        ((0.6, 0.1, 0.9), "purple"),
        ((0.4, 0.25, 0.1), "brown"),
        ((0.5, 0.5, 0.5), "gray"),
        ((0.95, 0.95, 0.93), "white"),
        ((0.05, 0.05, 0.1), "black"),
    ],
)
def test_one_colour_is_named(rgb: tuple[float, ...], word: str) -> None:
    assert caption(plain(*rgb)).split(", ")[1] == word


def test_two_colours_are_named_by_their_share() -> None:
    image = torch.cat([plain(0.1, 0.3, 0.9), plain(0.1, 0.7, 0.2)[:, :32]], dim=1)
    assert caption(image).split(", ")[1] == "blue and green"
    image = torch.cat([plain(0.1, 0.3, 0.9), plain(0.1, 0.7, 0.2)[:, :8]], dim=1)
    assert caption(image).split(", ")[1] == "blue"


def test_light_and_colourfulness() -> None:
    assert [caption(plain(v, v, v)).split()[0] for v in (0.2, 0.45, 0.8)] == ["dark", "dim", "bright"]
    assert caption(plain(0.2, 0.3, 0.8)).split()[1] == "colorful"
    assert caption(plain(0.5, 0.52, 0.48)).split()[1] == "muted"


@pytest.mark.parametrize(
    ("degrees", "word"), [(0, "horizontal"), (10, "horizontal"), (90, "vertical"), (45, "diagonal"), (135, "diagonal")]
)
def test_lines_have_a_direction(degrees: float, word: str) -> None:
    assert caption(waves(degrees, 12, 0.3)).split(", ")[-1] == word


def test_noise_has_no_direction() -> None:
    noise = torch.randn(3, 96, 96, generator=torch.Generator().manual_seed(0)).mul(0.12)
    assert caption(noise).endswith("fine texture, no direction")


def test_texture_and_contrast() -> None:
    def words(image: Tensor) -> str:
        return ", ".join(caption(image).split(", ")[2:4])

    assert words(plain(0.5, 0.5, 0.5)) == "low contrast, smooth"
    assert words(waves(0, 6, 0.1)) == "low contrast, fine texture"
    assert words(waves(0, 20, 0.45)) == "soft contrast, coarse texture"
    assert words(waves(0, 8, 0.9)) == "high contrast, strong edges"


def test_captions_are_made_of_the_listed_words() -> None:
    draws = torch.Generator().manual_seed(1)
    seen = set()
    for size in (16, 37, 128):
        for _ in range(20):
            image = F.interpolate(torch.rand(1, 3, 5, 5, generator=draws) * 2 - 1, size=(size, size))[0]
            seen |= set(caption(image).replace(",", " ,").split())
            assert caption(image) == caption(image.clone())
    assert seen <= set(WORDS) and len(seen) > 15
    assert len(set(WORDS)) == len(WORDS)
