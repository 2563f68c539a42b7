"""How far a long piece of work is: a bar on a terminal, a line now and then where the output is redirected."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

EVERY = 30.0
"""Seconds between two lines."""
T = TypeVar("T")


def track(label: str, items: Iterable[T], total: int, every: float = EVERY) -> Iterator[T]:
    """The `total` items, one by one; after each, how many are done and how long the others will take."""
    if sys.stderr.isatty():
        with Progress(console=Console(stderr=True), transient=True) as bar:
            yield from bar.track(items, total, description=label)
        return
    began = told = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - told >= every and done < total:
            told, left = now, (now - began) / done * (total - done)
            sys.stderr.write(f"{label}: {done} of {total}, {duration(left)} left\n")
            sys.stderr.flush()


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
