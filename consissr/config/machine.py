"""The machine that a process runs on: its cores, the project's cache folder, and files that are whole or not there."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from consissr.errors import UserError


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Where converted models and what is known of shards stand: CONSISSR_HOME, or consissr/ in the user's cache."""
    if home := os.environ.get("CONSISSR_HOME"):
        return Path(home).expanduser().absolute()
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "consissr")


def check_place(path: Path, flag: str) -> None:
    """UserError where no file can be made at or below `path`, as far as that shows before anything is written."""
    if "\0" in str(path):
        raise UserError(f"{flag} {str(path)!r} has a NUL: use another name")
    first = next((place for place in (path, *path.absolute().parents) if os.path.lexists(place)), None)
    if first == path and os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{flag} {path}: a link that leads nowhere; use another name")
    if first is None or (first == path and not os.path.isdir(path)):
        return
    if not os.path.isdir(first):
        raise UserError(f"{flag} {path}: {first} is no folder; use another name")
    if not os.access(first, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {first} may not be written to; use another place")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A hidden file beside `path`, of the same suffix, to be written within; it takes `path`'s place at the end.

    Nobody sees a half-written file: after an exception, `path` is as it was before.
    """
    part = path.with_name(f".{os.getpid()}-{threading.get_ident()}.part{path.suffix}")  # short, whatever the name
    try:
        yield part
        os.replace(part, path)
    finally:
        with suppress(OSError):  # what could not be made cannot be removed
            part.unlink(missing_ok=True)
