"""What a log line tells: means over the steps since the last one, and how fast they were."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from consissr.training.processes import Processes

COUNT = "#"
"""Begins the name of the number of steps that a sum is over, where that is not all."""


class LogWindow:
    """Sums over steps, on the device until a line or a checkpoint needs them; and where the time went."""

    work = 0.0
    """Floating point operations of training on one image, once they are counted."""
    peak = 1.0
    """Those per second that can be reached here (`fastest_rate`)."""

    def __init__(self, images: int = 1) -> None:
        """images: of this process in each step."""
        self.images = images
        self.sums: dict[str, Tensor | float] = {}
        self.since = 0
        self.restart(0)

    def restart(self, step: int) -> None:
        """Time is counted from here on, from `step`."""
        self.started, self.first, self.waited = time.perf_counter(), step, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within takes no time of a step."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def add(self, totals: dict[str, Tensor | float], finite_only: bool = False) -> None:
        """One step's figures; with `finite_only` means are over those steps in which a figure was finite."""
        for name, value in totals.items():
            if finite_only and isinstance(value, Tensor):
                counts = torch.isfinite(value)
                value = torch.where(counts, value, 0.0)
                self.sums[COUNT + name] = self.sums.get(COUNT + name, 0.0) + counts.float()
            self.sums[name] = self.sums.get(name, 0.0) + value

    def share(self, processes: Processes) -> None:
        """Make the sums the mean of all processes'; here they are fetched from the device."""
        names = [name for name, value in self.sums.items() if isinstance(value, Tensor)]
        if names:
            row = processes.mean(torch.stack([self.sums[name].float() for name in names]))
            self.sums |= zip(names, row.tolist(), strict=True)

    def close(self, step: int) -> dict[str, float]:
        """Speed and means per step; a new window begins at `step`."""
        steps = step - self.first
        seconds = (time.perf_counter() - self.started) / steps
        values = {"steps_per_second": round(1 / seconds, 4), "data_seconds": round(self.waited / steps, 4)}
        values["peak_share"] = round(self.work * self.images / seconds / self.peak, 4)
        counts = {name: self.sums.pop(COUNT + name, step - self.since) for name in list(self.sums) if name[0] != COUNT}
        values |= {name: self.sums[name] / count for name, count in counts.items() if count}
        self.sums, self.since = {}, step
        self.restart(step)
        return values

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"window": dict(self.sums), "since": self.since, "work": self.work}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.sums, self.since, self.work = state["window"], state["since"], state.get("work", 0.0)


def fastest_rate(device: torch.device, low: bool) -> float:
    """Floating point operations per second of large matrix products on `device`, in bfloat16 if `low`, else float32;
    on the CPU of 3x3 convolutions, where those are faster (on AMD's by a third).

    Measured: what a step could reach at best, under this card's clock and power, rather than its data sheet's figure.
    """
    dtype, side = torch.bfloat16 if low else torch.float32, 8192 if device.type == "cuda" else 512
    square = torch.ones(side, side, dtype=dtype, device=device)
    rate = 2 * side**3 / quickest(lambda: square @ square)
    if device.type == "cpu":
        width, side = 96, 64
        x, kernel = torch.ones(2, width, side, side, dtype=dtype), torch.ones(width, width, 3, 3, dtype=dtype)
        x, kernel = (each.to(memory_format=torch.channels_last) for each in (x, kernel))
        seconds = quickest(lambda: F.conv2d(x, kernel, padding=1))
        rate = max(rate, 2 * 2 * side**2 * 9 * width**2 / seconds)
    return rate


def quickest(run: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of some runs: the first one warms up, others may share the processor."""
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        run().flatten()[0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return min(seconds)


class Counter(TorchDispatchMode):
    """Counts the floating point operations of what runs within: convolutions, matrix products, attention.

    (torch's FlopCounterMode also takes operations apart, which changes the last bits of gradients.)
    """

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def counted(run: Callable[[], None]) -> int:
    """Floating point operations of `run`, backward passes too."""
    with torch.compiler.set_stance("force_eager"), Counter() as counter:
        run()
    return counter.total
