"""How far a long piece of work is: a bar on a terminal, a line now and then where the output is redirected."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

EVERY = 30.0
"""Seconds between two lines."""


@contextmanager
def progress(label: str, every: float = EVERY) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) to call after each step."""
    if sys.stderr.isatty():
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    began = told = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= every and done < total:
            told = now
            left = (now - began) / done * (total - done)
            sys.stderr.write(f"{label}: {done} of {total}, {duration(left)} left\n")
            sys.stderr.flush()

    yield line


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
