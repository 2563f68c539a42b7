"""The papers' figures from folders of results, each as PNG and PDF.

crops     several methods on one crop (ConsisSR Fig. 7)
noises    two runs of each method side by side (CCSR Fig. 1, 4)
extremes  the runs of best and worst PSNR (CCSR Fig. 5 to 7)
steps     the pictures that sampling steps expect (ConsisSR Fig. 2; CCSR Fig. 2, right)
curves    metrics over timesteps (ConsisSR Fig. 6, 8; CCSR Fig. 2, left)
prompts   CLIP similarity of an image with candidate prompts (ConsisSR Fig. 4)
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from consissr.errors import UserError
from consissr.evaluation import folders
from consissr.evaluation.protocols import Measure, get_measures, get_protocol
from consissr.evaluation.tables import Table

INCH = 1.9  # side of one picture
MAX_STEPS = 8  # pictures per row of the steps figure
COLOURS = ("#2470c8", "#d1603d", "#2a9d5c", "#8e5bd0", "#b8860b", "#0f8b8d")


@dataclass(frozen=True)
class Inputs:
    """What a figure is drawn from."""

    results: dict[str, Path]
    hr: Path | None
    lr: Path | None
    images: list[str]
    box: tuple[int, int, int, int] | None
    """Crop in pixels of the results: x, y, width, height; None: the middle ninth."""

    def needed(self, name: str) -> Path:
        folder = getattr(self, name)
        if folder is None:
            raise UserError(f"this figure needs --{name}")
        return folder


def draw(table: Table, results: dict[str, Path], args: argparse.Namespace, box: tuple | None) -> list[Path]:
    """Draw the figure that `table` describes; return the files."""
    inputs = Inputs(results, args.hr, args.lr, args.image, box)
    if not results and table.figure != "prompts":
        raise UserError(f"{table.name} is drawn from result folders: give them with --sr NAME=FOLDER")
    makers = {
        "crops": lambda: picture_grid(crop_rows(inputs)),
        "noises": lambda: picture_grid(noise_rows(inputs)),
        "extremes": lambda: picture_grid(extreme_rows(inputs)),
        "steps": lambda: picture_grid(step_rows(inputs)),
        "curves": lambda: curves_figure(table, inputs, args),
        "prompts": lambda: prompts_figure(inputs, args.prompts, args.weights, args.device),
    }
    if table.figure not in makers:
        raise UserError(f"{table.name} asks for an unknown figure '{table.figure}'; known: {', '.join(makers)}")
    figure = makers[table.figure]()
    figure.suptitle(table.title, fontsize=9)
    paths = [args.output / f"{table.name.replace('/', '_')}.{kind}" for kind in ("png", "pdf")]
    args.output.mkdir(parents=True, exist_ok=True)
    for path in paths:
        figure.savefig(path, dpi=200, bbox_inches="tight")
    return paths


# --- grids of pictures: a row is a list of (title, pixels, box drawn into it) ---

PictureRow = list[tuple[str, np.ndarray, tuple[int, int, int, int] | None]]


def crop_rows(inputs: Inputs) -> list[PictureRow]:
    """Each method's crop, of the first run."""
    return _rows(inputs, _pairs(inputs), lambda method, name: {method.name: 0})


def noise_rows(inputs: Inputs) -> list[PictureRow]:
    """The same crop of each method's first two runs."""
    pairs = _pairs(inputs)
    if single := [method.name for method in pairs.methods if len(method.runs) < 2]:
        raise UserError(f"two noises need repeated runs (infer.py --repeat 2); {', '.join(single)} has one")
    return _rows(inputs, pairs, lambda method, name: {f"{method.name}, noise {i + 1}": i for i in (0, 1)})


