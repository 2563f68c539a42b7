"""An evaluation written down: per-image CSV, JSON with versions, Markdown and LaTeX tables."""

import csv
import json
import math
import os
from pathlib import Path

import numpy as np

from consissr.evaluation.evaluate import Evaluation
from consissr.evaluation.folders import some
from consissr.evaluation.protocols import describe
from consissr.evaluation.rank import average_ranks, places

RANK, LOCAL_STD = "Rank", "L-STD"
PICTURES = 24  # images whose pictures the HTML report embeds


def write_all(evaluation: Evaluation, folder: Path, pictures: int = PICTURES) -> list[Path]:
    """Write per_image.csv, summary.json, table.md, table.tex and report.html (with `pictures` images) into `folder`."""
    from consissr.evaluation.report import html_report

    contents = {
        "per_image.csv": None,
        "summary.json": json.dumps(summary(evaluation), indent=1, ensure_ascii=False) + "\n",
        "table.md": markdown(evaluation),
        "table.tex": latex(evaluation),
        "report.html": html_report(evaluation, pictures),
    }
    for name, text in contents.items():
        if text is not None:
            write_text(folder / name, text)
    write_csv(evaluation, folder / "per_image.csv")
    return [folder / name for name in contents]


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_csv(evaluation: Evaluation, path: Path) -> None:
    """One row per method, run and image; L-STD stands in the row of run 0."""
    metrics = [m.name for m in evaluation.measures if m.name not in evaluation.unavailable and m.needs != "set"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "run", "image", *metrics] + ["l-std"] * bool(evaluation.local_std))
        for method in evaluation.pairs.methods:
            table = evaluation.values[method.name]
            for run in range(len(method.runs)):
                for column, image in enumerate(evaluation.pairs.images):
                    row = [method.name, run, image, *(f"{table[m][run, column]:.6f}" for m in metrics)]
                    if evaluation.local_std:
                        known = run == 0 and method.name in evaluation.local_std
                        row.append(f"{evaluation.local_std[method.name][column]:.6f}" if known else "")
                    writer.writerow(row)


def summary(evaluation: Evaluation) -> dict:
    """Everything but the per-image values, as plain data (missing values are null)."""
    methods = {}
    for method in evaluation.pairs.methods:
        methods[method.name] = {
            "runs": len(method.runs),
            "folder": str(next(iter(method.runs[0].values())).parent),
            "note": method.note,
            "mean": {m.name: _plain(evaluation.mean(method.name, m.name)) for m in evaluation.measures},
            "g-std": {m.name: _plain(evaluation.global_std(method.name, m.name)) for m in evaluation.measures},
            "l-std": _plain(evaluation.mean_local_std(method.name)),
        }
    return {
        "protocol": evaluation.protocol.as_text(),
        "images": len(evaluation.pairs.images),
        "methods": methods,
        "unavailable": evaluation.unavailable,
        "versions": evaluation.versions,
        "measures": describe(evaluation.measures),
    }


def table_cells(evaluation: Evaluation) -> tuple[list[str], list[list[str]], list[list[int]]]:
    """Header, texts and places (1 best, 2 second, 0 else) of the table of averages; "mean/G-STD" for repeated runs."""
    names = [method.name for method in evaluation.pairs.methods]
    shown = [m for m in evaluation.measures if m.name not in evaluation.unavailable]
    columns = []
    for measure in shown:
        values = [evaluation.mean(name, measure.name) for name in names]
        texts = []
        for name, value in zip(names, values, strict=True):
            spread = evaluation.global_std(name, measure.name)
            text = "-" if math.isnan(value) else f"{value:.{measure.digits}f}"
            texts.append(text + ("" if math.isnan(spread) else f"/{spread:.4f}"))
        columns.append((f"{measure.label} {measure.arrow}", texts, places(values, measure.higher)))
    if evaluation.local_std:
        values = [evaluation.mean_local_std(name) for name in names]
        texts = ["-" if math.isnan(value) else f"{value:.4f}" for value in values]
        columns.append((f"{LOCAL_STD} ↓", texts, places(values, higher=False)))
    if len(names) > 1 and len(shown) > 1:
        averages = {name: {m.name: evaluation.mean(name, m.name) for m in shown} for name in names}
        values = list(average_ranks(averages, shown).values())
        columns.append((f"{RANK} ↓", [f"{value:.2f}" for value in values], places(values, higher=False)))
    header = ["Method", *(title for title, _, _ in columns)]
    rows = [[name, *(texts[index] for _, texts, _ in columns)] for index, name in enumerate(names)]
    marks = [[0, *(places_[index] for _, _, places_ in columns)] for index in range(len(names))]
    return header, rows, marks


def markdown(evaluation: Evaluation) -> str:
    """The table of averages: best bold, second best underlined."""
    header, rows, marks = table_cells(evaluation)
    wrap = {0: "{}", 1: "**{}**", 2: "<u>{}</u>"}
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    for row, row_marks in zip(rows, marks, strict=True):
        lines.append("| " + " | ".join(wrap[m].format(_escaped(t)) for t, m in zip(row, row_marks, strict=True)) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(evaluation))]) + "\n"


def latex(evaluation: Evaluation) -> str:
    """The same table for a paper (booktabs): best bold, second best underlined."""
    header, rows, marks = table_cells(evaluation)
    wrap = {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}
    lines = [f"% {note}" for note in notes(evaluation)]
    lines += [r"\begin{tabular}{l" + "c" * (len(header) - 1) + "}", r"\toprule"]
    lines += [" & ".join(tex_escaped(title) for title in header) + r" \\", r"\midrule"]
    for row, row_marks in zip(rows, marks, strict=True):
        cells = (wrap[m].format(tex_escaped(t)) for t, m in zip(row, row_marks, strict=True))
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader needs to know beside the numbers."""
    repeated = [f"{m.name} {len(m.runs)}" for m in evaluation.pairs.methods if len(m.runs) > 1]
    lines = [f"{len(evaluation.pairs.images)} images. Protocol {evaluation.protocol.as_text()}"]
    if repeated:
        lines.append(f"Averages over runs, value/G-STD; number of runs: {', '.join(repeated)}.")
    lines += [f"{m.name}: {m.note}." for m in evaluation.pairs.methods if m.note]
    lines += [f"{metric} is not computed: {reason}." for metric, reason in evaluation.unavailable.items()]
    lines += [
        f"{name}: no mean {metric}, which is undefined for {which}." for name, metric, which in undefined(evaluation)
    ]
    lines += [f"{m.label}: {m.about}." for m in evaluation.measures if m.about and m.name not in evaluation.unavailable]
    lines.append("Versions: " + ", ".join(f"{name} {number}" for name, number in evaluation.versions.items()) + ".")
    return lines


def undefined(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Method, metric and images of the values that do not exist: NIQE of images that are flat."""
    found = []
    for method, table in evaluation.values.items():
        for metric, values in table.items():
            if columns := np.flatnonzero(np.isnan(values).any(axis=0)).tolist():
                found.append((method, metric, some([evaluation.pairs.images[column] for column in columns])))
    return found


def tex_escaped(text: str) -> str:
    for character in "&%_#":
        text = text.replace(character, "\\" + character)
    return text.replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$").replace("Δ", r"$\Delta$")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
