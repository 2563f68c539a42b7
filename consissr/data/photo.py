"""One photograph: where it is, its bytes, its pixels."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from consissr.errors import UserError
from consissr.images import codec, formats

EXTENSIONS = tuple(formats.WRITABLE)

DAMAGE = (*formats.DAMAGE, Image.DecompressionBombError)
"""What Pillow raises for damaged data and for sizes that are meant to harm."""
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What waiting does not mend."""
WAITS = (0.5, 2.0, 8.0)
"""Seconds before a read that failed (a network file system's hiccup) is tried again."""


@dataclass(frozen=True, slots=True)
class Photo:
    """One image file, or one member of a tar shard."""

    name: str  # path below the folder, list or shard it was found in, with forward slashes
    path: str  # the file to open
    offset: int = -1  # first byte of a shard's member; -1 for an ordinary file
    size: int = -1  # bytes of a shard's member

    @property
    def label(self) -> str:
        """What messages call the image."""
        return self.path if self.offset < 0 else f"{self.path}:{self.name}"

    def read(self) -> bytes:
        """The encoded image. Raises OSError where the file is gone, ends early or stays unreadable."""
        for wait in WAITS:
            try:
                return self._read()
            except LASTING:
                raise
            except OSError:
                time.sleep(wait)
        return self._read()

    def _read(self) -> bytes:
        with open(self.path, "rb") as file:
            if self.offset < 0:
                return file.read()
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise FileNotFoundError(f"shard ends {self.size - len(data)} bytes before the end of {self.name}")
        return data


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
