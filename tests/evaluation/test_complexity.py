"""Parameters and multiply-accumulates at full SD2.1 size, against the papers."""

from pathlib import Path

import pytest

from consissr.evaluation import complexity
from consissr.evaluation.produce import Timing
from consissr.evaluation.tables import load_table

TABLES = Path(__file__).resolve().parents[2] / "configs" / "tables"


def test_ccsr_has_the_published_parameters() -> None:
    parts = complexity.networks_of("ccsr")
    assert sum(map(complexity.parameters, parts.values())) == 1_653_106_027
    table = load_table("ccsr/table7", TABLES)
    rows = complexity.measured_rows(table)
    for row, cells in rows.items():
        published = table.datasets["512x512"][row]
        assert str(cells["params"]) == str(published["params"]) and str(cells["steps"]) == str(published["steps"])


def test_a_model_that_ran_is_named_and_has_no_parameters_of_the_full_size() -> None:
    timings = {"CCSR-S2": Timing(7.0, "nano-ccsr in fp32 on cpu")}
    text = complexity.comparison(load_table("ccsr/table7", TABLES), "512x512", timings)
    assert "| CCSR-S2 | measured | 2 | 7.00 | - |" in text and "| CCSR-S1 | measured | 1 | - | 1.65 |" in text
    assert "- CCSR-S2, measured: nano-ccsr in fp32 on cpu;" in text


def test_consissr_has_the_published_work() -> None:
    table = load_table("consissr/table2", TABLES)
    cells = complexity.measured_rows(table)["Ours"]
    assert cells["macs"].value == pytest.approx(table.datasets["512x512"]["Ours"]["macs"].value, rel=0.015)
    text = complexity.comparison(table, "512x512")
    assert (
        "| Ours | measured | 50 |" in text and "| unet | 917.6 M parameters |" in text and "decoder, one pass" in text
    )
