"""The folders below a folder: each once, whatever links lead to it."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def tree(
    top: str | Path,
    leave: Iterable[str | Path] = (),
    enter: Callable[[Path], bool] = lambda folder: True,
    onerror: Callable[[OSError], None] | None = None,
) -> Iterator[tuple[Path, list[str]]]:
    """`top` and the folders that lie or are linked below it, each with the names of its files, all sorted.

    A link to a folder that is found without it is passed over, so circles end. Folders whose names begin with a dot
    do not count, nor those to `leave`; enter: tells of any other whether it does. `onerror` is told which folders
    cannot be read.
    """
    real_top = os.path.realpath(top)
    seen = {real_top, *map(os.path.realpath, leave)}

    def is_new(folder: Path) -> bool:
        real = os.path.realpath(folder)
        below = Path(real).relative_to(real_top).parts if Path(real).is_relative_to(real_top) else ()
        found = below and not any(name.startswith(".") for name in below)
        return not ((os.path.islink(folder) and found) or real in seen or seen.add(real))

    for root, folders, names in os.walk(top, onerror=onerror, followlinks=True):
        here = Path(root)
        shown = [here / name for name in sorted(folders) if not name.startswith(".")]
        folders[:] = [folder.name for folder in shown if enter(folder) and is_new(folder)]
        yield here, sorted(names)
