"""Where the degradation's random numbers come from.

The pipeline asks a `Draws` object, in a fixed order, for scalars and for noise fields. `SeededDraws` is ours: one
object per image, so that an image's degradation depends on its seed alone, never on the batch around it.
`ReleasedDraws` draws as the authors' code does.
"""

import random
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from consissr.data.poisson import poisson_counts


class Draws(Protocol):
    """Random numbers of one pipeline run over a batch of B images of one shape."""

    always_coloured: bool  # whether a coloured noise field is drawn even where a gray one replaces it (basicsr does)

    def pick(self, values: Sequence, weights: Sequence[float] | None = None) -> Any:
        """One of `values`, uniformly or by weights."""

    def uniform(self, low: float = 0, high: float = 1) -> float:
        """A number in [low, high)."""

    def strengths(self, low: float, high: float, count: int) -> torch.Tensor:
        """One number in [low, high) per image, [count] float32 on the CPU."""

    def normal(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """A standard normal field."""

    def poisson(self, levels: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """Counts of rate level n / 255 for integer `levels` [B,C,H,W] in 0..255 and n [B], float32 on their device."""


class SeededDraws:
    """Draws for one image: scalars from numpy's PCG64, fields from a torch generator on the field's device.

    The scalars of a seed (an integer >= 0) are the same on every device; the fields are the device's own.
    """

    always_coloured = False

    def __init__(self, seed: int):
        scalars, fields = np.random.SeedSequence(seed).spawn(2)
        self._scalars = np.random.Generator(np.random.PCG64(scalars))
        self._field_seed = int(fields.generate_state(1, np.uint64)[0] >> np.uint64(1))
        self._fields: torch.Generator | None = None

    def _generator(self, device: torch.device) -> torch.Generator:
        if self._fields is None:
            self._fields = torch.Generator(device).manual_seed(self._field_seed)
        return self._fields

    def pick(self, values, weights=None):
        u = self._scalars.random()
        if weights is None:
            return values[int(u * len(values))]
        edges = np.cumsum(np.asarray(weights, dtype=np.float64))
        return values[min(int(np.searchsorted(edges, u * edges[-1], side="right")), len(values) - 1)]

    def uniform(self, low=0, high=1):
        return low + (high - low) * self._scalars.random()

    def strengths(self, low, high, count):
        return torch.tensor([self.uniform(low, high) for _ in range(count)])

    def normal(self, shape, device):
        return torch.randn(tuple(shape), generator=self._generator(device), device=device)

    def poisson(self, levels, n):
        generator = self._generator(levels.device)
        if levels.device.type != "cpu":
            return torch.poisson(levels / 255 * n.to(levels.device).view(-1, 1, 1, 1), generator=generator)
        return torch.stack([poisson_counts(*pair, generator) for pair in zip(levels, n.tolist(), strict=True)])


class ReleasedDraws:
    """Draws as the releases make them after seeding `random`, numpy and torch with one number.

    Choices come from Python's stream, structure from numpy's, strengths and fields from torch's (always the CPU's).
    """

    always_coloured = True

    def __init__(self, seed: int):
        self._python = random.Random(seed)
        self._numpy = np.random.RandomState(seed)
        self._torch = torch.Generator().manual_seed(seed)

    def flip(self) -> bool:
        """Whether the release mirrors the image, drawn before everything else."""
        return self._python.random() < 0.5

    def pick(self, values, weights=None):
        return self._python.choice(values) if weights is None else self._python.choices(values, weights)[0]

    def uniform(self, low=0, high=1):
        return self._numpy.uniform(low, high)

    def strengths(self, low, high, count):
        return torch.rand(count, generator=self._torch) * (high - low) + low

    def normal(self, shape, device):
        return torch.randn(tuple(shape), generator=self._torch).to(device)

    def poisson(self, levels, n):
        rate = levels.cpu() / 255 * n.cpu().view(-1, 1, 1, 1)
        return torch.poisson(rate, generator=self._torch).to(levels.device)
