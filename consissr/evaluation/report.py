"""The HTML report: one file that opens from disk without a network, pictures included.

It holds the table of averages, a distribution plot per metric, every image's values, and a before/after slider for the
worst and the best images (by the first metric of the first method); embedding all pictures would make it huge.
"""

import base64
import html
import io
import json
import math
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from consissr.evaluation.evaluate import Evaluation
from consissr.evaluation.folders import read_image
from consissr.evaluation.protocols import Measure
from consissr.images import codec

JPEG_QUALITY = 92
COLOURS = ("#2470c8", "#d1603d", "#2a9d5c", "#8e5bd0", "#b8860b", "#0f8b8d", "#c23b75", "#6b705c")
PLOT_WIDTH, ROW_HEIGHT, MARGIN = 340, 26, 8


def html_report(evaluation: Evaluation, pictures: int) -> str:
    """The report of `evaluation` with the pictures of its `pictures` most telling images, half worst, half best."""
    from consissr.evaluation.output import notes, table_cells

    shown = [m for m in evaluation.measures if m.name not in evaluation.unavailable and m.needs != "set"]
    header, rows, marks = table_cells(evaluation)
    values = {name: {m.name: table[m.name].mean(axis=0) for m in shown} for name, table in evaluation.values.items()}
    order = telling_images(evaluation, shown, pictures)
    data = {
        "notes": notes(evaluation),
        "table": {"header": header, "rows": rows, "marks": marks},
        "measures": [{"name": m.name, "label": m.label, "arrow": m.arrow, "higher": m.higher, "digits": m.digits}
                     for m in shown],
        "methods": [method.name for method in evaluation.pairs.methods],
        "images": evaluation.pairs.images,
        "sizes": evaluation.pairs.sizes,
        "values": {name: {k: json_values(v) for k, v in table.items()} for name, table in values.items()},
        "labels": picture_labels(evaluation),
        "pictures": {image: embedded_pictures(evaluation, image) for image in order},
    }  # fmt: skip
    plots = "".join(distribution_plot(m, {name: table[m.name] for name, table in values.items()}) for m in shown)
    template = files("consissr.evaluation").joinpath("report_template.html").read_text(encoding="utf-8")
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
    return template.replace("@PLOTS@", plots).replace("@DATA@", text)


def json_values(values: np.ndarray) -> list[float | None]:
    """Values for the page's script; JSON knows no NaN."""
    return [None if math.isnan(value) else value for value in np.round(values, 6).tolist()]


def telling_images(evaluation: Evaluation, shown: list[Measure], count: int) -> list[str]:
    """The `count` worst and best images by the first metric of the first method, worst (or without value) first."""
    names = evaluation.pairs.images
    if shown:
        values = evaluation.values[evaluation.pairs.methods[0].name][shown[0].name].mean(axis=0)
        merit = values if shown[0].higher else -values
        order = np.argsort(np.where(np.isnan(merit), -np.inf, merit), kind="stable")
        names = [names[index] for index in order]
    return names if len(names) <= count else names[: count - count // 2] + names[len(names) - count // 2 :]


def picture_labels(evaluation: Evaluation) -> list[str]:
    """Names of the pictures that each image has, in the order of the report's menus."""
    labels = ["LR"] if evaluation.pairs.lr else []
    labels += [method.name for method in evaluation.pairs.methods]
    return labels + (["HR"] if evaluation.pairs.hr else [])


def embedded_pictures(evaluation: Evaluation, image: str) -> dict[str, str]:
    """The image's pictures as data URIs by label: LR as PNG, the others as JPEG; of repeated runs the first."""
    pairs = evaluation.pairs
    pictures = {"LR": data_uri(pairs.lr[image], "PNG")} if pairs.lr else {}
    pictures |= {method.name: data_uri(method.runs[0][image], "JPEG") for method in pairs.methods}
    return pictures | ({"HR": data_uri(pairs.hr[image], "JPEG")} if pairs.hr else {})


def data_uri(path: Path, kind: str) -> str:
    array = codec.to_uint8(read_image(path)[0] * 2 - 1).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **({"quality": JPEG_QUALITY} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def distribution_plot(measure: Measure, values: dict[str, np.ndarray]) -> str:
    """SVG of one metric: per method a dot for each image that has a value, the quartile box and the mean (a rhomb)."""
    values = {name: known for name, points in values.items() if len(known := points[~np.isnan(points)])}
    if not values:
        return ""
    low = min(float(v.min()) for v in values.values())
    high = max(float(v.max()) for v in values.values())
    spread = (high - low) or 1.0
    top = 18 * len(values) + ROW_HEIGHT * len(values) + 22

    def x(value: float) -> float:
        return MARGIN + (value - low) / spread * (PLOT_WIDTH - 2 * MARGIN)

    parts = []
    for index, (name, points) in enumerate(values.items()):
        colour, y = COLOURS[index % len(COLOURS)], index * (ROW_HEIGHT + 18) + 18
        middle = y + ROW_HEIGHT / 2
        first, median, third = np.quantile(points, [0.25, 0.5, 0.75])
        parts.append(f'<text x="{MARGIN}" y="{y - 4}" font-size="12">{html.escape(name)}</text>')
        for number, point in enumerate(points):
            height = middle + (number * 7 % 17 - 8) * 0.9  # spread the dots so that they stay apart
            parts.append(f'<circle cx="{x(point):.1f}" cy="{height:.1f}" r="2" fill="{colour}" opacity=".45"/>')
        box = f'x="{x(first):.1f}" y="{y + 5}" width="{x(third) - x(first):.1f}" height="{ROW_HEIGHT - 10}"'
        parts.append(f'<rect {box} fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<path d="M{x(median):.1f} {y + 5}V{y + ROW_HEIGHT - 5}" stroke="{colour}" stroke-width="2"/>')
        mean = x(float(points.mean()))
        parts.append(f'<path d="M{mean - 5:.1f} {middle}l5 -5l5 5l-5 5z" fill="{colour}"/>')
    base = top - 16
    parts.append(f'<path d="M{MARGIN} {base}H{PLOT_WIDTH - MARGIN}" stroke="currentColor" opacity=".4"/>')
    for anchor, value in (("start", low), ("middle", (low + high) / 2), ("end", high)):
        text = f"{value:.{measure.digits}f}"
        parts.append(f'<text x="{x(value):.1f}" y="{top - 3}" font-size="11" text-anchor="{anchor}">{text}</text>')
    title = f"{measure.label} {measure.arrow} (typical: {measure.span})"
    svg = f'<svg width="{PLOT_WIDTH}" height="{top}" role="img" fill="currentColor">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{html.escape(title)}</figcaption></figure>"
