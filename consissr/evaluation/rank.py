"""Average rank of methods over metrics (last column of Table 1, ConsisSR), and best and second best per metric."""

from collections.abc import Mapping
from math import nan

import numpy as np

from consissr.evaluation.protocols import Measure


def ranks(values: np.ndarray, higher: bool) -> np.ndarray:
    """1 for the best; equal values share the better rank (two firsts, then a third); NaN stays NaN."""
    values = np.asarray(values, dtype=np.float64)
    signed = -values if higher else values
    better = (signed[None, :] < signed[:, None]).sum(axis=1)
    return np.where(np.isnan(values), nan, better + 1.0)


def average_ranks(table: Mapping[str, Mapping[str, float]], measures: list[Measure]) -> dict[str, float]:
    """`table[method][metric]` -> mean rank per method, over the metrics that every method has."""
    methods = list(table)
    columns = []
    for measure in measures:
        values = np.array([table[method].get(measure.name, nan) for method in methods])
        if not np.isnan(values).any():
            columns.append(ranks(values, measure.higher))
    if not columns:
        return dict.fromkeys(methods, nan)
    return dict(zip(methods, np.mean(columns, axis=0).tolist(), strict=True))


def places(values: list[float], higher: bool) -> list[int]:
    """1 for every best value, 2 for every second best, 0 for the rest; all 0 when there are fewer than two values."""
    known = sorted({value for value in values if value == value}, reverse=higher)
    if len(known) < 2:
        return [0] * len(values)
    return [known.index(value) + 1 if value in known[:2] else 0 for value in values]
