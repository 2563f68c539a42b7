"""What a log line tells: means over the steps since the last one."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from consissr.training.processes import Processes


class Window:
    """Sums over steps, on the device until a line or a checkpoint needs them; and where the time went."""

    def __init__(self, step: int = 0) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.since = step
        self.restart(step)

    def restart(self, step: int) -> None:
        """Time is counted from here on, from `step`."""
        self.started, self.first, self.waited = time.perf_counter(), step, 0.0

    def add(self, totals: dict[str, Tensor | float]) -> None:
        """One step's figures."""
        for name, value in totals.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def share(self, processes: Processes) -> None:
        """Make the sums the mean of all processes'; here they are fetched from the device."""
        names = [name for name, value in self.sums.items() if isinstance(value, Tensor)]
        if names:
            row = processes.mean(torch.stack([self.sums[name].float() for name in names]))
            self.sums |= zip(names, row.tolist(), strict=True)

    def close(self, step: int) -> tuple[dict[str, float], float, float]:
        """Means per step, seconds per step, and seconds per step of waiting for data; a new window begins at `step`."""
        steps = step - self.first
        means = {name: value / (step - self.since) for name, value in self.sums.items()}
        times = (time.perf_counter() - self.started) / steps, self.waited / steps
        self.sums, self.since = {}, step
        self.restart(step)
        return means, *times

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"window": dict(self.sums), "since": self.since}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.sums, self.since = state.get("window", {}), state.get("since", state["step"])
