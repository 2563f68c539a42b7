"""The papers' figures from folders of results, each as PNG and PDF.

crops     several methods on one crop (ConsisSR Fig. 7)
noises    two runs of each method side by side (CCSR Fig. 1, 4)
extremes  the runs of best and worst PSNR (CCSR Fig. 5 to 7)
steps     the pictures that sampling steps expect (ConsisSR Fig. 2; CCSR Fig. 2, right)
curves    metrics over timesteps (ConsisSR Fig. 6, 8; CCSR Fig. 2, left)
prompts   CLIP similarity of an image with candidate prompts (ConsisSR Fig. 4)
"""

import argparse
from collections.abc import Callable
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
    if table.figure == "curves":
        figure = curves_figure(table, inputs, args)
    elif table.figure == "prompts":
        figure = prompts_figure(inputs, args.prompts, args.weights, args.device)
    else:
        makers: dict[str, Callable[[Inputs], list[Row]]] = {
            "crops": crop_rows, "noises": noise_rows, "extremes": extreme_rows, "steps": step_rows,
        }  # fmt: skip
        if table.figure not in makers:
            raise UserError(f"{table.name} asks for an unknown figure '{table.figure}'; known: {', '.join(makers)}")
        figure = picture_grid(makers[table.figure](inputs))
    figure.suptitle(table.title, fontsize=9)
    paths = [args.output / f"{table.name.replace('/', '_')}.{kind}" for kind in ("png", "pdf")]
    args.output.mkdir(parents=True, exist_ok=True)
    for path in paths:
        figure.savefig(path, dpi=200, bbox_inches="tight")
    return paths


# --- grids of pictures: a row is a list of (title, pixels, box drawn into it) ---

Row = list[tuple[str, np.ndarray, tuple[int, int, int, int] | None]]


def crop_rows(inputs: Inputs) -> list[Row]:
    """Per image: LR with the box, then each method's crop and HR's."""
    return [
        [_overview(inputs, pairs, name)]
        + [(m.name, _crop(m.runs[0][name], inputs.box), None) for m in pairs.methods]
        + ([("HR", _crop(pairs.hr[name], inputs.box), None)] if pairs.hr else [])
        for pairs in [_pairs(inputs)]
        for name in _chosen(inputs, pairs)
    ]


def noise_rows(inputs: Inputs) -> list[Row]:
    """Per image and method: the same crop of the first two runs."""
    pairs = _repeated(_pairs(inputs))
    rows = []
    for name in _chosen(inputs, pairs):
        row = [_overview(inputs, pairs, name)]
        for method in pairs.methods:
            row += [(f"{method.name}, noise {i + 1}", _crop(method.runs[i][name], inputs.box), None) for i in (0, 1)]
        rows.append(row + ([("HR", _crop(pairs.hr[name], inputs.box), None)] if pairs.hr else []))
    return rows


def extreme_rows(inputs: Inputs) -> list[Row]:
    """Per image and method: the runs of best and worst PSNR (on Y), with their values; methods of one run show it."""
    from consissr.evaluation.metrics import psnr

    inputs.needed("hr")
    pairs = _pairs(inputs)
    rows = []
    for name in _chosen(inputs, pairs):
        row = [_overview(inputs, pairs, name)]
        reference = folders.read_image(pairs.hr[name])
        for method in pairs.methods:
            values = [psnr(folders.read_image(run[name]), reference).item() for run in method.runs]
            order = [int(np.argmax(values)), int(np.argmin(values))] if len(values) > 1 else [0]
            words = ("best of {}", "worst of {}") if len(values) > 1 else ("",)
            row += [
                (
                    f"{method.name} {word.format(len(values))} {values[i]:.2f} dB",
                    _crop(method.runs[i][name], inputs.box),
                    None,
                )
                for word, i in zip(words, order, strict=True)
            ]
        rows.append([*row, ("HR", _crop(pairs.hr[name], inputs.box), None)])
    return rows


