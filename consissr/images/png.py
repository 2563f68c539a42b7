"""PNG files, also with what Pillow cannot write: 16 bits in colour, chunks about colours. After W3C's third edition."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

_COLOUR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> grey, grey + alpha, RGB, RGBA
_UP = 2  # filter type: each row is stored as its difference from the row above
_ROWS = 256  # compressed at once: a large picture need not be in memory again


def write(
    file: BinaryIO,
    samples: np.ndarray,
    profile: bytes | None = None,
    exif: bytes | None = None,
    chunks: Sequence[tuple[bytes, bytes]] = (),
    dpi: tuple[float, float] | None = None,
) -> None:
    """(H, W, 1..4) uint8 or uint16, alpha last, as a PNG file; optional profile, EXIF, other chunks, dots per inch."""
    (height, width, channels), size = samples.shape, samples.itemsize
    file.write(b"\x89PNG\r\n\x1a\n")
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * size, _COLOUR_TYPE[channels], 0, 0, 0))
    for kind, data in chunks:
        _chunk(file, kind, data)
    if profile:
        _chunk(file, b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile))
    if dpi:
        _chunk(file, b"pHYs", struct.pack(">IIB", *(round(number / 0.0254) for number in dpi), 1))  # per metre
    if exif:
        _chunk(file, b"eXIf", exif.removeprefix(b"Exif\0\0"))
    packer, above = zlib.compressobj(4), np.zeros((1, size * width * channels), np.uint8)
    for top in range(0, height, _ROWS):
        some = samples[top : top + _ROWS]
        rows = np.frombuffer(some.astype(f">u{size}").tobytes(), np.uint8).reshape(len(some), -1)
        different = rows - np.vstack([above, rows[:-1]])  # differences wrap, as they must
        filtered = np.hstack([np.full((len(rows), 1), _UP, np.uint8), different])
        if packed := packer.compress(filtered.tobytes()):
            _chunk(file, b"IDAT", packed)
        above = rows[-1:]
    _chunk(file, b"IDAT", packer.flush())
    _chunk(file, b"IEND", b"")


def _chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
