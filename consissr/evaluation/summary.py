"""What an evaluation says, for every form in which it is written: table cells, paired differences, notes."""

import math
from dataclasses import dataclass

import numpy as np

from consissr.evaluation.bootstrap import DRAWS, Estimate, interval
from consissr.evaluation.evaluate import Evaluation
from consissr.evaluation.folders import some
from consissr.evaluation.protocols import Measure
from consissr.evaluation.rank import average_ranks, places

RANK, LOCAL_STD = "Rank", "L-STD"
CEILING = 80.0
"""PSNR of identical images (see `metrics.PSNR_EPS`)."""


@dataclass(frozen=True)
class TableCells:
    """The table of averages as texts."""

    header: list[str]
    rows: list[list[str]]
    marks: list[list[int]]
    """1 for the best value of a column, 2 for the second best, 0 else; as `rows`."""


def shown(evaluation: Evaluation) -> list[Measure]:
    """The measures that have values."""
    return [m for m in evaluation.measures if m.name not in evaluation.unavailable]


def per_image(evaluation: Evaluation) -> list[Measure]:
    """The measures that have a value per image."""
    return [m for m in shown(evaluation) if m.needs != "set"]


def table_cells(evaluation: Evaluation) -> TableCells:
    """Means over images and runs, with "/G-STD" for repeated runs, L-STD, and the average rank over all measures."""
    methods = evaluation.pairs.methods
    names = [method.name for method in methods]
    ranked = [method.ranked for method in methods]

    def marked(values: list[float], higher: bool) -> list[int]:
        return places([v if r else math.nan for v, r in zip(values, ranked, strict=True)], higher)

    columns = []
    for measure in shown(evaluation):
        values = [evaluation.mean(name, measure.name) for name in names]
        texts = []
        for name, value in zip(names, values, strict=True):
            spread = evaluation.global_std(name, measure.name)
            text = "-" if math.isnan(value) else f"{value:.{measure.digits}f}"
            texts.append(text + ("" if math.isnan(spread) else f"/{spread:.4f}"))
        columns.append((f"{measure.label} {measure.arrow}", texts, marked(values, measure.higher)))
    if evaluation.local_std:
        values = [evaluation.mean_local_std(name) for name in names]
        texts = ["-" if math.isnan(value) else f"{value:.4f}" for value in values]
        columns.append((f"{LOCAL_STD} ↓", texts, marked(values, higher=False)))
    if averages := ranks_of(evaluation):
        values = [averages.get(name, math.nan) for name in names]
        texts = ["-" if math.isnan(value) else f"{value:.2f}" for value in values]
        columns.append((f"{RANK} ↓", texts, marked(values, higher=False)))
    header = ["Method", *(title for title, _, _ in columns)]
    rows = [[name, *(texts[index] for _, texts, _ in columns)] for index, name in enumerate(names)]
    return TableCells(header, rows, [[0, *(marks[index] for _, _, marks in columns)] for index in range(len(names))])


def ranks_of(evaluation: Evaluation) -> dict[str, float]:
    """Average rank of the methods that are ranked; {} for a single one, or a single measure."""
    names = [method.name for method in evaluation.pairs.methods if method.ranked]
    measures = shown(evaluation)
    if len(names) < 2 or len(measures) < 2:
        return {}
    return average_ranks({n: {m.name: evaluation.mean(n, m.name) for m in measures} for n in names}, measures)


def differences(evaluation: Evaluation) -> dict[str, dict[str, Estimate]]:
    """Of every method but the first: its values minus the first's, image by image, with 95 % bootstrap intervals.

    By method and metric; runs are averaged first, and images without a value left out.
    """
    first, *others = (method.name for method in evaluation.pairs.methods)
    found: dict[str, dict[str, Estimate]] = {}
    for name in others:
        for measure in per_image(evaluation):
            a, b = (evaluation.values[n][measure.name].mean(axis=0) for n in (name, first))
            known = (a - b)[~np.isnan(a - b)]
            if len(known) > 1:
                found.setdefault(name, {})[measure.name] = interval(known)
    return found


