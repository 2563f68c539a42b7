"""THE pixel contract: image files and PIL images on one side, float tensors on the other.

On disk: 8- or 16-bit samples in any mode. Inside: float32 RGB, NCHW (a single image: CHW), in [-1, 1];
transparency apart, in [0, 1]. Nothing else in the project converts pixels.

What a round trip keeps: grey stays grey, 16 bits stay 16 bits, transparency is carried beside the colours, the
EXIF rotation is applied to the pixels and its tag dropped, the ICC profile and the descriptive EXIF tags are written
back. Pixel values stay in their own colour space (no conversion to sRGB). Palette and bilevel images come back as
RGB and grey, because a restored image has more colours than a palette. CMYK is restored as RGB (through its profile,
where it has one) and written back as CMYK to JPEG and TIFF, as RGB to other formats; CIE LAB becomes sRGB. What PNG
files say of their colours beside a profile stays in PNG files, dots per inch in PNG, JPEG and TIFF; WebP without loss
stays so. XMP is kept, but where it speaks of a gain map or further pictures. Of several frames the first is read. Not
kept: comments, EXIF in 16-bit colour TIFF, colours under full transparency; 16-bit PPM is read as 8 bits.
"""

from __future__ import annotations

import os
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from consissr.errors import UserError
from consissr.images import formats, metadata
from consissr.images.device import fetched, sent, works_on_pixels
from consissr.images.encoding import Samples, convert_cmyk, encode, pil
from consissr.images.formats import Form
from consissr.images.resize import resize, strips
from consissr.images.transparency import fill_hidden

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's convert("L")


@dataclass
class Photo:
    """An image inside the program, and how it was stored.

    pixels: (3, H, W) float32 in [-1, 1]. alpha: (1, H, W) float32 in [0, 1], or None when opaque.
    """

    pixels: Tensor
    alpha: Tensor | None
    form: Form

    def restored(self, pixels: Tensor) -> Photo:
        """In the same form with other pixels (3, H', W'); transparency is resized along."""
        size = (pixels.shape[1], pixels.shape[2])
        alpha = None if self.alpha is None else resize(self.alpha, size, (0.0, 1.0))
        return replace(self, pixels=pixels, alpha=alpha)


# --- files ---


def read(path: str | Path, device: torch.device | str = "cpu") -> Photo:
    """Read an image file of any mode and depth, turned the way up that its EXIF tag says.

    A `device` that works on pixels gets them at once.

    Raises:
        UserError: not an image, damaged or truncated, unreadable, too large, or of an unsupported mode.
    """
    with formats.opened(path) as image:
        try:
            form = formats.form_of(image)
            deep_colour = form.bits == 16 and not image.mode.startswith("I")
            image.load()  # checks the whole file, and lets PNG find metadata that stands behind the pixels
            samples = _deep_samples(path) if deep_colour else _samples(image, form)
            said = {"exif": metadata.kept_exif(image), "xmp": metadata.kept_xmp(image)}
            file = formats.reachable(path)
            stored = {"chunks": metadata.png_chunks(file), "lossless": metadata.is_lossless_webp(file)}
            form = replace(form, **said, **stored)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        samples = _upright(samples, metadata.orientation(image))
    return _photo(samples, form, device)


def write(path: str | Path, photo: Photo, quality: int = 95) -> None:
    """Write `photo` under `path`, whole or not at all, in the format of the suffix; `quality` is JPEG's and WebP's.

    Raises:
        UserError: NaN or infinite pixels; a format that is not written or cannot hold the image; a full disk;
            metadata that cannot be written.
    """
    write_samples(path, samples_for(path, photo), quality)


def samples_for(path: str | Path, photo: Photo) -> Samples:
    """What the file `path` will hold of `photo`: much smaller, for waiting until it is written.

    Raises:
        UserError: as `write`, about pixels and formats.
    """
    path = Path(path)
    target = formats.WRITABLE.get(path.suffix.lower())
    if target is None:
        raise UserError(f"{path}: '{path.suffix}' is not written; use one of {' '.join(formats.WRITABLE)}")
    if not target.holds(photo.form):
        raise UserError(f"{path}: {target.name} cannot hold transparency or 16 bits; use .png or .tif")
    side = max(photo.pixels.shape[-2:])
    if side > target.longest:
        raise UserError(f"{path}: {side} px is more than {target.name}'s {target.longest}; use .png or .tif")
    extremes = [
        extreme
        for x in (photo.pixels, photo.alpha)
        if x is not None
        for top, bottom in strips(x.shape[-2], x.device)  # of a cropped image all at once would need a copy
        for extreme in x[..., top:bottom, :].aminmax()
    ]
    here = [extreme.to(photo.pixels.device) for extreme in extremes]
    if not torch.stack(here).isfinite().all():  # NaN is an extreme, too; no copy is made, and a GPU is asked once
        raise UserError(f"{path}: not written, the result has NaN or infinite pixels; try --precision fp32")

    form = photo.form if target.cmyk or not photo.form.cmyk else replace(photo.form, cmyk=False, profile=None)
    return _quantised(photo, form)


def write_samples(path: str | Path, samples: Samples, quality: int = 95) -> None:
    """Write `samples` under `path`, whole or not at all, in the format of the suffix.

    Raises:
        UserError: a full disk, a name that the file system refuses, metadata that cannot be written.
    """
    path = Path(formats.reachable(path))
    samples.arrived()
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.part")  # short, whatever the name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            encode(file, samples, formats.WRITABLE[path.suffix.lower()], quality)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    except (ValueError, SyntaxError, struct.error) as error:  # Pillow, about profiles and EXIF
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        with suppress(OSError):  # what could not be made cannot be removed
            temporary.unlink(missing_ok=True)