def extreme_rows(inputs: Inputs) -> list[PictureRow]:
    """Each method's runs of best and worst PSNR (on Y), with their values; methods of one run show it."""
    from consissr.evaluation.metrics import psnr

    inputs.needed("hr")
    pairs = _pairs(inputs)

    def runs(method: folders.Method, name: str) -> dict[str, int]:
        reference = folders.read_image(pairs.hr[name])
        values = [psnr(folders.read_image(run[name]), reference).item() for run in method.runs]
        order = {"best": int(np.argmax(values)), "worst": int(np.argmin(values))} if len(values) > 1 else {"": 0}
        words = {word: f" {word} of {len(values)}" if word else "" for word in order}
        return {f"{method.name}{words[word]} {values[i]:.2f} dB": i for word, i in order.items()}

    return _rows(inputs, pairs, runs)


def _rows(
    inputs: Inputs, pairs: folders.Pairs, runs: Callable[[folders.Method, str], dict[str, int]]
) -> list[PictureRow]:
    """Per image: LR with the box, of each method the crops of the runs that `runs` names, by title, and HR's crop."""
    rows = []
    for name in _chosen(inputs, pairs.images):
        files = {title: method.runs[i][name] for method in pairs.methods for title, i in runs(method, name).items()}
        files |= {"HR": pairs.hr[name]} if pairs.hr else {}
        crops = [(title, _crop(file, inputs.box), None) for title, file in files.items()]
        rows.append([_overview(inputs, pairs, name), *crops])
    return rows


def step_rows(inputs: Inputs) -> list[PictureRow]:
    """Per method and image: what evenly chosen sampling steps expect the result to be, noisiest first."""
    from consissr.evaluation.curves import step_pictures

    rows = []
    for method, folder in inputs.results.items():
        pictures = step_pictures(folders.list_runs(folder)[0])
        for name in _chosen(inputs, list(pictures)):
            steps = list(pictures[name].items())
            chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_STEPS)).round().astype(int))
            rows.append([(f"{method}, t = {steps[i][0]}", _pixels(steps[i][1]), None) for i in chosen])
    return rows


def picture_grid(rows: list[PictureRow]):
    """A matplotlib figure of pictures in rows."""
    columns = max(len(row) for row in rows)
    figure = new_figure(INCH * columns, INCH * len(rows) * 1.15 + 0.3)
    for line, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, (title, pixels, box) in zip(line, row, strict=False):
            axis.imshow(pixels, interpolation="nearest")
            axis.set_title(title, fontsize=6)
            if box:
                from matplotlib.patches import Rectangle

                axis.add_patch(Rectangle(box[:2], *box[2:], fill=False, edgecolor="red", linewidth=1))
    return figure


# --- plots ---


def curves_figure(table: Table, inputs: Inputs, args: argparse.Namespace):
    """One panel per metric: its mean over images at each timestep, a line per method."""
    from consissr.evaluation import curves

    measures = get_measures(args.metrics.split(",") if args.metrics else table.metrics)
    protocol = get_protocol(args.protocol or table.protocol)
    options = {"weights": args.weights, "device": args.device, "jobs": args.jobs}
    done = curves.step_evaluation(inputs.results, inputs.needed("hr"), measures, protocol,
                                  args.output / "scores.jsonl", **options)  # fmt: skip
    lines = curves.step_curves(*done, measures)
    flat = curves.lr_values(inputs.lr, inputs.hr, measures, protocol, args.output, **options) if inputs.lr else {}
    shown = [m for m in measures if any(m.name in table for table in lines.values())]
    if not shown:
        raise UserError("none of the figure's metrics can be computed here: see --list-weights, or choose --metrics")
    figure = curve_panels(lines, shown, flat)
    if absent := [m.label for m in measures if m not in shown]:
        figure.supxlabel(f"not computed here (see --list-weights): {', '.join(absent)}", fontsize=7)
    return figure