def difference_lines(evaluation: Evaluation) -> list[str]:
    """`differences` as a Markdown table; [] where there are none."""
    found = differences(evaluation)
    measures = [m for m in per_image(evaluation) if any(m.name in line for line in found.values())]
    if not measures:
        return []
    first = one_line(evaluation.pairs.methods[0].name)
    lines = [
        f"Differences to {first}, image by image, with 95 % bootstrap intervals ({DRAWS} resamples of the images):"
    ]
    lines += [
        "",
        "| | " + " | ".join(f"{m.label} {m.arrow}" for m in measures) + " |",
        "|---" + "|--:" * len(measures) + "|",
    ]
    for name, line in found.items():
        texts = []
        for m in measures:
            e, d = line.get(m.name), m.digits
            texts.append(f"{e.mean:+.{d}f} [{e.low:+.{d}f}, {e.high:+.{d}f}]" if e else "-")
        lines.append(f"| {markdown_escaped(name)} | " + " | ".join(texts) + " |")
    return lines


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader needs to know beside the numbers."""
    pairs = evaluation.pairs
    lines = [f"{len(pairs.images)} images{reference(evaluation)}. Protocol {evaluation.protocol.as_text()}"]
    repeated = [f"{m.name} {len(m.runs)}" for m in pairs.methods if len(m.runs) > 1]
    if repeated:
        lines.append(f"Averages over runs, value/G-STD; number of runs: {', '.join(repeated)}.")
    if ranks_of(evaluation):
        lines.append(f"Rank: mean over {', '.join(m.label for m in shown(evaluation))}.")
    if aside := [m.name for m in pairs.methods if not m.ranked]:
        lines.append(f"Not ranked (a model of another size): {', '.join(aside)}.")
    lines += [f"{m.name}: {m.note}." for m in pairs.methods if m.note]
    lines += [f"{metric} is not computed: {reason}." for metric, reason in evaluation.unavailable.items()]
    lines += [
        f"{name}: no mean {metric}, which is undefined for {which}." for name, metric, which in undefined(evaluation)
    ]
    for name, table in evaluation.values.items():
        if "psnr" in table and (same := int((table["psnr"] > CEILING - 1e-6).sum())):
            lines.append(f"{name}: {same} of its images are identical to HR; their PSNR counts as {CEILING:.0f} dB.")
    lines += [f"{m.label}: {m.about}." for m in shown(evaluation) if m.about]
    lines.append("Versions: " + ", ".join(f"{name} {number}" for name, number in evaluation.versions.items()) + ".")
    return lines


def reference(evaluation: Evaluation) -> str:
    """Where the references stand: " of FOLDER"; "" without references."""
    hr = evaluation.pairs.hr
    if not hr:
        return ""
    image, path = next(iter(hr.items()))
    folder = path.parents[image.count("/")]
    return f" of {'/'.join(folder.resolve().parts[-2:])}"


def lacking(evaluation: Evaluation, asked: str | None) -> list[str]:
    """A line for each metric of the list `asked` ("a,b,...") that has no values; [] for a list of nobody's."""
    names = asked.split(",") if asked else []
    return [f"{name} is not computed: {why}" for name, why in evaluation.unavailable.items() if name in names]


def undefined(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Method, metric and images of the values that do not exist: NIQE of images that are flat."""
    found = []
    for method, table in evaluation.values.items():
        for metric, values in table.items():
            if columns := np.flatnonzero(np.isnan(values).any(axis=0)).tolist():
                found.append((method, metric, some([evaluation.pairs.images[column] for column in columns])))
    return found


def one_line(text: str) -> str:
    """A name without line breaks."""
    return " ".join(text.split())


def markdown_escaped(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")
