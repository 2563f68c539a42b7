"""Intervals by resampling, and what they say about a claim: over images, and over training seeds and images."""

import math
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
UNRESOLVED = "not resolvable at this budget"
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % points of Student's t for 1 to 9 degrees of freedom; the last serves for more."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval."""

    mean: float
    low: float
    high: float


def interval(values: np.ndarray) -> Estimate:
    """Mean of `values` (images,) and the percentile bootstrap interval of it, by resamples of the images."""
    return hierarchical(np.asarray(values)[None])


def hierarchical(values: np.ndarray) -> Estimate:
    """Mean of `values` (training seeds, images) and its percentile bootstrap interval.

    Each of DRAWS resamples draws seeds and images with replacement, independently: all seeds restore the same images.
    """
    values = np.asarray(values, dtype=np.float64)
    seeds, images = values.shape
    random = np.random.default_rng(0)
    chosen = random.integers(0, images, (DRAWS, images))
    means = np.empty((DRAWS, seeds))
    for row in range(seeds):
        means[:, row] = values[row][chosen].mean(axis=1)
    if seeds > 1:
        means = np.take_along_axis(means, random.integers(0, seeds, (DRAWS, seeds)), axis=1)
    low, high = np.quantile(means.mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Difference:
    """A difference of two rows over training seeds and images."""

    overall: Estimate
    seeds: tuple[float, ...]
    """The mean of each training seed."""

    @property
    def least(self) -> float:
        """The smallest difference that these seeds resolve: half of their 95 % interval by Student's t; inf for one.

        Resampling a few seeds makes intervals too narrow, which this makes up for.
        """
        if len(self.seeds) < 2:
            return math.inf
        factor = STUDENT[min(len(self.seeds) - 1, len(STUDENT)) - 1]
        return float(factor * np.std(self.seeds, ddof=1) / math.sqrt(len(self.seeds)))


def paired(a: np.ndarray, b: np.ndarray) -> Difference:
    """a - b, both (training seeds, images): the k-th seed's with the k-th seed's, image by image."""
    differences = np.atleast_2d(a) - np.atleast_2d(b)
    return Difference(hierarchical(differences), tuple(differences.mean(axis=1).tolist()))


def verdict(difference: Difference, expected: str) -> str:
    """'appears', 'opposite' or UNRESOLVED: is the first row's value 'higher' or 'lower', as `expected`?

    Resolved is what lies beyond 0 in the interval over seeds and images, and beyond what the seeds' spread allows.
    """
    e = difference.overall
    beyond = e.low > 0 or e.high < 0
    if not beyond or abs(e.mean) <= difference.least:  # NaN is neither
        return UNRESOLVED
    return "appears" if (e.mean > 0) == (expected == "higher") else "opposite"
