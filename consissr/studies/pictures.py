"""A study's pictures: two noises side by side, crops of every row, means with intervals, curves over timesteps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from consissr.evaluation import figures
from consissr.evaluation.bootstrap import interval
from consissr.evaluation.folders import list_images, list_runs, read_image
from consissr.evaluation.protocols import MEASURES, get_measures
from consissr.studies.run import Setting
from consissr.studies.scores import STEP_METRICS, Scores, StepScores
from consissr.studies.spec import Results, Study

SHOWN = 3
"""Images in a picture."""
SIDE = 128
"""Side of a crop in pixels."""
PLOTTED = ("psnr", "niqe", "psnr-gstd", "l-std")


def draw(
    setting: Setting, study: Study, scored: list[Scores], shown: dict[str, list[Results]], steps: StepScores | None
) -> list[Path]:
    """Write every picture that can be drawn into OUT/<study>; returns their files."""
    out, files = setting.plan.out / study.name, []
    for dataset, ready in shown.items():
        first = {r.row: r for r in reversed(ready)}  # one training seed of each row, the first
        rows = [first[row] for row in study.rows if row in first]
        data = setting.plan.out / "data" / dataset
        files.append(save(noises(rows, dataset, data), out / f"noises_{dataset}.png"))
        files.append(save(crops(rows, dataset, data), out / f"crops_{dataset}.png"))
    if scored:
        files.append(save(means(scored), out / "means.png"))
    if steps:
        files.append(save(curves(steps, study.curves.get("title", "")), out / "curves.png"))
    return files


def save(figure, path: Path) -> Path:
    """Write and close a figure."""
    figure.savefig(path, dpi=130, bbox_inches="tight")
    figures.close(figure)
    return path


def chosen(data: Path) -> list[str]:
    """Evenly chosen images of a data set."""
    names = sorted(list_images(data / "HR"))
    places = (np.arange(SHOWN) + 0.5) * len(names) / SHOWN
    return [names[i] for i in np.unique(places.astype(int))]


def crop(path: Path, scale: int = 1) -> np.ndarray:
    """The centre (SIDE/scale)^2 pixels of an image, (S, S, 3) in [0, 1]."""
    pixels, side = read_image(path)[0].permute(1, 2, 0).numpy(), SIDE // scale
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def references(data: Path, names: list[str], twice: bool) -> list[figures.Row]:
    """Two lines: LQ and HR crops of the images, each twice where results stand in pairs."""
    lines = []
    for label, part, scale in (("LQ", "LR", 4), ("HR", "HR", 1)):
        files = list_images(data / part)
        lines.append([(label, crop(files[name], scale), None) for name in names for _ in range(1 + twice)])
    return lines


def noises(rows: list[Results], dataset: str, data: Path):
    """A line per row: each image's crop under two noises."""
    names = chosen(data)
    lines = references(data, names, twice=True)
    for results in rows:
        runs = [list_images(run) for run in list_runs(results.folder / dataset)][:2]
        lines.append([(f"{results.row}, noise {i + 1}", crop(run[name]), None) for name in names
                      for i, run in enumerate(runs)])  # fmt: skip
    return figures.picture_grid(lines)


def crops(rows: list[Results], dataset: str, data: Path):
    """A line per image: LQ, every row's first result, HR."""
    files = {part: list_images(data / part) for part in ("LR", "HR")}
    results = {r.row: list_images(list_runs(r.folder / dataset)[0]) for r in rows}
    lines = []
    for name in chosen(data):
        line = [("LQ", crop(files["LR"][name], 4), None)]
        line += [(row, crop(images[name]), None) for row, images in results.items()]
        lines.append([*line, ("HR", crop(files["HR"][name]), None)])
    return figures.picture_grid(lines)


def means(scored: list[Scores]):
    """A panel per metric and data set: each row's mean and 95 % interval over images, and each training seed's mean."""
    rows = list(dict.fromkeys(row for s in scored for row in s.values))
    size = (3.2 * len(PLOTTED), (0.28 * len(rows) + 1.0) * len(scored))
    made = {"figsize": size, "squeeze": False, "layout": "constrained"}
    figure, axes = figures.pyplot().subplots(len(scored), len(PLOTTED), **made)
    for scores, line in zip(scored, axes, strict=True):
        for axis, metric in zip(line, PLOTTED, strict=True):
            for place, row in enumerate(rows):
                if row not in scores.values:
                    continue
                e = interval(scores.mean(row, metric))
                axis.errorbar(e.mean, place, xerr=[[e.mean - e.low], [e.high - e.mean]], fmt="o", markersize=4,
                              capsize=2, color=figures.COLOURS[0])  # fmt: skip
                seeds = [values[metric].mean() for values in scores.values[row].values()]
                if len(seeds) > 1:
                    axis.plot(seeds, [place] * len(seeds), "|", color=figures.COLOURS[1], markersize=9)
            axis.set_yticks(range(len(rows)), rows if axis is line[0] else [""] * len(rows), fontsize=7)
            axis.invert_yaxis()
            axis.set_title(f"{scores.dataset}: {title(metric)}", fontsize=8)
            axis.grid(alpha=0.3)
    return figure


def title(metric: str) -> str:
    """A metric's name for people."""
    name, gstd, _ = metric.partition("-gstd")
    if name not in MEASURES:
        return "L-STD ↓"
    return f"{MEASURES[name].label} G-STD ↓" if gstd else f"{MEASURES[name].label} {MEASURES[name].arrow}"


def curves(measured: StepScores, title: str):
    """A panel per metric: means over images and training seeds of what each sampling step expects, a line per row."""
    lines = {}
    for row in measured.rows:
        for metric in STEP_METRICS:
            points = [(t, float(measured.values(row, metric, t).mean())) for t in measured.timesteps]
            lines.setdefault(row, {})[metric] = points
    figure = figures.curve_panels(lines, get_measures(list(STEP_METRICS)))
    figure.suptitle(title, fontsize=9)
    return figure
