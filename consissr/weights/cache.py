"""This project's own cache: where it is, who may write in it, room on its disk, and files that stay as recorded."""

import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from consissr.config.machine import cache_folder
from consissr.errors import UserError

log = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds of waiting for another process before it is said."""

SPARE = 2**28
"""Bytes that stay free on a disk."""


def by_hand_folder(name: str) -> Path:
    """Where files that can only be downloaded by hand are put."""
    return cache_folder() / "by-hand" / name


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time; the others wait, and say so. UserError where the cache cannot be written."""
    from filelock import FileLock, Timeout

    path = cache_folder() / "locks" / f"{name}.lock"
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        log.warning("another process is preparing %s: waiting for it", name)
        lock.acquire()
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written ({error}): set CONSISSR_HOME to a folder that can") from error
    try:
        yield
    finally:
        lock.release()


def check_free(folder: Path, need: int, what: str, variable: str) -> None:
    """UserError unless the disk of `folder`, which the environment's `variable` moves, has `need` bytes."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if need and need + SPARE > free:
        raise UserError(
            f"{what} needs {need / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free: make room, or set "
            f"{variable} to a folder on another disk"
        )


def sha256_of(path: Path) -> str:
    """The digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp_of(path: Path) -> dict[str, Any]:
    """What `unchanged` compares a file with later."""
    return {"size": path.stat().st_size, "mtime": path.stat().st_mtime_ns, "sha256": sha256_of(path)}


def unchanged(path: Path, stamp: dict[str, Any]) -> bool:
    """Whether a file is as it was. Its digest is computed only where size or time say that it was touched.

    stamp: "size" and "sha256", each None where unknown, and "mtime", which follows where the file is found the same.
    """
    try:
        state = path.stat()
    except OSError:
        return False
    if stamp["size"] not in (None, state.st_size):
        return False
    if stamp.get("mtime") != state.st_mtime_ns:
        if stamp["sha256"] and sha256_of(path) != stamp["sha256"]:
            return False
        stamp["mtime"] = state.st_mtime_ns
    return True
