"""From a low-quality image to the network's input, and from its output to the restored image: sizes, padding, colours.

`pad`       ours: bicubic to the result's size, padded by reflection to a size the networks take, cropped back. A result
            whose short side is below `short_side` is made that large for the networks, then brought to its size.
`ccsr`      CCSR v2's test script: short side raised to 512, sides floored to multiples of 8 (slightly distorted),
            colours transferred in 8 bits, bicubic to the final size.
`ccsr_v1`   CCSR v1's: as ConsisSR's, but instead of padding a Lanczos resize down to multiples of 64.
`consissr`  ConsisSR's: upscaled, short side raised to 512, zeros up to multiples of 64, Lanczos to the final size.

`formats.output_size` is the result's size under every rule: the releases' at whole scales (at others those of ConsisSR
and CCSR v1 round up). The released rules work on 8-bit images as the authors' code does, with Pillow. All tensors are
(B,3,H,W) in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from PIL import Image
from torch import Tensor

from consissr.images import color
from consissr.images.device import to_device
from consissr.images.formats import output_size
from consissr.images.resize import crop, reflected, resize, resized_rows
from consissr.images.rgb8 import to_pil, to_tensor
from consissr.images.rows import Make, Rows, rows_of, strips

RELEASED_SHORT_SIDE = 512
"""What both releases raise the short side to, in pixels."""


@dataclass
class Prepared:
    """One image on its way. Its enlarged form is made anew where it is needed: a large one need not stay in memory."""

    rows: Make
    """Makes some rows of the network's input."""
    shape: tuple[int, int]
    """Height and width of the network's input."""
    size: tuple[int, int]
    """Height and width of the result."""
    upscaled: tuple[int, int]
    """Height and width of the part of the input that is not padding."""
    device: torch.device
    """Where its pixels are."""
    margin: int = 0
    """Rows and columns of padding before that part."""

    @property
    def x(self) -> Tensor:
        """The network's input (1,3,H,W)."""
        return self.rows(0, self.shape[0])

    @classmethod
    def of(cls, x: Tensor, size: tuple[int, int], upscaled: tuple[int, int]) -> Prepared:
        """An input (1,3,H,W) that is at hand."""
        return cls(lambda top, bottom: x[:, :, top:bottom], tuple(x.shape[2:]), size, upscaled, x.device)


