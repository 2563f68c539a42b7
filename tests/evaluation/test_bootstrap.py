"""Paired differences, their bootstrap intervals and the verdicts, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from consissr.evaluation import bootstrap


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


def test_differences_are_paired_image_by_image_and_seed_by_seed() -> None:
    b = np.array([[10.0, 20.0, 30.0], [11.0, 22.0, 33.0]])
    found = bootstrap.paired(b + [[1.0], [3.0]], b)
    assert [e.mean for e in found.seeds] == pytest.approx([1.0, 3.0])
    assert (found.overall.mean, found.overall.low, found.overall.high) == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.parametrize(
    ("differences", "expected", "said"),
    [
        ([[1.0, 2.0, 3.0]], "higher", "appears"),
        ([[1.0, 2.0, 3.0]], "lower", "opposite"),
        ([[-1.0, -2.0, -3.0]], "lower", "appears"),
        ([[-4.0, 1.0, 4.0]], "higher", "not resolved"),
        ([[3.0, 3.0, 3.0], [-1.0, -1.0, -1.0]], "higher", "not resolved"),  # the training seeds disagree
        ([[3.0, 3.0, 3.0], [1.0, 1.0, 1.0]], "higher", "appears"),
        ([[0.0, 0.0, 0.0]], "unchanged", "appears"),
        ([[0.0, 0.0, 0.0]], "higher", "not resolved"),
        ([[0.2, 0.3, 0.4]], "unchanged", "opposite"),
        ([[0.0, 0.0, 0.4]], "unchanged", "not resolved"),
        ([[0.0001, 0.0002, 0.0003]], "higher", "not resolved"),  # too little to count
        ([[0.02, 0.03, 0.04]], "higher", "appears"),
        ([[-0.02, -0.03, -0.04]], "higher", "opposite"),
        ([[0.005, 0.02, 0.06]], "higher", "not resolved"),  # the interval holds what does not count
        ([[np.nan, 1.0, 2.0]], "higher", "not resolved"),
        ([[np.nan, 1.0, 2.0]], "lower", "not resolved"),
        ([[np.nan, 0.0, 0.0]], "unchanged", "not resolved"),
    ],
)
def test_verdicts(differences: list, expected: str, said: str) -> None:
    found = bootstrap.paired(np.array(differences), np.zeros_like(differences))
    assert bootstrap.verdict(found, expected, least=0.01) == said
    noted = bootstrap.verdict(found, expected, least=0.01, one_seed=True)
    assert noted == (said if said == "not resolved" else f"{said} (one training seed)")
