"""Intervals by resampling images, and what they say about a claim."""

from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
VERDICTS = ("appears", "opposite", "not resolved")


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its interval."""

    mean: float
    low: float
    high: float


def interval(values: np.ndarray, seed: int = 0, draws: int = DRAWS, level: float = LEVEL) -> Estimate:
    """Mean of `values` (images,) and the percentile bootstrap interval of it: `draws` resamples of the images."""
    values = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    means = values[chosen].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Difference:
    """A paired difference a - b over images: for each training seed, and for their mean, which the verdict is about."""

    overall: Estimate
    seeds: list[Estimate]


def paired(a: np.ndarray, b: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Difference:
    """Difference of two rows of values (training seeds, images), the k-th seed's with the k-th seed's, image by image.

    Images are resampled, pairs kept. The overall difference of an image is the mean over the seeds.
    """
    differences = np.atleast_2d(a) - np.atleast_2d(b)
    seeds = [interval(row, seed, draws) for row in differences]
    return Difference(interval(differences.mean(axis=0), seed, draws), seeds)


def verdict(found: Difference, expected: str, within: float = 0.0) -> str:
    """'appears', 'opposite' or 'not resolved': does the interval lie where the claim has it?

    expected: 'higher' or 'lower' (the interval lies on that side of 0, or on the other, or holds 0), or 'unchanged' (it
    lies within +-`within`, or outside, or neither). Training seeds whose differences disagree in sign resolve nothing.
    """
    low, high = found.overall.low, found.overall.high
    if expected == "unchanged":
        if -within <= low and high <= within:
            return "appears"
        return "opposite" if low > within or high < -within else "not resolved"
    signs = {np.sign(estimate.mean) for estimate in found.seeds}
    if len(signs) > 1 or low <= 0 <= high:
        return "not resolved"
    return "appears" if (low > 0) == (expected == "higher") else "opposite"
