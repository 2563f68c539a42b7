"""From samples to the bytes of a file, in every format that is written, with what the file says beside its pixels."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageCms

from consissr.images import formats, metadata, png
from consissr.images.formats import Form

_LONGEST_IN_JPEG = 65500  # bytes of EXIF or XMP: one segment


@dataclass
class Samples:
    """An image as it will stand in its file: values (H, W, C) uint8 or uint16, alpha last."""

    values: np.ndarray
    form: Form
    arrived: Callable[[], None] = lambda: None
    """Waits until the values are here, where they come from a GPU."""


def encode(file: io.BufferedWriter, samples: Samples, target: formats.Format, quality: int) -> None:
    form = samples.form
    if target.name == "PNG":
        chunks = form.chunks + ((metadata.xmp_chunk(form.xmp),) if form.xmp else ())
        png.write(file, samples.values, form.profile, form.exif, chunks, form.dpi)
        return
    if form.bits == 16 and not form.grey:
        _write_deep_tiff(file, samples.values, form)
        return
    options = {
        "JPEG": {"quality": quality, "subsampling": 0},
        "WEBP": {"lossless": True} if form.lossless else {"quality": quality},
        "AVIF": {"quality": quality, "subsampling": "4:4:4"},
        "JXL": {"quality": quality, "use_container": True},
        "TIFF": {"compression": "tiff_deflate"},
    }.get(target.name, {})
    if form.profile:
        options["icc_profile"] = form.profile
    if form.dpi and target.name in ("JPEG", "TIFF"):
        options["dpi"] = form.dpi
    longest = _LONGEST_IN_JPEG if target.name == "JPEG" else 2**31
    if form.exif and target.keeps_exif(form) and len(form.exif) <= longest:
        options["exif"] = form.exif
    if form.xmp and target.name in ("JPEG", "WEBP", "AVIF", "JXL") and len(form.xmp) <= longest:
        options["xmp"] = form.xmp
    if target.name == "TIFF" and (form.exif or form.xmp):
        del options["compression"]  # Pillow's libtiff cannot nest EXIF blocks
        options["exif"] = _tiff_tags(form)
    formats.use_plugin(f".{target.name.lower()}")
    pil(samples).save(file, format=target.name, **options)


def _tiff_tags(form: Form) -> Image.Exif:
    """EXIF and XMP as tags of a TIFF file."""
    tags = Image.Exif()
    if form.exif:
        tags.load(form.exif)
    if form.xmp:
        tags[ExifTags.Base.XMLPacket] = form.xmp
    return tags


def _write_deep_tiff(file: io.BufferedWriter, samples: np.ndarray, form: Form) -> None:
    import tifffile

    tifffile.imwrite(
        file,
        samples,
        photometric="rgb",
        planarconfig="contig",
        extrasamples=["unassalpha"] if form.alpha else None,
        compression="zlib",
        resolution=form.dpi,
        resolutionunit="INCH" if form.dpi else None,
        iccprofile=form.profile,
        extratags=[(ExifTags.Base.XMLPacket.value, 1, len(form.xmp), form.xmp, True)] if form.xmp else (),
        metadata=None,
    )


def pil(samples: Samples) -> Image.Image:
    """Samples that Pillow can hold, as its image."""
    samples.arrived()
    values, form = samples.values, samples.form
    image = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)
    if form.cmyk:
        image = convert_cmyk(image, form.profile, to="CMYK")
    if form.profile:
        image.info["icc_profile"] = form.profile
    return image


def convert_cmyk(image: Image.Image, profile: bytes | None, to: str) -> Image.Image:
    """Between CMYK and sRGB, through the CMYK profile where one is usable, else by Pillow's plain formula."""
    if profile:
        try:
            cmyk, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            source, target = (cmyk, srgb) if to == "RGB" else (srgb, cmyk)
            return ImageCms.profileToProfile(image, source, target, outputMode=to)
        except (ImageCms.PyCMSError, OSError):
            pass  # a damaged profile, or one for other colours: the plain formula is what viewers use then
    return image.convert(to)
