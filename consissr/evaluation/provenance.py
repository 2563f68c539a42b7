"""What results come from: a folder whose name ends in the hash of its origin, and beside it a record that says it.

So nothing is taken for what was made of other weights, images or settings, and what is there need not be made again.
"""

import hashlib
import json
import os
from pathlib import Path

from consissr.errors import UserError
from consissr.images.tree import tree

MODEL_FILES = (".safetensors", ".bin", ".ckpt", ".yaml", ".json")
"""Endings of the files of a model folder that results depend on."""
TIMES = "origin.json"
"""A converted model's record of when its files were written: no such file."""


def folder_of(parent: Path, name: str, /, **origin: object) -> Path:
    """The folder PARENT/NAME-HASH for what is made of `origin` (plain data); PARENT/NAME-HASH.json records that.

    The folder itself is not made.
    """
    text = json.dumps(origin, sort_keys=True)
    folder = parent / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if not record_file(folder).is_file():
        parent.mkdir(parents=True, exist_ok=True)
        _write(folder, origin)
    return folder


def record_file(folder: Path) -> Path:
    """The record beside `folder`."""
    return folder.with_name(f"{folder.name}.json")


def record(folder: Path) -> dict:
    """What is recorded of `folder`."""
    return json.loads(record_file(folder).read_text(encoding="utf-8"))


def note(folder: Path, **facts: object) -> None:
    """Add facts about how it came out, such as the seconds it took, to the record of `folder`."""
    _write(folder, record(folder) | facts)


def fingerprint(path: Path, endings: tuple[str, ...] = ()) -> str:
    """Hash of the names and contents of a folder's files (or of one file), hidden ones left out: 16 hexadecimal digits.

    endings: of a folder's files that count, such as ".safetensors"; none means all.
    """
    files = [path] if path.is_file() else files_below(path)
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix()
        counts = not endings or file == path or (name.lower().endswith(endings) and file.name != TIMES)
        if counts and not any(part.startswith(".") for part in Path(name).parts):
            with file.open("rb") as stream:
                digest.update(os.fsencode(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n"))
    return digest.hexdigest()[:16]


def files_below(folder: Path) -> list[Path]:
    """Every file below `folder` by path, those of hidden folders left out: see `tree`. UserError: it cannot be read."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): allow it, or take it out of {folder}")

    files = (here / name for here, names in tree(folder, onerror=refuse) for name in names)
    return sorted(file for file in files if file.is_file())


def contents(place: Path, endings: tuple[str, ...] = ()) -> str:
    """The fingerprint of a folder or file; the name of one that is not on this machine."""
    return fingerprint(place, endings) if place.exists() else str(place)


def _write(folder: Path, content: dict) -> None:
    record_file(folder).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