def prepare(
    image: Tensor | Rows,
    scale: float,
    rule: str,
    multiple: int,
    longest: int | None = None,
    short_side: int = 0,
    margin: int = 0,
) -> Prepared:
    """The network's input for one image (1,3,H,W) under a size rule.

    `multiple`: what the networks' input must be a multiple of (pad only). `longest`, where given, sets the result's
    longest side instead of `scale`. `short_side`: what the short side is raised to; 0: `pad` leaves it, the released
    rules raise it to RELEASED_SHORT_SIDE. `margin`: pixels that the networks see around the image (pad only).
    """
    height, width = image.shape[2:]
    size = output_size(height, width, scale, longest)
    short_side = least_side(rule, short_side)
    if longest is not None:
        scale = longest / max(height, width)
    if rule == "pad":
        raised = at_least(size, short_side)
        padded = tuple(-(-(side + 2 * margin) // multiple) * multiple for side in raised)
        down, across = (reflected(*sides, margin) for sides in zip(raised, padded, strict=True))

        def rows(top: int, bottom: int) -> Tensor:
            if padded == raised:
                return resized_rows(image, raised, top, bottom)
            which = down[top:bottom]
            first, last = int(which.min()), int(which.max()) + 1
            part = resized_rows(image, raised, first, last)
            return part[:, :, to_device(which - first, part.device)][..., to_device(across, part.device)]

        return Prepared(rows, padded, size, raised, image.device, margin)
    lq = to_pil(image.whole() if isinstance(image, Rows) else image)
    if rule == "ccsr":
        x = to_tensor(ccsr_input(lq, scale, short_side))
        return Prepared.of(x, size, tuple(x.shape[2:]))
    lq = lq.resize(size[::-1], Image.Resampling.BICUBIC)
    raised = raise_short_side(lq, short_side)
    if rule == "ccsr_v1":
        x = to_tensor(raised.resize((raised.width // 64 * 64, raised.height // 64 * 64), Image.Resampling.LANCZOS))
        return Prepared.of(x, size, tuple(x.shape[2:]))
    x = to_tensor(raised)
    bottom, right = -x.shape[2] % 64, -x.shape[3] % 64
    x = torch.nn.functional.pad(x, (0, right, 0, bottom), value=-1.0)
    return Prepared.of(x, size, (raised.height, raised.width))


def finish(prepared: Prepared, y: Tensor, rule: str, color_fix: str, strength: float = 1.0) -> Tensor:
    """The restored image (1,3,*prepared.size) in [-1, 1] from the decoder's output y (1,3,H,W), not clamped.

    strength: of the colour transfer, 0 to 1.
    """
    return finished(prepared, y, rule, color_fix, strength).whole()


def finished(prepared: Prepared, y: Tensor, rule: str, color_fix: str, strength: float) -> Rows:
    """The same, made when it is read: beside y, a large result is never in memory as a whole."""
    color_fix = color_fix if strength else "none"
    if rule == "pad":
        (height, width), margin = prepared.upscaled, prepared.margin
        across = slice(margin, margin + width)

        def content(top: int, bottom: int) -> Tensor:
            return (y[:, :, margin + top : margin + bottom].float() / 2).add_(0.5)[..., across]

        def style(top: int, bottom: int) -> Tensor:
            return prepared.rows(margin + top, margin + bottom)[..., across]

        coloured = transferred(content, style, height, y.device, color_fix, strength)
        image = Rows(lambda *rows: coloured(*rows).mul_(2).sub_(1).clamp_(-1, 1), (1, 3, height, width), y.device)
        return image if prepared.size == prepared.upscaled else Rows.of(resize(image.whole(), prepared.size))
    y = y.float() / 2 + 0.5
    if rule == "ccsr":
        y = y.clamp_(0, 1).mul_(255).round_().div_(255)
    y = crop(truncated(transfer(y, prepared.rows, color_fix, strength)), prepared.upscaled)
    kind = Image.Resampling.BICUBIC if rule == "ccsr" else Image.Resampling.LANCZOS
    return Rows.of(to_tensor(to_pil(y).resize(prepared.size[::-1], kind)))


def least_side(rule: str, short_side: int) -> int:
    """What short sides are raised to under a size rule: the released ones know no 0, which turns it off under `pad`."""
    return short_side or (0 if rule == "pad" else RELEASED_SHORT_SIDE)


def at_least(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """A size (H, W), or its nearest enlargement of the same shape whose short side is `short_side`."""
    short = min(size)
    return size if short >= short_side else tuple(round(side * short_side / short) for side in size)


def transfer(content: Tensor, style: Make, color_fix: str, strength: float = 1.0) -> Tensor:
    """`content` (1,3,H,W) in [0, 1] in the colours of `style` in [-1, 1], by 'adain', 'wavelet' or 'none'.

    strength: 1 takes them whole, 0 not at all.
    """
    height, device = content.shape[2], content.device
    rows = transferred(lambda *rows: rows_of(content, *rows).clone(), style, height, device, color_fix, strength)
    return torch.cat([rows(*strip) for strip in strips(height, device)], dim=2)


def transferred(
    content: Make, style: Make, height: int, device: torch.device, color_fix: str, strength: float = 1.0
) -> Make:
    """The same of images of `height` rows, of which some are made at a time on `device`."""
    if color_fix == "adain":
        own, (mean, variance) = (
            color.moments(rows(*strip) for strip in strips(height, device)) for rows in (content, style)
        )
        wanted = mean / 2 + 0.5, variance / 4
        return lambda *rows: color.adain_(content(*rows), own, wanted, strength)
    if color_fix == "wavelet":
        return color.wavelet_rows(content, lambda *rows: style(*rows) / 2 + 0.5, height, strength)
    return content


def truncated(y: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], unclamped; cut down to 8-bit levels as the releases' cast to uint8 does, not rounded."""
    return (y * 255).floor() / 127.5 - 1


def ccsr_input(lq: Image.Image, upscale: float, short_side: int = RELEASED_SHORT_SIDE) -> Image.Image:
    """CCSR v2's network input for an RGB image: see the module's text."""
    least = short_side // upscale
    if min(lq.size) < least:
        scale = least / min(lq.size)
        lq = lq.resize((round(scale * lq.width), round(scale * lq.height)))
    lq = lq.resize((round(lq.width * upscale), round(lq.height * upscale)))
    return lq.resize((lq.width // 8 * 8, lq.height // 8 * 8))


def raise_short_side(image: Image.Image, least: int) -> Image.Image:
    """Bicubic enlargement, sides rounded up, to a short side of `least`; larger images stay as they are."""
    short = min(image.size)
    if short >= least:
        return image
    scale = least / short
    return image.resize((ceil(image.width * scale), ceil(image.height * scale)), Image.Resampling.BICUBIC)
