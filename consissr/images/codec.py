"""THE pixel contract: image files and PIL images on one side, float tensors on the other.

On disk: 8- or 16-bit samples in any mode. Inside: float32 RGB, NCHW (a single image: CHW), in [-1, 1];
transparency apart, in [0, 1]. Nothing else in the project converts pixels.

What a round trip keeps: grey stays grey, 16 bits stay 16 bits, transparency is carried beside the colours, the
EXIF rotation is applied to the pixels and its tag dropped, the ICC profile and the descriptive EXIF tags are written
back. Pixel values stay in their own colour space (no conversion to sRGB). Palette and bilevel images come back as
RGB and grey, because a restored image has more colours than a palette. CMYK is restored as RGB (through its profile,
where it has one) and written back as CMYK to JPEG and TIFF, as RGB to other formats. Of several frames the first is
read. Not kept: XMP, comments, EXIF in 16-bit colour TIFF; 16-bit PPM is read as 8 bits.
"""

from __future__ import annotations

import io
import os
import struct
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from consissr.errors import UserError
from consissr.images import formats, png16
from consissr.images.formats import Form

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's convert("L")
_STRIP = 256  # rows that are resized at once
_EXIF_LIMIT_JPEG = 65533  # bytes of one JPEG segment


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


def read(path: str | Path) -> Photo:
    """Read an image file of any mode and depth, turned the way up that its EXIF tag says.

    Raises:
        UserError: not an image, damaged or truncated, unreadable, too large, or of an unsupported mode.
    """
    with formats.opened(path) as image:
        try:
            form = formats.form_of(image)
            deep_colour = form.bits == 16 and not image.mode.startswith("I")
            image.load()  # checks the whole file, and lets PNG find metadata that stands behind the pixels
            samples = _deep_samples(path) if deep_colour else _samples(image, form)
            form = replace(form, exif=formats.kept_exif(image))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        samples = _upright(samples, formats.orientation(image))
    return _photo(samples, form)


def write(path: str | Path, photo: Photo, quality: int = 95) -> None:
    """Write `photo` under `path`, whole or not at all, in the format of the suffix; `quality` is JPEG's and WebP's.

    Raises:
        UserError: NaN or infinite pixels; a format that is not written or cannot hold the image; a full disk;
            metadata that cannot be written.
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
    if not all(bool(x.isfinite().all()) for x in (photo.pixels, photo.alpha) if x is not None):
        raise UserError(f"{path}: not written, the result has NaN or infinite pixels; try --precision fp32")

    form = photo.form if target.cmyk or not photo.form.cmyk else replace(photo.form, cmyk=False, profile=None)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            _encode(file, replace(photo, form=form), target, quality)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    except (ValueError, SyntaxError, struct.error) as error:  # Pillow, about profiles and EXIF
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
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
    return _photo(_upright(_samples(image, form), formats.orientation(image)), form)


def to_pil(photo: Photo) -> Image.Image:
    """A PIL image in the mode of `photo.form`: L, LA, RGB, RGBA, CMYK or I;16 (16-bit colour gets 8 bits)."""
    form = photo.form
    if form.bits == 16 and (not form.grey or form.alpha):
        form = replace(form, bits=8)
    samples = _quantised(replace(photo, form=form))
    image = Image.fromarray(samples[..., 0] if samples.shape[-1] == 1 else samples)
    if form.cmyk:
        image = _convert_cmyk(image, form.profile, to="CMYK")
    if form.profile:
        image.info["icc_profile"] = form.profile
    return image


# --- geometry ---


def resize(x: Tensor, size: tuple[int, int], limits: tuple[float, float] | None = (-1.0, 1.0)) -> Tensor:
    """Bicubic resize as Pillow does it (antialiased when shrinking), in float32: (..., H, W) -> (..., *size).

    The cubic overshoots at edges; the result is clamped to `limits` after the horizontal and after the vertical pass,
    as Pillow does on 8-bit images (so the two differ by rounding only); None does not clamp. Computed on the CPU, one
    channel after the other, so that a result depends neither on the device nor on the batch.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    planes = x.detach().to("cpu", torch.float32).reshape(-1, *x.shape[-2:])
    result = torch.empty(len(planes), *size)
    for plane, resized in zip(planes, result, strict=True):
        wide = _bicubic(plane, (size[1], x.shape[-2]), (0, 0, x.shape[-1], x.shape[-2]), limits)
        for top in range(0, size[0], _STRIP):  # Pillow needs several times the memory of what it makes
            bottom = min(top + _STRIP, size[0])
            rows = (0, top * x.shape[-2] / size[0], size[1], bottom * x.shape[-2] / size[0])
            resized[top:bottom] = _bicubic(wide, (size[1], bottom - top), rows, limits)
    return result.reshape(*x.shape[:-2], *size).to(x)


def _bicubic(
    plane: Tensor, shape: tuple[int, int], box: tuple[float, ...], limits: tuple[float, float] | None
) -> Tensor:
    """The part `box` (left, top, right, bottom) of a plane (H, W), resized to `shape` (width, height) and clamped."""
    image = Image.fromarray(plane.numpy()).resize(shape, Image.Resampling.BICUBIC, box=box)
    resized = torch.from_numpy(np.array(image))
    return resized if limits is None else resized.clamp_(*limits)


