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


def test_the_interval_is_that_of_10000_seeded_resamples() -> None:
    values = np.random.default_rng(2).normal(0, 1, (2, 5)).astype(np.float32)

    def wanted(row: np.ndarray, seed: int, draws: int, low: float = 0.025, high: float = 0.975) -> tuple:
        means = row.astype(float)[np.random.default_rng(seed).integers(0, 5, (draws, 5))].mean(1)
        return pytest.approx((row.astype(float).mean(), *np.quantile(means, [low, high])), rel=1e-12)

    def numbers(found: bootstrap.Estimate) -> tuple:
        return found.mean, found.low, found.high

    assert numbers(bootstrap.interval(values[0])) == wanted(values[0], 0, 10_000)
    assert numbers(bootstrap.interval(values[0], 3, 50, level=0.8)) == wanted(values[0], 3, 50, 0.1, 0.9)
    found, default = bootstrap.paired(values, values * 0, 3, 50), bootstrap.paired(values, values * 0)
    for row, few, many in zip(values, found.seeds, default.seeds, strict=True):
        assert (numbers(few), numbers(many)) == (wanted(row, 3, 50), wanted(row, 0, 10_000))
    mean = values.mean(axis=0)
    assert (numbers(found.overall), numbers(default.overall)) == (wanted(mean, 3, 50), wanted(mean, 0, 10_000))


def test_a_difference_of_just_the_least_does_not_count() -> None:
    """Intervals that end at +-0.5, where 0.5 is the least that counts, and one on both sides."""
    cases = {(0.5, 0.5): "appears", (-0.5, -0.5): "appears", (0.5, 0.9): "not resolved", (-0.9, -0.5): "not resolved"}
    cases |= {
        (-0.6, 0.3): "not resolved",
        (-0.3, 0.6): "not resolved",
        (0.6, 0.9): "opposite",
        (-0.9, -0.6): "opposite",
    }
    for (low, high), said in cases.items():
        found = bootstrap.paired(np.array([[low, high]]), np.zeros((1, 2)))
        assert bootstrap.verdict(found, "unchanged", least=0.5) == said, (low, high)
        direction = "higher" if low > 0 else "lower"
        assert bootstrap.verdict(found, direction, 0.5) == ("appears" if said == "opposite" else "not resolved")


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