def step_rows(inputs: Inputs) -> list[Row]:
    """Per method and image: what evenly chosen sampling steps expect the result to be, noisiest first."""
    from consissr.evaluation.curves import step_pictures

    rows = []
    for method, folder in inputs.results.items():
        pictures = step_pictures(folders.list_runs(folder)[0])
        for name in inputs.images or [next(iter(pictures))]:
            if name not in pictures:
                known = ", ".join(list(pictures)[:3])
                raise UserError(f"{folder} has no step pictures of '{name}'; it has {known}, ...")
            steps = list(pictures[name].items())
            chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_STEPS)).round().astype(int))
            rows.append([(f"{method}, t = {steps[i][0]}", _pixels(steps[i][1]), None) for i in chosen])
    return rows


def picture_grid(rows: list[Row]):
    """A matplotlib figure of pictures in rows."""
    plots = pyplot()
    columns = max(len(row) for row in rows)
    size = (INCH * columns, INCH * len(rows) * 1.15 + 0.3)
    figure, axes = plots.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for line, row in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, (title, pixels, box) in zip(line, row, strict=False):
            axis.imshow(pixels, interpolation="nearest")
            axis.set_title(title, fontsize=6)
            if box:
                patch = plots.Rectangle(box[:2], *box[2:], fill=False, edgecolor="red", linewidth=1)
                axis.add_patch(patch)
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
    figure, axes = pyplot().subplots(
        1, len(measures), figsize=(3.4 * len(measures), 2.8), squeeze=False, layout="constrained"
    )
    for axis, measure in zip(axes[0], measures, strict=True):
        for index, (name, values) in enumerate(lines.items()):
            steps, means = zip(*values[measure.name], strict=True)
            axis.plot(steps, means, marker="o", markersize=3, label=name, color=COLOURS[index % len(COLOURS)])
        if flat and measure.name in flat:
            axis.axhline(flat[measure.name], linestyle="--", linewidth=1, color="gray", label="LR (bicubic)")
        axis.invert_xaxis()
        axis.set_xlabel("timestep")
        axis.set_ylabel(f"{measure.label} {measure.arrow}")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    return figure


def prompts_figure(inputs: Inputs, prompts: list[str], weights: Path | None, device: str):
    """Softmax over CLIP similarities (ViT-B/32) of one image with each prompt."""
    from consissr.evaluation.learned import prompt_similarities

    if len(prompts) < 2 or len(inputs.images) != 1:
        raise UserError("this figure compares prompts: give --prompts 'A' 'B' ... and one --image of --hr or --lr")
    files = folders.list_images(inputs.hr or inputs.needed("lr"))
    if inputs.images[0] not in files:
        raise UserError(f"there is no image '{inputs.images[0]}'; names come without extension")
    image = folders.read_image(files[inputs.images[0]])
    shares = prompt_similarities(image, prompts, weights, device)
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(7.5, 0.5 * len(prompts) + 1.6), layout="constrained")
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


# --- parts ---


def _pairs(inputs: Inputs) -> folders.Pairs:
    return folders.pair(inputs.results, inputs.hr, inputs.lr)


def _repeated(pairs: folders.Pairs) -> folders.Pairs:
    single = [method.name for method in pairs.methods if len(method.runs) < 2]
    if single:
        raise UserError(f"two noises need repeated runs (infer.py --repeat 2); {', '.join(single)} has one")
    return pairs


def _chosen(inputs: Inputs, pairs: folders.Pairs) -> list[str]:
    unknown = [name for name in inputs.images if name not in pairs.images]
    if unknown:
        example = pairs.images[0]
        raise UserError(f"there is no image '{unknown[0]}'; names come without extension, for instance {example}")
    return inputs.images or pairs.images[:1]


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


def close(figure) -> None:
    """Free a figure that is written."""
    pyplot().close(figure)


def pyplot():
    """matplotlib's drawing functions, for files rather than windows. UserError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures are drawn with matplotlib: pip install 'matplotlib>=3.8'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