def pad_to_multiple(x: Tensor, multiple: int, minimum: int = 1) -> Tensor:
    """Pad (..., H, W) at the bottom and right to multiples of `multiple`, at least `minimum`, by reflection.

    Works for any size: an axis shorter than its padding is reflected again and again, an axis of 1 is repeated.
    """
    for axis in (-2, -1):
        size = x.shape[axis]
        padded = -(-max(size, minimum) // multiple) * multiple
        if padded != size:
            period = max(2 * (size - 1), 1)
            position = torch.arange(padded, device=x.device) % period
            x = x.index_select(axis, torch.minimum(position, period - position) if size > 1 else position * 0)
    return x


def crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The top left (H, W) of (..., H', W'): undoes `pad_to_multiple`."""
    return x[..., : size[0], : size[1]]


# --- samples ---


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0..255, rounded to the nearest and clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _photo(samples: np.ndarray, form: Form) -> Photo:
    """uint8 or uint16 (H, W, 1..4), alpha last, to a Photo."""
    planes = torch.from_numpy(samples.transpose(2, 0, 1).copy())
    values = planes.to(torch.float32) / (2**form.bits - 1)
    colours, alpha = (values[:-1], values[-1:]) if form.alpha else (values, None)
    return Photo((colours * 2 - 1).expand(3, -1, -1).contiguous(), alpha, form)


def _samples(image: Image.Image, form: Form) -> np.ndarray:
    """A loaded PIL image as (H, W, C), uint16 for 16-bit grey and uint8 for all else."""
    if image.mode.startswith("I"):
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise UserError("32-bit integer pixels beyond 0..65535 are not supported; save as 16 bits first")
        return samples.astype(np.uint16)[..., None]
    if form.cmyk:
        return np.asarray(_convert_cmyk(image, form.profile, to="RGB"))
    mode = ("L" if form.grey else "RGB") + ("A" if form.alpha else "")
    return np.asarray(image.convert(mode)).reshape(image.height, image.width, -1)


def _deep_samples(path: str | Path) -> np.ndarray:
    """16-bit colour samples, (H, W, C) uint16.

    Pillow knows no 16-bit colour: it unpacks the high byte of each sample. Told that the samples stand in the
    other byte order it unpacks the low byte, so two passes give both, for every compression that it reads.
    """
    planes = []
    for swapped in (False, True):
        with Image.open(path) as image:
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


def _quantised(photo: Photo) -> np.ndarray:
    """Photo -> (H, W, C) uint8 or uint16, rounded to the nearest; grey as luma; alpha last.

    Channel by channel, because large images in several float copies are what memory would run out for.
    """
    pixels = photo.pixels.detach().to("cpu", torch.float32)
    if photo.form.grey:
        pixels = sum(plane * share for plane, share in zip(pixels, _LUMA, strict=True))[None]
    top = 2**photo.form.bits - 1
    kind = np.uint8 if photo.form.bits == 8 else np.uint16
    samples = np.empty((*pixels.shape[1:], len(pixels) + photo.form.alpha), kind)
    for i, plane in enumerate(pixels):
        samples[..., i] = plane.clamp(-1, 1).add_(1).div_(2).mul_(top).round_().numpy()
    if photo.form.alpha:
        alpha = photo.alpha[0].detach().to("cpu", torch.float32)
        samples[..., -1] = alpha.clamp(0, 1).mul_(top).round_().numpy()
    return samples


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


def _convert_cmyk(image: Image.Image, profile: bytes | None, to: str) -> Image.Image:
    """Between CMYK and sRGB, through the CMYK profile where one is usable, else by Pillow's plain formula."""
    if profile:
        try:
            cmyk, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            source, target = (cmyk, srgb) if to == "RGB" else (srgb, cmyk)
            return ImageCms.profileToProfile(image, source, target, outputMode=to)
        except (ImageCms.PyCMSError, OSError):
            pass  # a damaged profile, or one for other colours: the plain formula is what viewers use then
    return image.convert(to)


# --- encoding ---


def _encode(file: io.BufferedWriter, photo: Photo, target: formats.Format, quality: int) -> None:
    form = photo.form
    if form.bits == 16 and (not form.grey or form.alpha):
        if target.name == "TIFF":
            _write_deep_tiff(file, _quantised(photo), form)
        else:
            file.write(png16.encode(_quantised(photo), form.profile, form.exif))
        return
    options = {
        "JPEG": {"quality": quality, "subsampling": 0},
        "WEBP": {"quality": quality},
        "PNG": {"compress_level": 4},
        "TIFF": {} if form.exif else {"compression": "tiff_deflate"},  # Pillow's libtiff cannot nest EXIF blocks
    }.get(target.name, {})
    if form.profile:
        options["icc_profile"] = form.profile
    if form.exif and target.exif and not (target.name == "JPEG" and len(form.exif) > _EXIF_LIMIT_JPEG):
        options["exif"] = form.exif
    to_pil(photo).save(file, format=target.name, **options)


def _write_deep_tiff(file: io.BufferedWriter, samples: np.ndarray, form: Form) -> None:
    import tifffile

    tifffile.imwrite(
        file,
        samples,
        photometric="minisblack" if form.grey else "rgb",
        planarconfig="contig",
        extrasamples=["unassalpha"] if form.alpha else None,
        compression="zlib",
        iccprofile=form.profile,
        metadata=None,
    )
