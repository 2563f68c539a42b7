"""Average ranks, and the places that tables mark."""

import math
from pathlib import Path

import numpy as np
import pytest

from consissr.evaluation.protocols import get_measures
from consissr.evaluation.rank import average_ranks, places, ranks
from consissr.evaluation.tables import load_table


@pytest.mark.parametrize("dataset", ["DrealSR", "RealSR", "DIV2K"])
def test_the_published_average_ranks_recompute(root: Path, dataset: str) -> None:
    """All 21 of ConsisSR's Table 1."""
    table = load_table("consissr/table1", root / "configs" / "tables")
    rows = table.datasets[dataset]
    values = {row: {metric: cells[metric].value for metric in table.metrics} for row, cells in rows.items()}
    computed = average_ranks(values, get_measures(table.metrics))
    assert len(rows) == 7
    for row, cells in rows.items():
        assert computed[row] == pytest.approx(cells["rank"].value, abs=0.005), row


def test_equal_values_share_the_better_rank() -> None:
    assert ranks([3, 1, 3, 2], higher=True).tolist() == [1, 4, 1, 3]
    assert ranks([3, 1, 3, 2], higher=False).tolist() == [3, 1, 3, 2]
    assert ranks([3, math.nan, 1], higher=True).tolist() == pytest.approx([1, math.nan, 2], nan_ok=True)
    assert ranks(np.array([0, 3], np.uint8), higher=True).tolist() == [2, 1]


def test_places_mark_best_and_second() -> None:
    assert places([3.0, 1.0, 2.0, 3.0], higher=True) == [1, 0, 2, 1]
    assert places([3.0, 1.0, math.nan], higher=False) == [2, 1, 0]
    assert places([3.0], higher=True) == [0]


def test_a_metric_that_a_method_lacks_does_not_rank() -> None:
    measures = get_measures(["psnr", "niqe"])
    table = {"a": {"psnr": 20.0, "niqe": 4.0}, "b": {"psnr": 30.0, "niqe": math.nan}}
    assert average_ranks(table, measures) == {"a": 2.0, "b": 1.0}
    assert average_ranks({"a": {"psnr": 20.0, "niqe": 4.0}, "b": {"psnr": 30.0}}, measures) == {"a": 2.0, "b": 1.0}
    assert average_ranks({"a": {"psnr": 20.0}, "b": {}}, measures) == pytest.approx(
        {"a": math.nan, "b": math.nan}, nan_ok=True
    )