def curve_panels(lines: dict, measures: list[Measure], flat: dict[str, float] | None = None):
    """The panels of `curves.step_curves`'s result; `flat`: values of the LR images, drawn as dashed lines."""
    figure = new_figure(3.4 * len(measures), 2.8)
    axes = figure.subplots(1, len(measures), squeeze=False)[0]
    for axis, measure in zip(axes, measures, strict=True):
        for index, (name, values) in enumerate(lines.items()):
            steps, means = zip(*values[measure.name], strict=True)
            axis.plot(steps, means, marker="o", markersize=3, label=name, color=COLOURS[index % len(COLOURS)])
        if flat and measure.name in flat:
            axis.axhline(flat[measure.name], linestyle="--", linewidth=1, color="gray", label="LR (bicubic)")
        axis.invert_xaxis()
        axis.set_xlabel("timestep")
        axis.set_ylabel(f"{measure.label} {measure.arrow}")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return figure


def prompts_figure(inputs: Inputs, prompts: list[str], weights: Path | None, device: str):
    """Softmax over CLIP similarities (ViT-B/32) of one image with each prompt."""
    from consissr.evaluation.learned import prompt_similarities

    if len(prompts) < 2 or len(inputs.images) != 1:
        raise UserError("this figure compares prompts: give --prompts 'A' 'B' ... and one --image of --hr or --lr")
    files = folders.list_images(inputs.hr or inputs.needed("lr"))
    image = folders.read_image(files[_chosen(inputs, list(files))[0]])
    shares = prompt_similarities(image, prompts, weights, device)
    figure = new_figure(7.5, 0.5 * len(prompts) + 1.6)
    left, right = figure.subplots(1, 2)
    left.imshow(image[0].permute(1, 2, 0).numpy())
    left.axis("off")
    right.barh(range(len(prompts)), shares, color=COLOURS[0])
    right.set_yticks(range(len(prompts)), prompts, fontsize=7)
    right.invert_yaxis()
    right.set_xlabel("softmax of 100 x cosine similarity")
    right.margins(x=0.15)
    for row, share in enumerate(shares):
        right.text(share, row, f" {share:.1%}", va="center", fontsize=7)
    return figure


# --- pixels ---


def _pairs(inputs: Inputs) -> folders.Pairs:
    return folders.pair(inputs.results, inputs.hr, inputs.lr)


def _chosen(inputs: Inputs, images: Sequence[str]) -> list[str]:
    folders.check_images(inputs.images, images)
    return inputs.images or list(images)[:1]


def _overview(inputs: Inputs, pairs: folders.Pairs, name: str) -> tuple:
    """The LR image (without one the first result) with the box drawn in its own scale."""
    path = pairs.lr[name] if pairs.lr else pairs.methods[0].runs[0][name]
    pixels = _pixels(path)
    width, height = pairs.sizes[name]
    factor = pixels.shape[1] / width
    box = inputs.box or _middle(width, height)
    return ("LR" if pairs.lr else pairs.methods[0].name, pixels, tuple(side * factor for side in box))


def _crop(path: Path, box: tuple[int, int, int, int] | None) -> np.ndarray:
    pixels = _pixels(path)
    x, y, width, height = box or _middle(pixels.shape[1], pixels.shape[0])
    if min(x, y) < 0 or min(width, height) < 1 or x + width > pixels.shape[1] or y + height > pixels.shape[0]:
        raise UserError(f"--box {x},{y},{width},{height} leaves {path}, which is {pixels.shape[1]}x{pixels.shape[0]}")
    return pixels[y : y + height, x : x + width]


def _middle(width: int, height: int) -> tuple[int, int, int, int]:
    return width // 3, height // 3, width // 3, height // 3


def _pixels(path: Path) -> np.ndarray:
    """(H, W, 3) in [0, 1]."""
    return folders.read_image(path)[0].permute(1, 2, 0).numpy()


def new_figure(width: float, height: float):
    """An empty matplotlib figure of this size in inches. UserError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures are drawn with matplotlib: pip install 'matplotlib>=3.8'") from None
    return Figure(figsize=(width, height), layout="constrained")
