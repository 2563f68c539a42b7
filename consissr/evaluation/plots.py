"""Drawings in SVG: how a metric spreads over images, method by method, and all of them on one sheet for slides."""

import html
import textwrap

import numpy as np

from consissr.evaluation.evaluate import Evaluation
from consissr.evaluation.markdown import one_line
from consissr.evaluation.protocols import Measure
from consissr.evaluation.summary import per_image

COLOURS = ("#2470c8", "#d1603d", "#2a9d5c", "#8e5bd0", "#b8860b", "#0f8b8d", "#c23b75", "#6b705c")
WIDTH, ROW, LABEL, MARGIN = 340, 26, 18, 8  # pixels: of a plot, of a method's strip, of its name, at the sides
MANY = 150
"""Images above which a histogram stands for the dots, which would hide the box."""
BINS = 48
COLUMNS = 3
"""Plots side by side on the sheet."""


def distribution_plot(measure: Measure, values: dict[str, np.ndarray]) -> tuple[str, int]:
    """Elements of an SVG of WIDTH pixels, and its height.

    Per method a dot for each image that has a value (or a histogram), the box of the quartiles, and the mean (a rhomb,
    and its value behind the name).
    """
    values = {name: known for name, points in values.items() if len(known := points[~np.isnan(points)])}
    if not values:
        return "", 0
    low = min(float(v.min()) for v in values.values())
    high = max(float(v.max()) for v in values.values())
    spread = (high - low) or 1.0

    def x(value: float) -> float:
        return MARGIN + (value - low) / spread * (WIDTH - 2 * MARGIN)

    title = f"{measure.label} {measure.arrow} (typical: {measure.span})"
    drawn = [f'<text x="{MARGIN}" y="14" font-size="13" font-weight="600">{html.escape(title)}</text>']
    y = LABEL + 4
    for index, (name, points) in enumerate(values.items()):
        colour, strip = COLOURS[index % len(COLOURS)], y + LABEL
        middle = strip + ROW / 2
        label = f"{one_line(name)}  {points.mean():.{measure.digits}f}"
        drawn.append(f'<text x="{MARGIN}" y="{strip - 4}" font-size="12">{html.escape(label)}</text>')
        drawn.append(_histogram(points, x, strip, colour) if len(points) > MANY else _dots(points, x, middle, colour))
        first, median, third = (x(value) for value in np.quantile(points, [0.25, 0.5, 0.75]))
        box = f'x="{first:.1f}" y="{strip + 6}" width="{third - first:.1f}" height="{ROW - 12}"'
        drawn.append(f'<rect {box} fill="{colour}" fill-opacity=".15" stroke="{colour}" stroke-width="1.5"/>')
        drawn.append(f'<path d="M{median:.1f} {strip + 6}v{ROW - 12}" stroke="{colour}" stroke-width="2"/>')
        mean = x(float(points.mean()))
        drawn.append(f'<path d="M{mean - 5:.1f} {middle}l5 -5l5 5l-5 5z" fill="{colour}"/>')
        y = strip + ROW
    drawn.append(f'<path d="M{MARGIN} {y + 4}H{WIDTH - MARGIN}" stroke="currentColor" opacity=".4"/>')
    for anchor, value in (("start", low), ("middle", (low + high) / 2), ("end", high)):
        text = f"{value:.{measure.digits}f}"
        drawn.append(f'<text x="{x(value):.1f}" y="{y + 18}" font-size="11" text-anchor="{anchor}">{text}</text>')
    return "".join(drawn), y + 24


def _dots(points: np.ndarray, x, middle: float, colour: str) -> str:
    """One path of round dots, spread in height so that they stay apart."""
    path = "".join(f"M{x(p):.1f} {middle + (i * 7 % 17 - 8) * 0.9:.1f}h0" for i, p in enumerate(points))
    return f'<path class="dots" d="{path}" stroke="{colour}" stroke-width="4" stroke-linecap="round" opacity=".4"/>'


def _histogram(points: np.ndarray, x, top: float, colour: str) -> str:
    """One path of bars, the fullest as high as the strip."""
    counts, edges = np.histogram(points, BINS)
    bottom = top + ROW
    path = "".join(
        f"M{x(left):.1f} {bottom:.1f}V{bottom - ROW * count / counts.max():.1f}H{x(right):.1f}V{bottom:.1f}z"
        for count, left, right in zip(counts, edges, edges[1:], strict=False) if count
    )  # fmt: skip
    return f'<path class="histogram" d="{path}" fill="{colour}" opacity=".35"/>'


def plots(evaluation: Evaluation) -> list[tuple[str, int]]:
    """One distribution plot per metric that has values per image; runs are averaged."""
    drawn = []
    for measure in per_image(evaluation):
        values = {name: table[measure.name].mean(axis=0) for name, table in evaluation.values.items()}
        drawn.append(distribution_plot(measure, values))
    return [plot for plot in drawn if plot[0]]


def inline_svgs(evaluation: Evaluation) -> str:
    """The plots as SVG elements of a page."""
    head = f'<svg width="{WIDTH}" viewBox="0 0 {WIDTH} {{0}}" role="img" fill="currentColor">{{1}}</svg>'
    return "".join(head.format(height, elements) for elements, height in plots(evaluation))


def summary_svg(evaluation: Evaluation) -> str:
    """All plots on one white sheet, COLUMNS side by side: a file for slides."""
    drawn = plots(evaluation)
    height = max((height for _, height in drawn), default=0) + 12
    columns = min(COLUMNS, max(1, len(drawn)))
    width, rows = columns * (WIDTH + 16), -(-len(drawn) // columns)
    placed = "".join(
        f'<g transform="translate({index % columns * (WIDTH + 16) + 8} {index // columns * height + 8})">{elements}</g>'
        for index, (elements, _) in enumerate(drawn)
    )
    lines = textwrap.wrap(f"{len(evaluation.pairs.images)} images; {evaluation.protocol.as_text()}", width // 6)
    note = "".join(f'<tspan x="16" dy="14">{html.escape(line)}</tspan>' for line in lines)
    top, bottom = rows * height, rows * height + 14 * len(lines) + 12
    size = f'width="{width}" height="{bottom}" viewBox="0 0 {width} {bottom}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" fill="#111" color="#111">'
        f'<rect width="100%" height="100%" fill="#fff"/>{placed}<text y="{top}" font-size="11">{note}</text></svg>\n'
    )
