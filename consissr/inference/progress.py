"""What a user sees of a run over files: a progress bar, one line per failure, one line at the end."""

from __future__ import annotations

import glob
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from consissr.images import formats
from consissr.inference.batch import Outcome
from consissr.inference.jobs import Job, folders
from consissr.models.memory import peak_memory_mb

SILENCE = 30
"""Seconds between two lines that tell how far the work is, where no bar can be shown."""


class Terminal:
    """A progress bar over `total` images while the context is open; `tell` moves it and names failures.

    remark: a line to say before.
    """

    def __init__(self, console: Console, total: int, quiet: bool = False, remark: str = "") -> None:
        self.console, self.quiet = console, quiet
        words = TextColumn("{task.description}", markup=False)  # file names may have [brackets]
        columns = (words, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        # without a terminal the bar would only leave its last state in a log file
        self.progress = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
        self.total, self.ended = total, 0
        if remark and not quiet:
            self.say(remark)
        self.task = self.progress.add_task(f"restoring 0/{total}", total=total)
        self.begin = self.spoke = time.perf_counter()
        self.model_seconds: list[float] = []

    def __enter__(self) -> Terminal:
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def tell(self, outcome: Outcome) -> None:
        """Take note of one finished image."""
        if outcome.status == "done" and outcome.job.note and not self.quiet:
            self.say(f"note: {outcome.job.source}: {outcome.job.note}")
        if outcome.status == "done":
            self.model_seconds.append(outcome.seconds)
        if outcome.status == "failed":
            self.say(f"failed: {outcome.job.source}: {outcome.error}")
        if outcome.status != "skipped":
            self.ended += 1
            self.progress.update(self.task, completed=self.ended, description=f"restoring {self.ended}/{self.total}")
            left = (time.perf_counter() - self.begin) / self.ended * (self.total - self.ended)
            self.now_and_then(f"restored {self.ended} of {self.total}, {left:.0f} s left")

    def on_tile(self, job: Job, done: int, number: int, share: float) -> None:
        """Show how far a large image is: tiles done, and the time left by the share of the work done."""
        words = f"{job.source.name}: tile {done} of {number}"
        self.progress.update(self.task, completed=min(self.ended + share, self.total), description=words)
        self.now_and_then(f"{words}, {share:.0%} done")

    def now_and_then(self, words: str) -> None:
        """A line for output that is redirected to a file, where the bar does not show."""
        now = time.perf_counter()
        if not self.quiet and not self.console.is_terminal and now - self.spoke > SILENCE:
            self.spoke = now
            self.say(words)

    def say(self, words: str) -> None:
        """Print a line, if that can be: results matter more than what is said of them."""
        with suppress(OSError, SystemExit):  # a full disk; rich leaves the program where nobody reads any more
            self.console.print(words, markup=False)

    def summary(self, counts: dict[str, int], precision: str = "") -> str:
        """One line: what was done, how fast, in which precision, in how much memory.

        The pace is the median of the images after the first, which also warms the model up.
        """
        total = time.perf_counter() - self.begin
        times = self.model_seconds[1:] or self.model_seconds
        pace = f", {statistics.median(times):.2f} s per image in the model" if times else ""
        words = ", ".join(f"{status} {number}" for status, number in counts.items())
        ran = f" ({precision})" if precision and times else ""
        return f"{words} in {total:.1f} s{pace}{ran}, at most {peak_memory_mb()} MB"


def overlooked(inputs: Sequence[str], recursive: bool, output: Path) -> str:
    """A line on pictures in the input folders and patterns whose kind is not read; "" where there are none.

    Of a folder, where its pictures are searched: see `jobs.folders`.
    """
    kinds = (formats.UNREADABLE | formats.PLUGINS.keys()) - formats.READABLE
    names: list[str] = []
    for text in inputs:
        if os.path.isdir(text):
            names += [name for _, files in folders(Path(text), recursive, output) for name in files]
        elif not os.path.exists(text):
            names += map(os.path.basename, glob.glob(text, recursive=True))
    endings = (Path(name).suffix.lower() for name in names if not name.startswith("."))
    counts = Counter(ending for ending in endings if ending in kinds)
    words = [f"{count} {ending}" for ending, count in sorted(counts.items())]
    missing = [kind for kind in counts if kind in formats.PLUGINS]
    help_ = f" ({formats.how_to_get(*missing)})" if missing else ""
    return f"not read: {', '.join(words)}{help_}" if words else ""
