"""What image files say beside their pixels: who, when and with what; colours; the way up; how they were restored."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, RuntimeError, ArithmeticError, AssertionError,
    AttributeError, struct.error, zlib.error,
)  # fmt: skip
"""What Pillow raises, in practice, on damaged files."""

_KEPT_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.HostComputer,
    ExifTags.Base.Copyright,
)
_PROGRAM = "consissr "
_INTEROP_INDEX = 1
_PIXEL_TAGS = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)
_XMP_IN_PNG = b"XML:com.adobe.xmp" + bytes(5)
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation(?:=[\"']|>))\d")
_GAIN_MAP = re.compile(rb"hdrgm:|HDRGainMap|ns.google.com/photos/1.0/(?:container|depthmap)", re.IGNORECASE)


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1..8. Pillow itself turns TIFF files when they load; they say 1 from then on."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGE:  # a damaged EXIF block does not make the picture unreadable
        return 1
    return value if value in range(1, 9) else 1


def png_orientation(path: str | Path) -> int:
    """EXIF orientation, 1..8, of a PNG file, whose pixels are passed over: EXIF and XMP may stand behind them."""
    with open(path, "rb") as file:
        rest = file.read(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"IDAT", b"fdAT"):
                file.seek(length + 4, os.SEEK_CUR)
            else:
                rest += head + file.read(length + 4)
    try:
        with Image.open(io.BytesIO(rest)) as image:
            image.getexif = partial(Image.Image.getexif, image)  # without PNG's, which loads the pixels
            return orientation(image)
    except DAMAGE:
        return 1


def dpi(image: Image.Image) -> tuple[float, float] | None:
    """Dots per inch, where a file says them; nothing where it says what files say that know none."""
    try:
        across, down = (float(value) for value in image.info["dpi"])
    except (LookupError, TypeError, ValueError, ArithmeticError):
        return None
    return (across, down) if 0 < across <= 65535 and 0 < down <= 65535 else None  # JPEG has 16 bits for each


def is_lossless_webp(path: str | Path) -> bool:
    """Whether a WebP file's (first) picture is stored without loss."""
    with open(path, "rb") as file:
        if file.read(12)[8:] != b"WEBP":
            return False
        while len(head := file.read(8)) == 8:
            kind, length = struct.unpack("<4sI", head)
            if kind in (b"VP8L", b"VP8 "):
                return kind == b"VP8L"
            inside = 16 if kind == b"ANMF" else length + length % 2  # a frame holds chunks behind its own header
            file.seek(inside, os.SEEK_CUR)
    return False


def kept_xmp(image: Image.Image) -> bytes | None:
    """The XMP packet of an image, saying that it stands upright; None where it describes pictures that are left out."""
    xmp = image.info.get("xmp")
    if not isinstance(xmp, bytes) or not xmp or has_gain_map(image):
        return None
    return _XMP_ORIENTATION.sub(rb"\g<1>1", xmp)


def has_gain_map(image: Image.Image) -> bool:
    """Whether an image's XMP packet speaks of a gain map (HDR) or a depth map in the same file."""
    xmp = image.info.get("xmp")
    return isinstance(xmp, bytes) and _GAIN_MAP.search(xmp) is not None


def xmp_chunk(xmp: bytes) -> tuple[bytes, bytes]:
    """XMP as a chunk (type, data) of a PNG file."""
    return b"iTXt", _XMP_IN_PNG + xmp


def with_settings(exif: bytes | None, settings: dict[str, Any], version: str) -> bytes:
    """An EXIF block that also says how the picture was made: program, and settings as JSON in the user's comment."""
    made = Image.Exif()
    if exif:
        made.load(exif)
    made[ExifTags.Base.Software] = f"{_PROGRAM}{version}"
    tags = _exif_tags(made)
    tags[ExifTags.Base.UserComment] = b"ASCII\0\0\0" + json.dumps(settings).encode("ascii")
    made[ExifTags.IFD.Exif] = tags
    return made.tobytes()


def has_settings(exif: bytes | None) -> bool:
    """Whether an EXIF block, if there is one, is of `with_settings`."""
    return exif is not None and _PROGRAM.encode() in exif


def _exif_tags(exif: Image.Exif) -> dict[int, Any]:
    """The tags of the block's inner part but for sizes; what cameras say of Adobe RGB ("R03") stands within."""
    tags = {tag: value for tag, value in exif.get_ifd(ExifTags.IFD.Exif).items() if tag not in _PIXEL_TAGS}
    if tags.pop(ExifTags.IFD.Interop, None) and (index := exif.get_ifd(ExifTags.IFD.Interop).get(_INTEROP_INDEX)):
        tags[ExifTags.IFD.Interop] = {_INTEROP_INDEX: index}
    return tags


def kept_exif(image: Image.Image) -> bytes | None:
    """The descriptive EXIF tags of a loaded image (who, when, with what, where); nothing that speaks of pixels."""
    try:
        old = image.getexif()
        new = Image.Exif()
        for tag in _KEPT_TAGS:
            if tag in old:
                new[tag] = old[tag]
        for ifd, tags in (
            (ExifTags.IFD.Exif, _exif_tags(old)),
            (ExifTags.IFD.GPSInfo, dict(old.get_ifd(ExifTags.IFD.GPSInfo))),
        ):
            if tags:
                new[ifd] = tags
        return new.tobytes() if len(new) else None
    except DAMAGE:
        return None
