"""A GPU measured in a few minutes, most valuable first: `scripts/bench.py gpu --minutes N`.

Tasks run one after the other in a worker process, which stays. Everything known so far is in the file after each task.
A task that fails, hangs or brings its process down is recorded with its reason, and the next one begins; what does not
fit into the time that is left is named. Nothing heavy is imported here.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


class Worker:
    """A process that runs tasks, one after the other; started with the first."""

    def __init__(self) -> None:
        self.process: multiprocessing.process.BaseProcess | None = None

    def ask(self, task: Task, limit: float) -> dict[str, Any]:
        """What the task gives: `status` "done" and `found`, or "failed" and `reason`; waits `limit` seconds."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send((task.run, task.given))
            if self.pipe.poll(limit):
                return self.pipe.recv()
            reason = f"took longer than {limit:.0f} s"
        except (EOFError, OSError):
            self.process.join(5)
            reason = f"its process ended with status {self.process.exitcode}"
        self.stop()
        return {"status": "failed", "reason": reason}

    def stop(self) -> None:
        """End the process and those that it started, whatever they do."""
        if self.process is not None:
            with suppress(OSError):  # it has ended, or has not begun
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


def serve(pipe: Any) -> None:
    """The worker, in a group of its own with what it starts: answers until the pipe closes."""
    os.setpgrp()
    while True:
        try:
            run, given = pipe.recv()
        except EOFError:
            return
        pipe.send(answer(run, given))
        gc.collect()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            sys.modules["torch"].cuda.empty_cache()


def answer(run: Callable[..., dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
    """A task's outcome; a failure as one line."""
    try:
        return {"status": "done", "found": run(**given)}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever went wrong, the other tasks are worth measuring
        reason = " ".join(str(error).split())
        return {"status": "failed", "reason": f"{type(error).__name__}: {reason[:500]}"}


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
                entry |= worker.ask(task, min(left, max(PATIENCE * task.seconds, LEAST)))
                entry["seconds"] = round(clock() - began, 1)
            tell("\n".join(lines(entry)))
            if file:
                write(file, record)
    finally:
        worker.stop()
    return record


def write(file: Path, record: dict[str, Any]) -> None:
    """The record, whole or as it was before."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(record, indent=1, default=str))
    new.replace(file)


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
