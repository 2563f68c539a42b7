"""Work spread over processes that end with this one, and how many of them there is room for."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, get_context
from typing import Any

from consissr.config.machine import cores
from consissr.errors import UserError

SPARE = 0.8
"""Share of the free memory that processes may take together."""
GRACE = 2.0
"""Seconds that a process has to end after SIGTERM."""


def count(jobs: int | None, device: str = "cpu", gigabytes: float = 0.0) -> int:
    """`jobs` checked; for None as many as there are cores and free memory for, or a single one on an accelerator.

    gigabytes: what each process takes.
    """
    if jobs is None:
        room = int(SPARE * free_gigabytes() / gigabytes) if gigabytes else cores()
        return max(1, min(cores(), room)) if device == "cpu" else 1
    check_jobs(jobs)
    return jobs


def check_jobs(jobs: int | None) -> None:
    """Raises UserError for a number of processes that cannot be."""
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {jobs}: leave it out for one process per core")


def free_gigabytes() -> float:
    """Memory that is free on this machine."""
    import psutil

    return psutil.virtual_memory().available / 2**30


def results(function: Callable[..., Any], items: Sequence[Any], jobs: int) -> Iterator[Any]:
    """function(item) of every item, over `jobs` processes of one thread each, in the order in which they finish.

    An exception in a process is raised here. Processes end when this one does, however it does: what they wait on
    closes. An interrupt at the keyboard reaches this process alone.
    """
    with _processes(function, min(jobs, len(items))) as pipes:
        waiting, busy = list(reversed(items)), []
        for pipe in pipes:
            pipe.send(waiting.pop())
            busy.append(pipe)
        while busy:
            for pipe in connection.wait(busy):
                try:
                    done, value = pipe.recv()
                except (EOFError, ConnectionError):
                    raise UserError("a process of this run has died (out of memory?): try fewer with --jobs") from None
                if not done:
                    raise value
                busy.remove(pipe)
                if waiting:
                    pipe.send(waiting.pop())
                    busy.append(pipe)
                yield value


@contextmanager
def _processes(function: Callable[..., Any], number: int) -> Iterator[list[connection.Connection]]:
    """Connections to `number` processes that answer with function(item)."""
    context, started, pipes = get_context("spawn"), [], []
    try:
        with _ignored_interrupts():
            for _ in range(number):
                ours, theirs = context.Pipe()
                started.append(context.Process(target=_serve, args=(function, theirs), daemon=True))
                started[-1].start()
                theirs.close()  # so that its end closes with the process
                pipes.append(ours)
        yield pipes
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join(GRACE)
            if process.is_alive():
                process.kill()


def end_with_parent() -> None:
    """In a child that is about to start (`preexec_fn`): SIGTERM when the parent ends, however it does (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Processes that start in here ignore SIGINT from their first moment: that setting is inherited."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread, which alone may change it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(function: Callable[..., Any], pipe: connection.Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # for a torch that is imported later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    try:
        while True:
            item = pipe.recv()
            try:
                answer = (True, function(item))
            except Exception as error:  # noqa: BLE001 - whatever it is, the other process raises it
                answer = (False, error)
            pipe.send(answer)
    except (EOFError, OSError):
        return  # the other end has closed
