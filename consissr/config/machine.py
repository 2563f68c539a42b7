"""The machine that a process runs on: its cores, the project's cache folder, and files that are whole or not there."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Where converted models and what is known of shards stand: CONSISSR_HOME, or consissr/ in the user's cache."""
    if home := os.environ.get("CONSISSR_HOME"):
        return Path(home).expanduser().absolute()
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "consissr")


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
