"""Seconds, and the machine's ceiling."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Time:
    """Wall-clock seconds, and the CPU seconds of all threads, which other programs on the machine change less."""

    wall: float = 0.0
    cpu: float = 0.0


class Clock:
    """Adds up the time of named parts of one run."""

    def __init__(self, device: torch.device, only: str = "") -> None:
        """only: the one part that is timed, so that nothing waits for the device within it."""
        self.device, self.only = device, only
        self.parts: dict[str, Time] = defaultdict(Time)
        self.calls: dict[str, int] = defaultdict(int)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what stands in the block."""
        if self.only not in ("", name):
            yield
            return
        self.wait()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wait()
        self.parts[name].wall += time.perf_counter() - wall
        self.parts[name].cpu += time.process_time() - cpu
        self.calls[name] += 1

    def timed(self, name: str, function: Callable) -> Callable:
        """The same function, with its time added to a part."""

        def run(*arguments, **keywords):
            with self.part(name):
                return function(*arguments, **keywords)

        return run

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def total(self) -> Time:
        """Of all parts."""
        return Time(sum(p.wall for p in self.parts.values()), sum(p.cpu for p in self.parts.values()))


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ceiling(device: torch.device, dtype: torch.dtype) -> Time:
    """Multiply-accumulates per second (and per CPU second) of a matrix product: the best of three."""
    side = 1536 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device).to(dtype)
    rates = []
    for _ in range(4):
        clock = Clock(device)
        with clock.part("product"):
            torch.mm(a, a)
        rates.append(clock.total())
    return Time(side**3 / min(r.wall for r in rates[1:]), side**3 / max(min(r.cpu for r in rates[1:]), 1e-9))
