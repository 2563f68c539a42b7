"""Intervals by resampling images, and what they say about a claim."""

import math
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
ONE_SEED = " (one training seed)"
"""Follows a verdict behind which one training of each model stands: it may be training noise."""


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


def verdict(found: Difference, expected: str, least: float, one_seed: bool = False) -> str:
    """'appears', 'opposite' or 'not resolved': does the interval lie where the claim has it?

    expected: 'higher' or 'lower' (the interval lies beyond `least` on that side of 0, or on the other, or neither), or
    'unchanged' (it lies within +-`least`, or outside, or neither). `least` is the smallest difference that counts, in
    the metric's unit. Training seeds whose differences disagree in sign resolve nothing, nor does a NaN.
    one_seed: whether one training of each model is all there is, which the verdict then says.
    """
    low, high = found.overall.low, found.overall.high
    if math.isnan(low) or math.isnan(high):
        return "not resolved"
    note = ONE_SEED if one_seed else ""
    if expected == "unchanged":
        if -least <= low and high <= least:
            return "appears" + note
        return "opposite" + note if low > least or high < -least else "not resolved"
    signs = {np.sign(estimate.mean) for estimate in found.seeds}
    if len(signs) > 1 or (low <= least and high >= -least):
        return "not resolved"
    return ("appears" if (low > 0) == (expected == "higher") else "opposite") + note
