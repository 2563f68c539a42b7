"""The papers' tables as data (configs/tables), and measured values printed beside the published ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from consissr.config.loading import nearest
from consissr.errors import UserError
from consissr.evaluation.datasets import TEST_SETS, check_test_set
from consissr.evaluation.evaluate import Evaluation
from consissr.evaluation.protocols import MEASURES, get_measures
from consissr.evaluation.rank import average_ranks

LABELS = {
    "rank": "Rank ↓", "l-std": "L-STD ↓", "steps": "Steps", "macs": "MACs", "params": "Parameters", "seconds": "Time",
}  # fmt: skip
KINDS = ("quality", "complexity", "figure", "study")


@dataclass(frozen=True)
class Cell:
    """A value, its G-STD where there is one, and the digits it is printed with; NaN prints as a dash."""

    value: float = math.nan
    spread: float = math.nan
    digits: int = 4

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        return f"{self.value:.{self.digits}f}" + ("" if math.isnan(self.spread) else f"/{self.spread:.4f}")

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """ "25.86/0.3032" or "25.86/-" or "-"."""
        value, _, spread = text.partition("/")
        numbers = [math.nan if part in ("", "-") else float(part) for part in (value, spread)]
        return cls(*numbers, digits=len(value.partition(".")[2]))


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table or figure of a paper; the fields of its file."""

    name: str
    title: str
    kind: str
    """'quality', 'complexity' or 'figure' of a paper, or 'study': results of scripts/study.py beside the papers'."""
    datasets: dict[str, dict[str, dict[str, Cell]]] = field(default_factory=dict)
    """Published cells (a study's: recorded ones) by data set, row and column."""
    protocol: str = "ccsr"
    runs: int = 1
    """Runs with different noise that each published value averages."""
    metrics: list[str] = field(default_factory=list)
    last: str = ""
    """A column after the metrics: 'rank' or 'l-std'."""
    units: dict[str, str] = field(default_factory=dict)
    ours: dict[str, dict] = field(default_factory=dict)
    """How rows of ours come about: flags of infer.py, or the inputs of the complexity table."""
    figure: str = ""
    """For figures: what to draw (see `figures.py`)."""
    notes: list[str] = field(default_factory=list)
    misprints: list[dict[str, str]] = field(default_factory=list)
    findings: list[dict[str, str | float]] = field(default_factory=list)
    """For studies: the comparisons of rows, with differences, intervals and verdicts."""

    @property
    def columns(self) -> list[str]:
        return self.metrics + [self.last] * bool(self.last)

    def dataset(self, name: str) -> str:
        """`name` checked, or the only data set when `name` is empty."""
        if not name and len(self.datasets) == 1:
            return next(iter(self.datasets))
        if name not in self.datasets:
            given = f"has no data set '{name}'" if name else "covers several data sets: add --dataset"
            raise UserError(f"{self.name} {given}{nearest(name, list(self.datasets))}")
        return name


def available(folder: Path) -> list[str]:
    """Names of all tables below `folder`, such as 'consissr/table1'."""
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def load_table(name: str, folder: Path) -> Table:
    """Read and check the table `name` below `folder`."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"unknown table '{name}'{nearest(name, available(folder))}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    published = content.pop("datasets", {})
    unknown = content.keys() - Table.__dataclass_fields__.keys()
    if unknown or content.get("kind") not in KINDS:
        raise UserError(f"{path}: kind must be one of {', '.join(KINDS)}; unknown fields: {sorted(unknown) or 'none'}")
    table = Table(name=name, **content)
    for dataset, rows in published.items():
        table.datasets[dataset] = {}
        for row, text in rows.items():
            cells = [Cell.parse(part) for part in str(text).split()]
            if len(cells) != len(table.columns):
                raise UserError(f"{path}: row '{row}' of {dataset} has {len(cells)} values for {table.columns}")
            table.datasets[dataset][row] = dict(zip(table.columns, cells, strict=True))
    return table


def measured_cells(evaluation: Evaluation, table: Table) -> dict[str, dict[str, Cell]]:
    """The table's columns, measured, by method."""
    rows = {}
    measures = [m for m in get_measures(table.metrics) if m.name not in evaluation.unavailable]
    names = [method.name for method in evaluation.pairs.methods]
    means = {name: {m.name: evaluation.mean(name, m.name) for m in measures} for name in names}
    ranked = [method.name for method in evaluation.pairs.methods if method.ranked]
    averages = average_ranks({name: means[name] for name in ranked}, measures) if len(ranked) > 1 else {}
    for name in names:
        cells = {m.name: Cell(means[name][m.name], evaluation.global_std(name, m.name), m.digits) for m in measures}
        if table.last == "l-std":
            cells["l-std"] = Cell(evaluation.mean_local_std(name))
        elif table.last == "rank" and name in averages:
            cells["rank"] = Cell(averages[name], digits=2)
        rows[name] = cells
    return rows


