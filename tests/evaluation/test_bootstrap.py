"""Paired differences, their intervals over seeds and images, and the verdicts, against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from consissr.evaluation import bootstrap
from consissr.evaluation.bootstrap import UNRESOLVED


def test_intervals_by_hand() -> None:
    """Two images: a resample's mean is 0, 1 or 2 with probabilities 1/4, 1/2, 1/4, so 95 % reach from 0 to 2."""
    found = bootstrap.interval(np.array([0.0, 2.0]))
    assert (found.mean, found.low, found.high) == (1.0, 0.0, 2.0)
    same = bootstrap.interval(np.full(7, 3.5))
    assert (same.mean, same.low, same.high) == (3.5, 3.5, 3.5)
    values = np.random.default_rng(1).normal(5, 2, 400)
    wide = bootstrap.interval(values)
    error = 1.96 * values.std() / 20
    assert wide.low == pytest.approx(values.mean() - error, abs=0.03)
    assert wide.high == pytest.approx(values.mean() + error, abs=0.03)
    assert bootstrap.interval(values) == wide, "seeded"


def test_the_interval_is_that_of_10000_seeded_resamples() -> None:
    values = np.random.default_rng(2).normal(0, 1, 5)
    means = values[np.random.default_rng(0).integers(0, 5, (10_000, 5))].mean(1)
    found = bootstrap.interval(values)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=1e-12)
    single = values.astype(np.float32)
    assert bootstrap.interval(single) == bootstrap.interval(single.astype(np.float64)), "in float64"


def test_seeds_are_drawn_as_images_are() -> None:
    """Two seeds that differ on every image by 2: images say nothing of it, seeds give 0, 1 or 2 as above."""
    found = bootstrap.hierarchical(np.array([[0.0] * 50, [2.0] * 50]))
    assert (found.mean, found.low, found.high) == (1.0, 0.0, 2.0)
    random = np.random.default_rng(2)
    seeds, images = random.normal(0, 1, (40, 1)), random.normal(0, 2, (1, 200))
    found = bootstrap.hierarchical(seeds + images)
    error = 1.96 * math.hypot(seeds.std() / math.sqrt(40), images.std() / math.sqrt(200))
    assert found.high - found.mean == pytest.approx(error, rel=0.05), "both variances add up"


def test_differences_are_paired_image_by_image_and_seed_by_seed() -> None:
    b = np.array([[10.0, 20.0, 30.0], [11.0, 22.0, 33.0]])
    found = bootstrap.paired(b + [[1.0], [3.0]], b)
    assert found.seeds == pytest.approx((1.0, 3.0))
    assert (found.overall.mean, found.overall.low, found.overall.high) == pytest.approx((2.0, 1.0, 3.0))


def test_the_least_difference_is_student_s() -> None:
    """Seeds 1, 2 and 3: standard deviation 1, so half of the 95 % interval is 4.303 / sqrt(3)."""
    found = bootstrap.paired(np.array([[1.0] * 4, [2.0] * 4, [3.0] * 4]), np.zeros((3, 4)))
    assert found.least == pytest.approx(4.303 / math.sqrt(3))
    assert bootstrap.paired(np.ones(4), np.zeros(4)).least == math.inf


def test_verdicts() -> None:
    cases = [
        ([[1.0, 2.0, 3.0]], "higher", UNRESOLVED),  # one training of each may be chance
        ([[2.0, 2.1, 2.2], [2.1, 2.2, 2.3]], "higher", "appears"),
        ([[2.0, 2.1, 2.2], [2.1, 2.2, 2.3]], "lower", "opposite"),
        ([[-2.0, -2.1, -2.2], [-2.1, -2.2, -2.3]], "lower", "appears"),
        ([[3.0, 3.0, 3.0], [1.0, 1.0, 1.0]], "higher", UNRESOLVED),  # Student's t of two such seeds holds 0
        ([[3.0, 3.0, 3.0], [-1.0, -1.0, -1.0]], "higher", UNRESOLVED),
        ([[-4.0, 1.0, 4.1], [-4.0, 1.0, 4.2]], "higher", UNRESOLVED),  # images disagree
        ([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], "higher", UNRESOLVED),
        ([[np.nan, 1.0, 2.0], [1.0, 1.0, 2.0]], "higher", UNRESOLVED),
    ]
    for differences, expected, said in cases:
        found = bootstrap.paired(np.array(differences), np.zeros_like(differences))
        assert bootstrap.verdict(found, expected) == said, differences


def test_verdicts_at_their_limits() -> None:
    """An interval that touches 0, and a difference as large as the least that the seeds resolve, say nothing."""
    apart = bootstrap.paired(np.array([[1.0], [3.0]]), np.zeros((2, 1))).least  # 12.706 sqrt(2) / sqrt(2)
    assert apart == pytest.approx(12.706)
    cases = [
        ((0.3, 0.1, 0.5), (0.3, 0.3), "appears"),
        ((-0.3, -0.5, -0.1), (-0.3, -0.3), "opposite"),
        ((0.3, 0.0, 0.5), (0.3, 0.3), UNRESOLVED),
        ((-0.3, -0.5, 0.0), (-0.3, -0.3), UNRESOLVED),
        ((0.3, -0.1, 0.5), (0.3, 0.3), UNRESOLVED),
        ((apart, 0.1, 20.0), (1.0, 3.0), UNRESOLVED),
        ((1.001 * apart, 0.1, 20.0), (1.0, 3.0), "appears"),
    ]
    for estimate, seeds, said in cases:
        difference = bootstrap.Difference(bootstrap.Estimate(*estimate), seeds)
        assert bootstrap.verdict(difference, "higher") == said, estimate
