"""The papers' tables: complete, consistent, and printed beside measured values."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from ccsr import nuts_plan
from consissr.errors import UserError
from consissr.evaluation import produce
from consissr.evaluation.tables import Cell, available, comparison, load_table

TABLES = Path(__file__).resolve().parents[2] / "configs" / "tables"
EXPECTED = {
    *(f"consissr/{name}" for name in ("table1", "table2", "table3", "table4")),
    *(f"consissr/figure{number}" for number in (2, 4, 6, 7, 8)),
    *(f"ccsr/table{number}" for number in range(1, 8)),
    *(f"ccsr/figure{number}" for number in (1, 2, 4, 5, 6, 7)),
    "ccsr/figure2-pictures",
}


def test_every_table_and_figure_is_there() -> None:
    assert {name for name in available(TABLES) if not name.startswith("nano/")} == EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_tables_load_and_say_how_they_are_made(name: str) -> None:
    table = load_table(name, TABLES)
    assert table.kind == "figure" or table.datasets
    for rows in table.datasets.values():
        assert set(table.ours) <= set(rows)
    for entry in table.misprints:
        datasets = [entry["dataset"]] if "dataset" in entry else list(table.datasets)
        assert all(entry["row"] in table.datasets[dataset] for dataset in datasets)
        assert entry.get("column", table.columns[0]) in table.columns
    assert f"--table {name}" in (TABLES / f"{name}.yaml").read_text().split("title:")[0]


def cell(name: str, dataset: str, row: str, column: str) -> Cell:
    return load_table(name, TABLES).datasets[dataset][row][column]


def test_known_values() -> None:
    assert cell("ccsr/table6", "RealSR", "OSEDiff-S1", "psnr").value == 25.15
    assert cell("ccsr/table4", "RealSR", "CCSR-S2", "psnr") == Cell(25.86, 0.3032, 2)
    assert cell("ccsr/table4", "DIV2K", "BSRGAN", "fid").value == 44.22
    assert math.isnan(cell("ccsr/table4", "DIV2K", "BSRGAN", "l-std").value)
    assert cell("consissr/table1", "RealSR", "Ours", "niqe").value == 5.2655
    assert cell("consissr/table3", "RealSR", "+HPA(ours)", "delta-clip-i").value == 0.0147
    assert cell("ccsr/table7", "512x512", "CCSR-S1", "params").value == 1.65


@pytest.mark.parametrize("dataset", ["DIV2K", "RealSR", "DrealSR"])
def test_rows_that_tables_share_differ_only_where_noted(dataset: str) -> None:
    """CCSR's own rows stand in Tables IV to VI."""
    tables = [load_table(f"ccsr/table{number}", TABLES) for number in (4, 5, 6)]
    for row in ("CCSR-S2", "CCSR-S1"):
        for column in tables[0].columns:
            texts = [str(table.datasets[dataset][row][column]) for table in tables]
            noted = any(
                entry["row"] == row and entry.get("column") == column and entry["dataset"] == dataset
                for entry in tables[2].misprints
            )
            assert noted or len(set(texts)) == 1, (row, column, texts)


def test_the_values_that_settle_the_colours_of_consissr_s_psnr() -> None:
    """Its StableSR and PASD rows equal CCSR's, which are on Y, to 0.01 dB on RealSR."""
    for ours, theirs in (("StableSR", "StableSR-S200"), ("PASD", "PASD-S20")):
        difference = cell("consissr/table1", "RealSR", ours, "psnr").value
        difference -= cell("ccsr/table4", "RealSR", theirs, "psnr").value
        assert abs(difference) < 0.011


def test_measured_stands_below_published() -> None:
    table = load_table("ccsr/table3", TABLES)
    measured = {"(1/2,1/6,2)": {"psnr": Cell(26.0, 0.25, 2)}, "nano": {"psnr": Cell(25.5, digits=2)}}
    lines = comparison(table, "RealSR", measured).splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("| (1/2,1/6,2) | published"))
    assert "26.29/0.2594" in lines[row] and "6.39/0.0090 [1]" in lines[row]
    assert lines[row + 1].startswith("| (1/2,1/6,2) | measured | 26.00/0.2500 | - ")
    assert any(line.startswith("| nano | measured | 25.50 |") for line in lines)
    assert "[1] The G-STD 0.0090 repeats DISTS's." in lines
    assert any("(1/2 - 1/6) 6 + 1 = 3" in line for line in lines)


@pytest.mark.parametrize("name", sorted(name for name in EXPECTED if "table" in name))
def test_every_published_row_is_printed(name: str) -> None:
    table = load_table(name, TABLES)
    for dataset, rows in table.datasets.items():
        text = comparison(table, dataset, {})
        assert all(f"| {row} | published |" in text for row in rows)
        assert all(entry["note"] in text for entry in table.misprints if entry.get("dataset", dataset) == dataset)


def test_mistakes_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'ccsr/table6'"):
        load_table("ccsr/tabel6", TABLES)
    with pytest.raises(UserError, match="add --dataset"):
        load_table("ccsr/table6", TABLES).dataset("")
    with pytest.raises(UserError, match="did you mean 'RealSR'"):
        load_table("ccsr/table6", TABLES).dataset("RealRS")
    (tmp_path / "x.yaml").write_text("title: x\nkind: quality\nmetrics: [psnr]\ndatasets: {A: {r: 1 2}}\n")
    with pytest.raises(UserError, match="row 'r' of A has 2 values"):
        load_table("x", tmp_path)
    (tmp_path / "y.yaml").write_text("title: x\nkind: quality\ncolour: red\n")
    with pytest.raises(UserError, match="colour"):
        load_table("y", tmp_path)


def test_rows_of_ours_are_planned() -> None:
    table = load_table("ccsr/table1", TABLES)
    assert produce.models_by_row(table, ["nano-ccsr"]) == {"CCSR-S2": "nano-ccsr"}, "variants need models of their own"
    assert produce.models_by_row(table, ["V2=runs/nuts", "CCSR-S2=runs/deft"]) == {
        "V2": "runs/nuts",
        "CCSR-S2": "runs/deft",
    }
    with pytest.raises(UserError, match="no row of ours"):
        produce.models_by_row(table, ["V9=x"])
    assert produce.models_by_row(None, ["nano-ccsr", "B=runs/deft"]) == {"nano-ccsr": "nano-ccsr", "B": "runs/deft"}
    with pytest.raises(UserError, match="two models to run are called 'deft'"):
        produce.models_by_row(None, ["a/deft", "b/deft"])
    with pytest.raises(UserError, match="two models to run are called 'CCSR-S2'"):
        produce.models_by_row(load_table("ccsr/table6", TABLES), ["ccsr-v2", "nano-ccsr"])


def test_training_may_import_the_metrics_cheaply() -> None:
    code = (
        "import sys, consissr.evaluation.metrics; print([m for m in ('pyiqa', 'basicsr', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"


def test_table_two_s_rows_are_what_they_are_called() -> None:
    """(T, S): the grid's steps, and the evaluations that NUTS makes of it at t_max 2/3 and t_min 1/2."""
    for name, row in load_table("ccsr/table2", TABLES).ours.items():
        flags = dict(zip(row["flags"][::2], row["flags"][1::2], strict=True))
        T, S = map(int, name.strip("()").split(","))
        assert (int(flags["--steps"]), flags["--t-max"], flags["--t-min"]) == (T, "0.6667", "0.5")
        assert len(nuts_plan(T, 0.6667, 0.5)) == S
