"""THE pixel contract: image files and PIL images on one side, float tensors on the other.

On disk: 8- or 16-bit samples in any mode. Inside: float32 RGB, NCHW (a single image: CHW), in [-1, 1];
transparency apart, in [0, 1]. Nothing else in the project converts pixels.

What a round trip keeps says the table in README; pixel values stay in their own colour space.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from consissr.config.machine import whole
from consissr.errors import UserError
from consissr.images import formats, metadata
from consissr.images.color_tags import colour_chunks
from consissr.images.device import fetched, sent, works_on_pixels
from consissr.images.encoding import Samples, convert_cmyk, encode, pil
from consissr.images.formats import Form
from consissr.images.resize import resize
from consissr.images.rows import Rows, rows_of, strips
from consissr.images.transparency import fill_hidden

log = logging.getLogger(__name__)

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's convert("L")
_PHOTOMETRIC = 262  # a TIFF tag: 0 where white is 0


@dataclass
class Photo:
    """An image inside the program, and how it was stored.

    pixels: (3, H, W) float32 in [-1, 1], or `Rows` of them. alpha: (1, H, W) float32 in [0, 1], or None when opaque.
    """

    pixels: Tensor | Rows
    alpha: Tensor | None
    form: Form

    @property
    def image(self) -> Tensor | Rows:
        """The pixels as (1, 3, H, W)."""
        return self.pixels if isinstance(self.pixels, Rows) else self.pixels[None]

    def restored(self, pixels: Tensor | Rows) -> Photo:
        """In the same form with other pixels (3, H', W'); transparency is resized along."""
        alpha = None if self.alpha is None else resize(self.alpha, tuple(pixels.shape[-2:]), (0.0, 1.0))
        return replace(self, pixels=pixels, alpha=alpha)


def opaque(pixels: Tensor, form: Form) -> Photo:
    """Pixels (3, H, W) in [-1, 1], stored like `form` but without its transparency, if it has any."""
    return Photo(pixels, None, replace(form, alpha=False))


# --- files ---


def read(path: str | Path, device: torch.device | str = "cpu", whole: bool = True) -> Photo:
    """Read an image file of any mode and depth, turned the way up that its EXIF tag says.

    A `device` that works on pixels gets them at once. Without `whole` pixels may be `Rows`, a fourth of the size.

    Raises:
        UserError: not an image, damaged or truncated, unreadable, too large, or of an unsupported mode.
    """
    with formats.opened(path) as image:
        try:
            form = formats.form_of(image)
            deep_colour = form.bits == 16 and not image.mode.startswith("I")
            image.load()  # checks the whole file, and lets PNG find metadata that stands behind the pixels
            samples = _keyed(_deep_samples(path), image, form) if deep_colour else _samples(image, form)
            said = {"exif": metadata.kept_exif(image), "xmp": metadata.kept_xmp(image)}
            file = formats.reachable(path)
            stored = {"chunks": colour_chunks(file), "lossless": metadata.is_lossless_webp(file)}
            form = replace(form, **said, **stored)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        samples = _upright(samples, metadata.orientation(image))
    return _photo(samples, form, device, whole)


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
        raise UserError(f"{path}: {target.name} cannot hold its transparency, 16 bits or colours; use .png")
    side = max(photo.pixels.shape[-2:])
    if side > target.longest:
        raise UserError(f"{path}: {side} px is more than {target.name}'s {target.longest}; use .png or .tif")
    form = photo.form if target.cmyk or not photo.form.cmyk else replace(photo.form, cmyk=False, profile=None)
    if metadata.has_settings(form.exif) and not target.keeps_exif(form):
        log.warning("%s: its format cannot hold how it was restored; use .png, or keep a record with --json", path)
    try:
        return _quantised(replace(photo, form=form))
    except ArithmeticError:
        raise UserError(f"{path}: not written, the result has NaN or infinite pixels; try --precision fp32") from None


def write_samples(path: str | Path, samples: Samples, quality: int = 95) -> None:
    """Write `samples` under `path`, whole or not at all, in the format of the suffix.

    Raises:
        UserError: a full disk, a name that the file system refuses, metadata that cannot be written.
    """
    path = Path(formats.reachable(path))
    samples.arrived()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part, open(part, "wb") as file:
            encode(file, samples, formats.WRITABLE[path.suffix.lower()], quality)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    except (ValueError, SyntaxError, struct.error) as error:  # Pillow, about profiles and EXIF
        raise UserError(f"{path}: cannot be written ({error})") from None


def from_pil(image: Image.Image) -> Photo:
    """A PIL image of any mode, turned the way up that its EXIF tag says.

    Raises:
        UserError: an unsupported mode.
    """
    form = formats.form_of(image)
    if form.bits == 16 and not image.mode.startswith("I"):  # a loaded PIL image holds 16 bits only in grey
        form = replace(form, bits=8, alpha=image.mode == "RGBA")
    if image.format == "TIFF" and metadata.orientation(image) >= 5:
        name, image.filename = image.filename, ""  # as in `formats.opened`: not to be mapped into memory
        image.load()
        image.filename = name
    image.load()
    return _photo(_upright(_samples(image, form), metadata.orientation(image)), form)


def to_pil(photo: Photo) -> Image.Image:
    """A PIL image in the mode of `photo.form`: L, LA, RGB, RGBA, CMYK or I;16 (16-bit colour gets 8 bits)."""
    form = photo.form
    if form.bits == 16 and (not form.grey or form.alpha):
        form = replace(form, bits=8)
    return pil(_quantised(replace(photo, form=form)))


# --- samples ---


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0..255, rounded to the nearest and clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _photo(samples: np.ndarray, form: Form, device: torch.device | str = "cpu", whole: bool = True) -> Photo:
    """uint8 or uint16 (H, W, 1..4), alpha last, to a Photo."""
    top = 2**form.bits - 1
    if works_on_pixels(device) or form.alpha:
        planes = samples.transpose(2, 0, 1)
        values = sent(planes.copy(), device) if works_on_pixels(device) else torch.from_numpy(planes.astype(np.float32))
        values.div_(top)
        colours, alpha = (values[:-1], values[-1:].clone()) if form.alpha else (values, None)
        if alpha is not None:
            colours = fill_hidden(colours, alpha)
        return Photo(colours.mul_(2).sub_(1).expand(3, -1, -1).contiguous(), alpha, form)

    def make(first: int, last: int) -> Tensor:
        values = torch.from_numpy(samples[first:last].transpose(2, 0, 1).astype(np.float32)).div_(top)
        return values.mul_(2).sub_(1).expand(3, -1, -1).contiguous()[None]

    rows = Rows(make, (1, 3, *samples.shape[:2]), torch.device("cpu"))
    return Photo(rows.whole()[0] if whole else rows, None, form)


def _samples(image: Image.Image, form: Form) -> np.ndarray:
    """A loaded PIL image as (H, W, C), uint16 for 16-bit grey and uint8 for all else."""
    if image.mode.startswith("I"):
        samples = np.asarray(image)
        if samples.min() < 0 or samples.max() > 65535:
            raise UserError("32-bit integer pixels beyond 0..65535 are not supported; save as 16 bits first")
        samples = samples.astype(np.uint16)
        if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0:  # white is 0; Pillow turns 8 bits only
            samples = 65535 - samples
        return _keyed(samples[..., None], image, form)
    if form.cmyk:
        return np.asarray(convert_cmyk(image, form.profile, to="RGB"))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return np.asarray(ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))
    mode = ("L" if form.grey else "RGB") + ("A" if form.alpha else "")
    return np.asarray(image.convert(mode)).reshape(image.height, image.width, -1)


def _keyed(samples: np.ndarray, image: Image.Image, form: Form) -> np.ndarray:
    """16-bit samples (H, W, C), with transparency where they have the colour that `image` calls transparent."""
    if not form.alpha or samples.shape[2] in (2, 4):
        return samples
    seen = (samples != image.info["transparency"]).any(2, keepdims=True)
    return np.concatenate([samples, seen * np.uint16(65535)], 2)


def _deep_samples(path: str | Path) -> np.ndarray:
    """16-bit colour samples, (H, W, C) uint16.

    Pillow knows no 16-bit colour: it unpacks the high byte of each sample. Told that the samples stand in the
    other byte order it unpacks the low byte, so two passes give both, for every compression that it reads. Colours
    that are stored multiplied with alpha are divided by it here, in 16 bits.
    """
    planes = []
    for swapped in (False, True):
        with Image.open(formats.reachable(path)) as image:
            if image.tile[0].args == "LA;16B":  # two samples of two bytes, which unpack as four of one
                image.tile = [tile._replace(args="RGBA") for tile in image.tile]
                four = np.asarray(image).astype(np.uint16)
                return four[..., 0::2] << 8 | four[..., 1::2]
            multiplied = "RGBa" in str(image.tile[0].args)
            image.tile = [tile._replace(args=_packing(tile.args, swapped)) for tile in image.tile]
            planes.append(np.asarray(image).astype(np.uint16))
    samples = planes[0] << 8 | planes[1]
    if multiplied:
        alpha = np.maximum(samples[..., 3:], 1)
        samples[..., :3] = np.minimum((samples[..., :3] * np.uint32(65535) + alpha // 2) // alpha, 65535)
    return samples


def _packing(arguments: str | tuple, swapped: bool) -> str | tuple:
    """Decoder arguments with the raw mode's byte order ("RGB;16B": big, L: little, N: the machine's) `swapped` or not.

    Alpha is that of colours which were not multiplied with it.
    """
    if isinstance(arguments, tuple):
        return (_packing(arguments[0], swapped), *arguments[1:])
    order = ("L" if arguments.endswith("B") else "B") if swapped else arguments[-1]
    return arguments[:-1].replace("RGBa", "RGBA") + order


def _quantised(photo: Photo) -> Samples:
    """Pixels rounded to the nearest; grey as luma. ArithmeticError where they are not finite.

    A few rows at a time, because large images in several float copies are what memory would run out for.
    """
    form, place, (height, width) = photo.form, photo.pixels.device, photo.pixels.shape[-2:]
    if works_on_pixels(place):
        values, arrived = fetched(levels(_planes(photo, 0, height), form.bits))
        return Samples(values, form, arrived)
    channels, kind = (1 if form.grey else 3) + form.alpha, np.uint8 if form.bits == 8 else np.uint16
    samples = np.empty((height, width, channels), kind)
    for top, bottom in strips(height):
        samples[top:bottom] = levels(_planes(photo, top, bottom), form.bits).numpy()
    return Samples(samples, form)


def _planes(photo: Photo, top: int, bottom: int) -> Tensor:
    """Some rows as they will stand in the file: (C, h, W) float32 in [0, 1]."""
    place = photo.pixels.device if works_on_pixels(photo.pixels.device) else "cpu"
    planes = rows_of(photo.image, top, bottom)[0].detach().to(place, torch.float32)
    if photo.form.grey:
        planes = sum(plane * share for plane, share in zip(planes, _LUMA, strict=True))[None]
    alpha = [] if photo.alpha is None else [photo.alpha[:, top:bottom].detach().to(planes)]
    if not torch.stack([extreme for x in (planes, *alpha) for extreme in x.aminmax()]).isfinite().all():
        raise ArithmeticError("pixels are not finite")  # NaN is an extreme, too; a GPU is asked once
    planes = planes.clamp(-1, 1).add_(1).div_(2)
    return torch.cat([planes, *(x.clamp(0, 1) for x in alpha)]) if photo.form.alpha else planes


def levels(planes: Tensor, bits: int) -> Tensor:
    """(C, h, W) in [0, 1], which are overwritten, as (h, W, C) whole numbers: uint8 or, of 16 bits, int32."""
    whole = planes.mul_(2**bits - 1).round_().permute(1, 2, 0)
    return whole.to(torch.uint8 if bits == 8 else torch.int32).contiguous()


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
