"""An evaluation written down: per-image CSV, JSON with versions, Markdown, LaTeX, a report and its summary as SVG."""

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path

from consissr.config.machine import whole
from consissr.evaluation.evaluate import Evaluation
from consissr.evaluation.markdown import escaped, one_line, table_lines
from consissr.evaluation.plots import summary_svg
from consissr.evaluation.report import html_report
from consissr.evaluation.summary import TableCells, difference_cells, notes, per_image, table_cells

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What makes a spreadsheet compute a text instead of showing it."""
TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "Δ": r"$\Delta$",
}  # fmt: skip


def write_all(evaluation: Evaluation, folder: Path, pictures: int = 24) -> list[Path]:
    """Write everything into `folder`; the report embeds the pictures of `pictures` images."""
    contents = {
        "summary.json": json.dumps(summary(evaluation), indent=1, ensure_ascii=False) + "\n",
        "table.md": markdown(evaluation),
        "table.tex": latex(evaluation),
        "report.html": html_report(evaluation, pictures),
        "summary.svg": summary_svg(evaluation),
    }
    for name, text in contents.items():
        write_text(folder / name, text)
    write_csv(evaluation, folder / "per_image.csv")
    return [folder / name for name in ("per_image.csv", *contents)]


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing; what file names hold that is no UTF-8 is escaped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_csv(evaluation: Evaluation, path: Path) -> None:
    """One row per method, run and image; L-STD stands in the row of run 0."""
    metrics = [m.name for m in per_image(evaluation)]
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "run", "image", *metrics] + ["l-std"] * bool(evaluation.local_std))
        for method in evaluation.pairs.methods:
            table = evaluation.values[method.name]
            for run in range(len(method.runs)):
                for column, image in enumerate(evaluation.pairs.images):
                    names = [csv_text(method.name), run, csv_text(image)]
                    row = [*names, *(f"{table[m][run, column]:.6f}" for m in metrics)]
                    if evaluation.local_std:
                        known = run == 0 and method.name in evaluation.local_std
                        row.append(f"{evaluation.local_std[method.name][column]:.6f}" if known else "")
                    writer.writerow(row)


def csv_text(text: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(FORMULA) else text


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
        "differences to the first": {
            name: {metric: asdict(e) for metric, e in line.items()} for name, line in evaluation.differences.items()
        },
        "unavailable": evaluation.unavailable,
        "versions": evaluation.versions,
        "measures": {measure.name: asdict(measure) for measure in evaluation.measures},
    }


def markdown(evaluation: Evaluation) -> str:
    """The table of averages: best bold, second best underlined; then differences to the first method, and notes."""

    def lines(cells: TableCells) -> list[str]:
        marked = [zip(*line, strict=True) for line in zip(cells.rows, cells.marks, strict=True)]
        return table_lines(cells.header, [[("{}", "**{}**", "<u>{}</u>")[m].format(escaped(t)) for t, m in line]
                                          for line in marked])  # fmt: skip

    compared = difference_cells(evaluation)
    beside = [escaped(compared.caption), "", *lines(compared), ""] if compared else []
    return "\n".join([*lines(table_cells(evaluation)), "", *beside, *(f"- {n}" for n in notes(evaluation))]) + "\n"


def latex(evaluation: Evaluation) -> str:
    """The table for a paper (booktabs): best bold, second best underlined."""
    cells = table_cells(evaluation)
    wrap = ("{}", r"\textbf{{{}}}", r"\underline{{{}}}")
    lines = [f"% {one_line(note)}" for note in notes(evaluation)]
    lines += [r"\begin{tabular}{l" + "c" * (len(cells.header) - 1) + "}", r"\toprule"]
    lines += [" & ".join(tex_escaped(title) for title in cells.header) + r" \\", r"\midrule"]
    for row, marks in zip(cells.rows, cells.marks, strict=True):
        lines.append(" & ".join(wrap[m].format(tex_escaped(t)) for t, m in zip(row, marks, strict=True)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def tex_escaped(text: str) -> str:
    """Text whose every character LaTeX prints as it is."""
    return "".join(TEX.get(character, character) for character in one_line(text))


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
