"""What image files say beside their pixels: who, when and with what; colours; the way up; how they were restored."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
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
_PIXEL_TAGS = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)
COLOUR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI")
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


def dpi(image: Image.Image) -> tuple[float, float] | None:
    """Dots per inch, where a file says them; nothing where it says what files say that know none."""
    try:
        across, down = (float(value) for value in image.info["dpi"])
    except (LookupError, TypeError, ValueError, ArithmeticError):
        return None
    return (across, down) if 0 < across < 1e5 and 0 < down < 1e5 else None


def png_chunks(path: str | Path) -> tuple[tuple[bytes, bytes], ...]:
    """What a PNG file says of its colours beside an ICC profile, as (type, data); () for other files."""
    found = []
    with open(path, "rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return ()
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"IDAT", b"IEND"):
                break
            if kind in COLOUR_CHUNKS and length <= 64:
                found.append((kind, file.read(length)))
                file.seek(4, os.SEEK_CUR)
            else:
                file.seek(length + 4, os.SEEK_CUR)
    return tuple(found)


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
    made[ExifTags.Base.Software] = f"consissr {version}"
    tags = dict(made.get_ifd(ExifTags.IFD.Exif))
    tags[ExifTags.Base.UserComment] = b"ASCII\0\0\0" + json.dumps(settings).encode("ascii")
    made[ExifTags.IFD.Exif] = tags
    return made.tobytes()


def kept_exif(image: Image.Image) -> bytes | None:
    """The descriptive EXIF tags of a loaded image (who, when, with what, where); nothing that speaks of pixels."""
    try:
        old = image.getexif()
        new = Image.Exif()
        for tag in _KEPT_TAGS:
            if tag in old:
                new[tag] = old[tag]
        for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            tags = {tag: value for tag, value in old.get_ifd(ifd).items() if tag not in _PIXEL_TAGS}
            tags.pop(ExifTags.Base.ExifInteroperabilityOffset, None)
            if tags:
                new[ifd] = tags
        return new.tobytes() if len(new) else None
    except DAMAGE:
        return None
