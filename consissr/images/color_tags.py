"""What files say of their colours beside an ICC profile: chunks of PNG files, a box of AVIF and HEIC files."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

_SRGB_PRIMARIES, _SRGB_TRANSFERS, _HDR = (1, 2), (1, 2, 6, 13), {16: "PQ", 18: "HLG"}
"""Numbers of cICP (ITU-T H.273); 2: unspecified; BT.709's transfer (1, 6) is shown as sRGB's."""
_SRGB = struct.pack(">9I", 45455, 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
"""gAMA and cHRM of sRGB, in 100,000ths."""
COLOUR_CHUNKS = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"cICP": 4, b"mDCV": 24, b"cLLI": 8}
"""Chunks of PNG files about colours beside the ICC profile, and their lengths."""


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
            if COLOUR_CHUNKS.get(kind) == length:
                data = file.read(length + 4)[:length]
                found += [(kind, data)] if len(data) == length else []
            else:
                file.seek(length + 4, os.SEEK_CUR)
    return tuple(found)


def colour_chunks(path: str | Path) -> tuple[tuple[bytes, bytes], ...]:
    """What a file says of its colours beside an ICC profile, as chunks (type, data) of a PNG file; () for nothing.

    Of AVIF and HEIC files without a profile the box "nclx", whose numbers are those of cICP.
    """
    with open(path, "rb") as file:
        head = file.read(2**16)
    if head[4:8] != b"ftyp":
        return png_chunks(path)
    at = head.find(b"colrnclx") + 8
    if at < 8 or b"colrprof" in head or b"colrrICC" in head:
        return ()
    primaries, transfer = struct.unpack(">HH", head[at : at + 4].ljust(4, b"\0"))
    return ((b"cICP", bytes((primaries % 256, transfer % 256, 0, 1))),) if primaries and transfer else ()


def is_ordinary(chunks: Iterable[tuple[bytes, bytes]], profile: bytes | None) -> bool:
    """Whether colours are those of the ICC profile or, without one, sRGB, so that any format can hold them.

    cICP goes before a profile, that before sRGB, and that before gAMA and cHRM (W3C, PNG, third edition).
    """
    said = dict(chunks)
    if code := said.get(b"cICP"):
        return code[0] in _SRGB_PRIMARIES and code[1] in _SRGB_TRANSFERS
    if profile or b"sRGB" in said:
        return True
    numbers = struct.unpack(">9I", (said.get(b"gAMA", b"") or _SRGB[:4]) + (said.get(b"cHRM", b"") or _SRGB[4:]))
    return all(abs(one - other) < 1000 for one, other in zip(numbers, struct.unpack(">9I", _SRGB), strict=True))


def hdr(chunks: Iterable[tuple[bytes, bytes]]) -> str:
    """The name of a transfer function for HDR, "" for others."""
    code = dict(chunks).get(b"cICP", bytes(2))
    return _HDR.get(code[1], "")
