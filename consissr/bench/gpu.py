"""A GPU measured in a few minutes, most valuable first: `scripts/bench.py gpu --minutes N`.

Tasks run one after the other in a worker process, which stays. Everything known so far is in the file after each task.
A task that fails, hangs or brings its process down is recorded with its reason, and the next one begins; what does not
fit into the time that is left is named. Nothing heavy is imported here.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consissr.bench.process import Worker
from consissr.config.machine import whole

RESERVE = 3.0
"""Seconds at the end in which nothing is measured."""
PATIENCE, LEAST = 2.0, 100.0
"""A task may take so many times its estimate, but at least so many seconds, before it counts as hanging."""


@dataclass
class Task:
    """One thing to measure."""

    name: str
    seconds: float
    """An estimate: it begins only where so much time is left."""
    run: Callable[..., dict[str, Any]]
    """A function of a module (it is sent to the worker). Its result: figures by name, and whatever JSON holds."""
    given: dict[str, Any] = field(default_factory=dict)
    """The function's arguments."""


def measure(
    tasks: list[Task],
    minutes: float,
    file: Path | None = None,
    tell: Callable[[str], None] = str,
    worker: Worker | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Run as many tasks as fit into the minutes, in their order; the record, which is in `file` after each of them."""
    worker, end = worker or Worker(), clock() + 60 * minutes - RESERVE
    record: dict[str, Any] = {"minutes": minutes, "tasks": [{"task": t.name, "status": "not begun"} for t in tasks]}
    try:
        for task, entry in zip(tasks, record["tasks"], strict=True):
            left, began = end - clock(), clock()
            if task.seconds > left:
                entry["reason"] = f"takes about {task.seconds:.0f} s, {max(left, 0):.0f} were left"
            else:
                entry |= worker.ask(task.run, task.given, min(left, max(PATIENCE * task.seconds, LEAST)))
                entry["seconds"] = round(clock() - began, 1)
            tell("\n".join(lines(entry)))
            if file:
                write(file, record)
    finally:
        worker.stop()
    return record


def write(file: Path, record: dict[str, Any]) -> None:
    """The record, whole or as it was before."""
    with whole(file) as new:
        new.write_text(json.dumps(record, indent=1, default=str))


def lines(entry: dict[str, Any]) -> Iterator[str]:
    """What a task found, for the terminal: its name, then its figures; what is nested stands in the file alone."""
    took = f", {entry['seconds']:.0f} s" if "seconds" in entry else ""
    reason = f": {entry['reason']}" if "reason" in entry else ""
    yield f"{entry['task']}: {entry['status']}{took}{reason}"
    for name, value in entry.get("found", {}).items():
        if isinstance(value, float):
            yield f"    {name}: {value:.4g}"
        elif not isinstance(value, dict | list):
            yield f"    {name}: {value}"
