"""The papers' tables as data (configs/tables), and measured values printed beside the published ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from consissr.config.loading import nearest
from consissr.errors import UserError
from consissr.evaluation.markdown import table_lines
from consissr.evaluation.protocols import MEASURES

LABELS = {
    "rank": "Rank ↓", "l-std": "L-STD ↓", "steps": "Steps", "macs": "MACs", "params": "Parameters", "seconds": "Time",
}  # fmt: skip
KINDS = ("quality", "complexity", "figure")


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
    """'quality', 'complexity' or 'figure'."""
    datasets: dict[str, dict[str, dict[str, Cell]]] = field(default_factory=dict)
    """Published cells by data set, row and column."""
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


def comparison(table: Table, dataset: str, measured: dict[str, dict[str, Cell]], notes: Sequence[str] = ()) -> str:
    """Markdown: each published row, below it what was measured under its name; then measured rows of other names.

    notes: further lines above the table's own notes.
    """
    published = table.datasets.get(dataset, {})
    rows, remarks = [], []

    def add(row: str, kind: str, cells: dict[str, Cell]) -> None:
        texts = []
        for column in table.columns:
            text = str(cells.get(column, Cell()))
            for note in misprints(table, dataset, row, column) if kind == "published" else ():
                if note not in remarks:
                    remarks.append(note)
                text += f" [{remarks.index(note) + 1}]"
            texts.append(text)
        rows.append([row, kind, *texts])

    for row, cells in published.items():
        add(row, "published", cells)
        if row in measured:
            add(row, "measured", measured[row])
    for row in [name for name in measured if name not in published]:
        add(row, "measured", measured[row])
    remarks += [f"{row}: {note}" for row in published for note in misprints(table, dataset, row, None)]
    lines = [f"## {table.title}" + (f", {dataset}" if dataset else ""), ""]
    lines += [*table_lines(["Method", "", *(_title(table, column) for column in table.columns)], rows, words=2), ""]
    lines += [f"[{number}] {note}" for number, note in enumerate(remarks, 1)]
    lines += [f"- {note}" for note in (*notes, *table.notes)]
    return "\n".join(lines) + "\n"


def misprints(table: Table, dataset: str, row: str, column: str | None) -> list[str]:
    """The notes on one published cell, or on a whole row (`column` None)."""
    return [
        entry["note"]
        for entry in table.misprints
        if (entry.get("dataset", dataset), entry["row"], entry.get("column")) == (dataset, row, column)
    ]


def _title(table: Table, column: str) -> str:
    label = f"{MEASURES[column].label} {MEASURES[column].arrow}" if column in MEASURES else LABELS[column]
    return label + (f" ({table.units[column]})" if column in table.units else "")
