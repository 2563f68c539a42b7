"""The folders below a folder: each once, whatever links lead to it."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def tree(
    top: str | Path,
    hidden: bool = False,
    leave: Iterable[str | Path] = (),
    enter: Callable[[Path], bool] = lambda folder: True,
    onerror: Callable[[OSError], None] | None = None,
) -> Iterator[tuple[Path, list[str]]]:
    """`top` and the folders that lie or are linked below it, each with the names of its files, all sorted.

    A link to a folder that is found without it is passed over, so circles end. hidden: whether folders whose names
    begin with a dot count; leave: folders that don't; enter: tells of any other whether it does. `onerror` is told
    which folders cannot be read.
    """
    real_top = os.path.realpath(top)
    seen = {real_top, *map(os.path.realpath, leave)}

    def is_new(folder: Path) -> bool:
        real = os.path.realpath(folder)
        below = Path(real).relative_to(real_top).parts if Path(real).is_relative_to(real_top) else ()
        found = below and (hidden or not any(name.startswith(".") for name in below))
        return not ((folder.is_symlink() and found) or real in seen or seen.add(real))

    for root, folders, names in os.walk(top, onerror=onerror, followlinks=True):
        here = Path(root)
        shown = [here / name for name in sorted(folders) if hidden or not name.startswith(".")]
        folders[:] = [folder.name for folder in shown if enter(folder) and is_new(folder)]
        yield here, sorted(names)