def measured_notes(evaluation: Evaluation, table: Table, dataset: str, hr: Path | None) -> list[str]:
    """What was measured: how many images of which set, what is missing and why, and other numbers of runs.

    hr: folder of the references.
    """
    own, columns = len(evaluation.pairs.images), [m for m in table.metrics if m in evaluation.unavailable]
    lines = [f"Measured: {own} images" + (f" of {hr}" if hr else "") + f"; protocol {evaluation.protocol.name}."]
    if dataset in TEST_SETS and hr and (problems := check_test_set(dataset, hr, None)):
        lines[0] += (
            f" This is not the test set of the published values ({'; '.join(p.split(': ', 1)[1] for p in problems)})."
        )
    lines += [f"{metric} is not measured: {evaluation.unavailable[metric]}." for metric in columns]
    if aside := [m.name for m in evaluation.pairs.methods if not m.ranked]:
        lines.append(f"Models of another size than the published ones: {', '.join(aside)}; their rows are not ranked.")
    if "st-lpips" not in table.metrics and any("st-lpips" in values for values in evaluation.values.values()):
        told = ", ".join(f"{m.name} {evaluation.mean(m.name, 'st-lpips'):.3f}" for m in evaluation.pairs.methods)
        lines.append(f"ST-LPIPS, a learned distance (lower is closer; not the table's LPIPS): {told}.")
    return lines + [
        f"{method.name}: {len(method.runs)} runs, the published values are of {table.runs}; G-STD and L-STD divide by "
        "the number of runs and come out smaller for few."
        for method in evaluation.pairs.methods
        if len(method.runs) not in (1, table.runs)
    ]


def comparison(
    table: Table, dataset: str, measured: dict[str, dict[str, Cell]], measured_notes: Sequence[str] = ()
) -> str:
    """Markdown: each published row, below it what was measured under its name; then measured rows of other names.

    measured_notes: further lines below the table's own notes.
    """
    published = table.datasets.get(dataset, {})
    rows, remarks = [], []
    given = "recorded" if table.kind == "study" else "published"

    def add(row: str, kind: str, cells: dict[str, Cell]) -> None:
        texts = []
        for column in table.columns:
            text = str(cells.get(column, Cell()))
            if kind == given and (note := misprint(table, dataset, row, column)):
                if note not in remarks:
                    remarks.append(note)
                text += f" [{remarks.index(note) + 1}]"
            texts.append(text)
        rows.append([row, kind, *texts])

    for row, cells in published.items():
        add(row, given, cells)
        if row in measured:
            add(row, "measured", measured[row])
    for row in [name for name in measured if name not in published]:
        add(row, "measured", measured[row])
    for note in [n for n in row_notes(table, dataset, published) if n not in remarks]:
        remarks.append(note)
    lines = [f"## {table.title}" + (f", {dataset}" if dataset else ""), ""]
    lines += ["| " + " | ".join(["Method", "", *map(_title, table.columns, [table] * len(table.columns))]) + " |"]
    lines += ["|---|---" + "|--:" * len(table.columns) + "|", *("| " + " | ".join(row) + " |" for row in rows), ""]
    lines += [f"[{number}] {note}" for number, note in enumerate(remarks, 1)]
    lines += [f"- {note}" for note in (*measured_notes, *table.notes)]
    return "\n".join(lines + [finding_text(f) for f in table.findings if f["dataset"] == dataset]) + "\n"


def finding_text(finding: dict[str, str | float]) -> str:
    """One comparison of a study in a line."""
    told = f"; published {finding['published difference']:+g}" if finding["published difference"] != "" else ""
    return (
        f"- {finding['claim']} ({finding['source']}): {finding['first']} - {finding['second']}, {finding['metric']} "
        f"{finding['expected']}: {finding['difference']:+.4f} [{finding['low']:+.4f}, {finding['high']:+.4f}]{told}: "
        f"{finding['verdict']}"
    )


def misprint(table: Table, dataset: str, row: str, column: str) -> str:
    """The note on one published cell, "" for none."""
    for entry in table.misprints:
        if entry.get("dataset", dataset) == dataset and entry["row"] == row and entry.get("column") == column:
            return entry["note"]
    return ""


def row_notes(table: Table, dataset: str, rows: dict) -> list[str]:
    """Notes on whole rows."""
    return [
        f"{entry['row']}: {entry['note']}"
        for entry in table.misprints
        if "column" not in entry and entry.get("dataset", dataset) == dataset and entry["row"] in rows
    ]


def _title(column: str, table: Table) -> str:
    label = f"{MEASURES[column].label} {MEASURES[column].arrow}" if column in MEASURES else LABELS[column]
    return label + (f" ({table.units[column]})" if column in table.units else "")
