"""What a user sees of a run over files: a progress bar, one line per failure, one line at the end."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from consissr.inference.batch import Outcome
from consissr.models.memory import peak_memory_mb


class Terminal:
    """A progress bar over `total` images while the context is open; `tell` moves it and names failures."""

    def __init__(self, console: Console, total: int, quiet: bool = False) -> None:
        self.console = console
        columns = (TextColumn("restoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # without a terminal the bar would only leave its last state in a log file
        self.progress = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
        self.task = self.progress.add_task("restoring", total=total)
        self.begin = time.perf_counter()
        self.model_seconds = 0.0

    def __enter__(self) -> "Terminal":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def tell(self, outcome: Outcome) -> None:
        """Take note of one finished image."""
        self.model_seconds += outcome.seconds
        if outcome.status == "failed":
            self.console.print(f"failed: {outcome.job.source}: {outcome.error}", markup=False)
        if outcome.status != "skipped":
            self.progress.advance(self.task)

    def summary(self, counts: dict[str, int]) -> str:
        """One line: what was done, how fast, in how much memory."""
        total = time.perf_counter() - self.begin
        done = counts["done"]
        pace = f", {self.model_seconds / done:.2f} s per image in the model" if done else ""
        words = ", ".join(f"{status} {number}" for status, number in counts.items())
        return f"{words} in {total:.1f} s{pace}, at most {peak_memory_mb()} MB"
