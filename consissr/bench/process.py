"""Measurements in processes of their own, and how much memory a process takes. Nothing heavy is imported here."""

import gc
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from consissr.errors import UserError

MB = 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Linux: a process's memory figures, and where writing 5 starts its peak anew."""


class Worker:
    """A process that runs functions of modules, one after the other; started with the first."""

    def __init__(self) -> None:
        self.process: multiprocessing.process.BaseProcess | None = None

    def ask(self, run: Callable[..., Any], given: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
        """run(**given): `status` "done" and `found`, or "failed" and `reason`; waits `limit` seconds."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send((run, given))
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


def answer(run: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """What became of a function; a failure as one line."""
    try:
        return {"status": "done", "found": run(**given)}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever went wrong, the others are worth measuring
        reason = " ".join(str(error).split())
        return {"status": "failed", "reason": f"{type(error).__name__}: {reason[:500]}"}


def apart(what: str, run: Callable[..., Any], **given: Any) -> Any:
    """run(**given) in a new process, whose memory holds nothing of other measurements. UserError: `what` failed."""
    worker = Worker()
    try:
        told = worker.ask(run, given)
    finally:
        worker.stop()
    if told["status"] == "failed":
        raise UserError(f"{what} failed: {told['reason']}")
    return told["found"]


def start_peak(device: str) -> int:
    """Start the peak anew, where the system can; bytes in use.

    What the program has freed goes back to the system first: a peak that fits into it would otherwise not be seen.
    """
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    import psutil

    from consissr.models.memory import trim_heap

    trim_heap()
    if CLEAR.exists():
        CLEAR.write_text("5")
    return psutil.Process().memory_info().rss


def peak(device: str) -> int:
    """Most bytes in use since `start_peak`, or since the process began where the system cannot start anew."""
    if not device.startswith("cuda") and STATUS.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())[1]) * 1024
    from consissr.models.memory import peak_memory_mb

    return peak_memory_mb() * MB
