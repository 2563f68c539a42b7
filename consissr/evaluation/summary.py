"""What an evaluation says, for every form in which it is written: table cells, paired differences, notes."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from consissr.evaluation.bootstrap import DRAWS, Estimate
from consissr.evaluation.datasets import TEST_SETS, check_test_set
from consissr.evaluation.evaluate import Evaluation
from consissr.evaluation.folders import some
from consissr.evaluation.markdown import one_line
from consissr.evaluation.metrics import IDENTICAL
from consissr.evaluation.protocols import Measure
from consissr.evaluation.rank import average_ranks, had_by_all, places
from consissr.evaluation.tables import LABELS, Cell, Table


@dataclass(frozen=True)
class TableCells:
    """A table as texts."""

    header: list[str]
    rows: list[list[str]]
    marks: list[list[int]]
    """1 for the best value of a column, 2 for the second best, 0 else; as `rows`."""
    caption: str = ""


def shown(evaluation: Evaluation) -> list[Measure]:
    """The measures that have values."""
    return [m for m in evaluation.measures if m.name not in evaluation.unavailable]


def per_image(evaluation: Evaluation) -> list[Measure]:
    """The measures that have a value per image."""
    return [m for m in shown(evaluation) if not m.of_set]


def measured_cells(evaluation: Evaluation, ranking: Collection[str] | None = None) -> dict[str, dict[str, Cell]]:
    """By method: means over images and runs with their G-STD, by metric; 'l-std' where runs are repeated; 'rank'.

    The rank is the mean over the metrics of `ranking` (None: all), see `ranked`.
    """
    cells = {}
    for method in evaluation.pairs.methods:
        name = method.name
        cells[name] = {m.name: Cell(evaluation.mean(name, m.name), evaluation.global_std(name, m.name), m.digits)
                       for m in shown(evaluation)}  # fmt: skip
        if name in evaluation.local_std:
            cells[name]["l-std"] = Cell(evaluation.mean_local_std(name))
    for name, average in average_ranks(*ranked(evaluation, ranking)).items():
        cells[name]["rank"] = Cell(average, digits=2)
    return cells


def ranked(
    evaluation: Evaluation, ranking: Collection[str] | None = None
) -> tuple[dict[str, dict[str, float]], list[Measure]]:
    """The means of the methods that are ranked, and the metrics of `ranking` (None: all) by which, which all have.

    Both are empty for one method or one metric.
    """
    measures = [m for m in shown(evaluation) if ranking is None or m.name in ranking]
    names = [method.name for method in evaluation.pairs.methods if method.ranked]
    means = {name: {m.name: evaluation.mean(name, m.name) for m in measures} for name in names}
    measures = had_by_all(means, measures)
    return (means, measures) if len(names) > 1 and len(measures) > 1 else ({}, [])


def table_cells(evaluation: Evaluation) -> TableCells:
    """The table of averages; methods that are not ranked have no marks."""
    cells = measured_cells(evaluation)
    columns = [(m.name, f"{m.label} {m.arrow}", m.higher) for m in shown(evaluation)]
    columns += [(c, LABELS[c], False) for c in ("l-std", "rank") if any(c in own for own in cells.values())]
    rows = [[name, *(str(own.get(c, Cell())) for c, _, _ in columns)] for name, own in cells.items()]
    marks = []
    for column, _, higher in columns:
        values = [cells[m.name].get(column, Cell()).value if m.ranked else math.nan for m in evaluation.pairs.methods]
        marks.append(places(values, higher))
    header = ["Method", *(title for _, title, _ in columns)]
    return TableCells(header, rows, [[0, *line] for line in zip(*marks, strict=True)])


def difference_cells(evaluation: Evaluation) -> TableCells | None:
    """The evaluation's `differences` as texts; None where there are none."""
    estimates = evaluation.differences
    measures = [m for m in per_image(evaluation) if any(m.name in own for own in estimates.values())]
    if not measures:
        return None

    def text(e: Estimate | None, digits: int) -> str:
        return f"{e.mean:+.{digits}f} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]" if e else "-"

    return TableCells(
        ["", *(f"{m.label} {m.arrow}" for m in measures)],
        [[name, *(text(own.get(m.name), m.digits) for m in measures)] for name, own in estimates.items()],
        [[0] * (len(measures) + 1) for _ in estimates],
        f"Differences to {one_line(evaluation.pairs.methods[0].name)}, image by image, with 95 % bootstrap intervals "
        f"({DRAWS} resamples of the images):",
    )


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader needs to know beside the numbers."""
    methods, measures = evaluation.pairs.methods, shown(evaluation)
    lines = [f"{len(evaluation.pairs.images)} images{reference(evaluation)}. Protocol {evaluation.protocol.as_text()}"]
    if repeated := [f"{m.name} {len(m.runs)}" for m in methods if len(m.runs) > 1]:
        lines.append(f"Averages over runs, value/G-STD; number of runs: {', '.join(repeated)}.")
    if by := ranked(evaluation)[1]:
        lines.append(f"Rank: mean over {', '.join(m.label for m in by)}.")
    lines += [f"{m.name}: {m.note}." for m in methods if m.note]
    lines += [*_reservations(evaluation), *_undefined(evaluation)]
    for name, table in evaluation.values.items():
        if "psnr" in table and (same := int((table["psnr"] > IDENTICAL - 1e-6).sum())):
            lines.append(f"{name}: {same} of its images are identical to HR; their PSNR counts as {IDENTICAL:.0f} dB.")
    lines += [f"{m.label}: {m.about}." for m in measures if m.about]
    lines.append("Versions: " + ", ".join(f"{name} {number}" for name, number in evaluation.versions.items()) + ".")
    return lines


def table_notes(evaluation: Evaluation, table: Table, dataset: str, hr: Path | None) -> list[str]:
    """What was measured beside a paper's table: how many images of which set, what is missing and why, other runs.

    hr: folder of the references.
    """
    count = len(evaluation.pairs.images)
    lines = [f"Measured: {count} images" + (f" of {hr}" if hr else "") + f"; protocol {evaluation.protocol.name}."]
    if dataset in TEST_SETS and hr and (problems := check_test_set(dataset, hr, None)):
        told = "; ".join(problem.split(": ", 1)[1] for problem in problems)
        lines[0] += f" This is not the test set of the published values ({told})."
    means, by = ranked(evaluation, table.metrics)
    if table.last == "rank" and by:
        lines.append(f"Measured ranks: among {len(means)} methods over {', '.join(m.label for m in by)}.")
    lines += _reservations(evaluation, table.metrics)
    lines += [f"{m.label}: {m.about}." for m in shown(evaluation) if m.name not in table.metrics]
    return lines + [
        f"{method.name}: {len(method.runs)} runs, the published values are of {table.runs}; G-STD and L-STD divide by "
        "the number of runs and come out smaller for few."
        for method in evaluation.pairs.methods
        if len(method.runs) not in (1, table.runs)
    ]


def _reservations(evaluation: Evaluation, metrics: list[str] | None = None) -> list[str]:
    """Who is not ranked, and which of `metrics` (None: all) are not computed."""
    aside = [m.name for m in evaluation.pairs.methods if not m.ranked]
    lines = [f"Not ranked (a model of another size): {', '.join(aside)}."] * bool(aside)
    return lines + [f"{line}." for line in lacking(evaluation, metrics)]


def lacking(evaluation: Evaluation, metrics: list[str] | None = None) -> list[str]:
    """A line for each of `metrics` (None: all) that has no values, and why."""
    reasons = dict(evaluation.unavailable)
    tables = [evaluation.values[method] | evaluation.set_values[method] for method in evaluation.values]
    for name in dict.fromkeys(name for table in tables for name in table):
        if all(np.isnan(table[name]).all() for table in tables if name in table):
            reasons[name] = "it is undefined for these images"
    return [f"{name} is not computed: {why}" for name, why in reasons.items() if metrics is None or name in metrics]


def _undefined(evaluation: Evaluation) -> list[str]:
    """A line for each method and metric with values that do not exist: NIQE of images that are flat."""
    lines = []
    for method, table in evaluation.values.items():
        for metric, values in table.items():
            if columns := np.flatnonzero(np.isnan(values).any(axis=0)).tolist():
                which = some([evaluation.pairs.images[column] for column in columns])
                lines.append(f"{method}: no mean {metric}, which is undefined for {which}.")
    return lines


def reference(evaluation: Evaluation) -> str:
    """Where the references stand: " of FOLDER"; "" without references."""
    hr = evaluation.pairs.hr
    if not hr:
        return ""
    image, path = next(iter(hr.items()))
    folder = path.parents[image.count("/")]
    return f" of {'/'.join(folder.resolve().parts[-2:])}"
