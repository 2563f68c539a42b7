"""Which photographs there are: folders, text lists and tar shards, as one list of references to read from."""

from __future__ import annotations

import glob
import io
import logging
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from consissr.errors import UserError
from consissr.images import codec, formats

log = logging.getLogger(__name__)

EXTENSIONS = tuple(formats.WRITABLE)

# What Pillow raises for damaged data and for sizes that are meant to harm
DAMAGE = (*formats.DAMAGE, Image.DecompressionBombError)


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
        """The encoded image. Raises OSError where the file is gone or ends early."""
        with open(self.path, "rb") as file:
            if self.offset < 0:
                return file.read()
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise OSError(f"shard ends {self.size - len(data)} bytes before the end of {self.name}")
        return data


def list_photos(entry: str | Path) -> list[Photo]:
    """The photographs of a folder (recursive), a text list, a tar shard, or a glob pattern of those; sorted.

    A text list has one path per line, absolute or relative to the list. Raises UserError where there are none.
    """
    entry = os.path.expanduser(str(entry))
    if os.path.isdir(entry):
        photos = _from_folder(entry)
    elif os.path.isfile(entry):
        photos = _from_file(entry)
    else:
        matches = sorted(glob.glob(entry, recursive=True))
        if not matches:
            raise UserError(f"data path {entry} does not exist: give a folder, a text list, a tar shard or a pattern")
        return [photo for match in matches for photo in list_photos(match)]
    if not photos:
        raise UserError(f"data path {entry} holds no images ({', '.join(EXTENSIONS)}) and no tar shards with images")
    return photos


def _from_folder(folder: str) -> list[Photo]:
    photos, base = [], os.path.join(folder, "")
    for root, folders, names in os.walk(base, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(root, name)
            if name.startswith("."):
                continue
            if name.lower().endswith(EXTENSIONS):
                photos.append(Photo(path[len(base) :].replace(os.sep, "/"), path))
            elif name.endswith(".tar"):
                photos.extend(_from_shard(path))
    return photos


def _from_file(path: str) -> list[Photo]:
    if path.endswith(".tar"):
        photos = _from_shard(path)
        if not photos:
            raise UserError(f"shard {path} holds no complete image: fetch it again or take it off the list")
        return photos
    if path.lower().endswith(EXTENSIONS):
        return [Photo(os.path.basename(path), path)]
    return _from_list(path)


def _from_list(path: str) -> list[Photo]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"data path {path} is no text list, image or tar shard; unpack other archives first") from error
    base = os.path.dirname(os.path.abspath(path))
    photos = [Photo(Path(line).as_posix(), os.path.join(base, line)) for line in lines if line]
    head = photos[:20]
    if head and not any(os.path.isfile(photo.path) for photo in head):
        raise UserError(f"list {path}: none of its first {len(head)} files exists (looked for {head[0].path} first)")
    return photos


def _from_shard(path: str) -> list[Photo]:
    """Images of a tar file, found by its headers alone. A truncated shard gives what is whole, with a warning."""
    photos, total = [], os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or not member.name.lower().endswith(EXTENSIONS):
                    continue
                if member.offset_data + member.size > total:
                    raise tarfile.ReadError(f"it ends inside {member.name}")
                photos.append(Photo(member.name, path, member.offset_data, member.size))
    except tarfile.TarError as error:
        log.warning("shard %s is damaged (%s): its first %d images are used", path, error, len(photos))
    return photos


def decode(data: bytes) -> np.ndarray:
    """An encoded image as uint8 RGB [H,W,3], upright; transparency is dropped, 16 bits become 8.

    Raises UserError saying why where the data is no whole image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode in ("RGB", "L"):
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            return codec.to_uint8(codec.from_pil(image).pixels).permute(1, 2, 0).numpy()
    except UnidentifiedImageError as error:
        raise UserError("not an image, or of an unknown format") from error
    except DAMAGE as error:
        raise UserError(f"{type(error).__name__}: {error}") from error


def partners(photos: list[Photo], folder: str | Path) -> list[Photo]:
    """The low-quality partner of each photograph: the same name below `folder`, whatever its extension.

    Raises UserError naming those that have none, or more than one.
    """
    known: dict[str, list[Photo]] = {}
    for photo in list_photos(folder):
        known.setdefault(os.path.splitext(photo.name)[0], []).append(photo)
    found = [known.get(os.path.splitext(photo.name)[0], []) for photo in photos]
    wrong = [photo.name for photo, partner in zip(photos, found, strict=True) if len(partner) != 1]
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(photos)} images have no single partner of their name in {folder}, first {wrong[0]}"
        )
    return [partner[0] for partner in found]
