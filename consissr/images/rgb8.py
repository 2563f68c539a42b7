"""8-bit RGB pictures: what training reads, and what the releases' size rules compute in."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from consissr.errors import UserError
from consissr.images import codec, formats

DAMAGE = (*formats.DAMAGE, Image.DecompressionBombError)
"""What Pillow raises for damaged data and for sizes that are meant to harm."""


def decode(data: bytes, least: int = 0) -> np.ndarray:
    """An encoded image as uint8 RGB [H,W,3], upright; transparency is dropped, 16 bits become 8.

    least: if not 0, a JPEG whose shorter side stays at least this many pixels is decoded at a half, a quarter or an
    eighth of its size, as its blocks allow, in a fraction of the time. Raises UserError saying why where the data is no
    whole image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if least and image.format == "JPEG":
                image.draft(None, (least, least))
            if image.mode in ("RGB", "L"):
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            return codec.to_uint8(codec.from_pil(image).pixels).permute(1, 2, 0).numpy()
    except UnidentifiedImageError as error:
        raise UserError("not an image, or of an unknown format") from error
    except DAMAGE as error:
        raise UserError(f"{type(error).__name__}: {error}") from error


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The centre [size,size,3] of `image` [H,W,3] uint8 after its short side was brought to `size`.

    Box-filtered halvings while the short side is at least twice `size`, then bicubic (guided-diffusion's rule, which
    ConsisSR's release follows).
    """
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    top, left = (picture.height - size) // 2, (picture.width - size) // 2
    return np.asarray(picture)[top : top + size, left : left + size]


def resized_window(image: np.ndarray, left: int, top: int, side: int, size: int) -> np.ndarray:
    """The square of `side` pixels at (left, top) of `image` [H,W,3] uint8, brought to [size,size,3] (bicubic)."""
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(image).crop(box).resize((size, size), Image.Resampling.BICUBIC))


def to_tensor(image: np.ndarray | Image.Image) -> Tensor:
    """An 8-bit picture, uint8 RGB [H,W,3] or any of Pillow's, as (1,3,H,W) float32 in [-1, 1]."""
    pixels = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return torch.from_numpy(planes)[None].float().div_(127.5).sub_(1)


def to_pil(x: Tensor) -> Image.Image:
    """(1,3,H,W) in [-1, 1] -> an 8-bit RGB image, rounded."""
    return Image.fromarray(codec.to_uint8(x[0]).permute(1, 2, 0).cpu().numpy())
