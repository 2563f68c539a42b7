"""Average rank of methods over metrics (last column of Table 1, ConsisSR), and best and second best per metric."""

from collections.abc import Mapping
from math import isnan, nan

import numpy as np

from consissr.evaluation.protocols import Measure


def ranks(values: np.ndarray, higher: bool) -> np.ndarray:
    """1 for the best; equal values share the better rank (two firsts, then a third); NaN stays NaN."""
    values = np.asarray(values, dtype=np.float64)
    signed = -values if higher else values
    better = (signed[None, :] < signed[:, None]).sum(axis=1)
    return np.where(np.isnan(values), nan, better + 1.0)


def had_by_all(table: Mapping[str, Mapping[str, float]], measures: list[Measure]) -> list[Measure]:
    """The measures of which every method of `table[method][metric]` has a value."""
    return [m for m in measures if not any(isnan(values.get(m.name, nan)) for values in table.values())]


def average_ranks(table: Mapping[str, Mapping[str, float]], measures: list[Measure]) -> dict[str, float]:
    """`table[method][metric]` -> mean rank per method, over the metrics that every method has."""
    columns = [ranks([values[m.name] for values in table.values()], m.higher) for m in had_by_all(table, measures)]
    if not columns:
        return dict.fromkeys(table, nan)
    return dict(zip(table, np.mean(columns, axis=0).tolist(), strict=True))


def places(values: list[float], higher: bool) -> list[int]:
    """1 for every best value, 2 for every second best, 0 for the rest; all 0 when there are fewer than two values."""
    known = sorted({value for value in values if value == value}, reverse=higher)
    if len(known) < 2:
        return [0] * len(values)
    return [known.index(value) + 1 if value in known[:2] else 0 for value in values]