def from_pil(image: Image.Image) -> Photo:
    """A PIL image of any mode, turned the way up that its EXIF tag says.

    Raises:
        UserError: an unsupported mode.
    """
    form = formats.form_of(image)
    if not image.mode.startswith("I"):
        form = replace(form, bits=8)  # a loaded PIL image holds 16 bits only in grey
    image.load()
    return _photo(_upright(_samples(image, form), metadata.orientation(image)), form)


def to_pil(photo: Photo) -> Image.Image:
    """A PIL image in the mode of `photo.form`: L, LA, RGB, RGBA, CMYK or I;16 (16-bit colour gets 8 bits)."""
    form = photo.form
    if form.bits == 16 and (not form.grey or form.alpha):
        form = replace(form, bits=8)
    return pil(_quantised(replace(photo, form=form), form))


# --- samples ---


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0..255, rounded to the nearest and clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _photo(samples: np.ndarray, form: Form, device: torch.device | str = "cpu") -> Photo:
    """uint8 or uint16 (H, W, 1..4), alpha last, to a Photo. A few rows at a time, as `_quantised`."""
    height, width, channels = samples.shape
    if works_on_pixels(device):
        values = sent(samples.transpose(2, 0, 1).copy(), device)
    else:
        values = torch.empty(channels, height, width)
        for top, bottom in strips(height):
            values[:, top:bottom] = torch.from_numpy(samples[top:bottom].transpose(2, 0, 1).astype(np.float32))
    values.div_(2**form.bits - 1)
    colours, alpha = (values[:-1], values[-1:].clone()) if form.alpha else (values, None)
    if alpha is not None:
        colours = fill_hidden(colours, alpha)
    return Photo(colours.mul_(2).sub_(1).expand(3, -1, -1).contiguous(), alpha, form)


def _samples(image: Image.Image, form: Form) -> np.ndarray:
    """A loaded PIL image as (H, W, C), uint16 for 16-bit grey and uint8 for all else."""
    if image.mode.startswith("I"):
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise UserError("32-bit integer pixels beyond 0..65535 are not supported; save as 16 bits first")
        return samples.astype(np.uint16)[..., None]
    if form.cmyk:
        return np.asarray(convert_cmyk(image, form.profile, to="RGB"))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return np.asarray(ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))
    mode = ("L" if form.grey else "RGB") + ("A" if form.alpha else "")
    return np.asarray(image.convert(mode)).reshape(image.height, image.width, -1)


def _deep_samples(path: str | Path) -> np.ndarray:
    """16-bit colour samples, (H, W, C) uint16.

    Pillow knows no 16-bit colour: it unpacks the high byte of each sample. Told that the samples stand in the
    other byte order it unpacks the low byte, so two passes give both, for every compression that it reads.
    """
    planes = []
    for swapped in (False, True):
        with Image.open(formats.reachable(path)) as image:
            if image.tile[0].args == "LA;16B":  # two samples of two bytes, which unpack as four of one
                image.tile = [tile._replace(args="RGBA") for tile in image.tile]
                four = np.asarray(image).astype(np.uint16)
                return four[..., 0::2] << 8 | four[..., 1::2]
            if swapped:
                image.tile = [tile._replace(args=_swapped(tile.args)) for tile in image.tile]
            planes.append(np.asarray(image).astype(np.uint16))
    return planes[0] << 8 | planes[1]


def _swapped(arguments: str | tuple) -> str | tuple:
    """Decoder arguments with the raw mode's byte order ("RGB;16B": big, L: little, N: the machine's) swapped."""
    if isinstance(arguments, tuple):
        return (_swapped(arguments[0]), *arguments[1:])
    return arguments[:-1] + ("L" if arguments.endswith("B") else "B")


def _quantised(photo: Photo, form: Form) -> Samples:
    """Pixels rounded to the nearest; grey as luma. `form`: what the file will say of them.

    A few rows at a time, because large images in several float copies are what memory would run out for.
    """
    if works_on_pixels(photo.pixels.device):
        values, arrived = fetched(levels(photo, slice(None)))
        return Samples(values, form, arrived)
    height, width = photo.pixels.shape[1:]
    channels, kind = (1 if form.grey else 3) + form.alpha, np.uint8 if form.bits == 8 else np.uint16
    samples = np.empty((height, width, channels), kind)
    for rows in (slice(*strip) for strip in strips(height)):
        samples[rows] = levels(photo, rows).numpy()
    return Samples(samples, form)


def levels(photo: Photo, rows: slice) -> Tensor:
    """Some rows of a photo (h, W, C), where they are: uint8 or, of 16 bits, int32."""
    form, place = photo.form, photo.pixels.device
    planes = photo.pixels[:, rows].detach().to(place if works_on_pixels(place) else "cpu", torch.float32)
    if form.grey:
        planes = sum(plane * share for plane, share in zip(planes, _LUMA, strict=True))[None]
    planes = planes.clamp(-1, 1).add_(1).div_(2)
    if form.alpha:
        planes = torch.cat([planes, photo.alpha[:, rows].detach().to(planes).clamp(0, 1)])
    whole = planes.mul_(2**form.bits - 1).round_().permute(1, 2, 0)
    return whole.to(torch.uint8 if form.bits == 8 else torch.int32).contiguous()


def _upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, C) the way up that the EXIF orientation 1..8 says."""
    turns = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a),
    }
    return turns[orientation](samples) if orientation in turns else samples
