"""Tables of what was measured, for the terminal."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PARTS = ("prepare", "prompt", "encode", "step", "decode", "colour", "write")
PATHS = ("reference", "ours")
EQUAL = 0.05
"""Relative difference up to which results are those of the same mathematics in any precision (float32: about 1e-5)."""

WIDE = 160
"""Columns of a table in a file, in characters: whole words."""


def times(value: float | None) -> str:
    """A ratio."""
    return "" if value is None else f"{value:.2f}"


def inference(measured: dict[str, Any]) -> Iterator[Table | str]:
    """Seconds per image of each part, ratios, share of the ceiling; work, memory, difference."""
    question = measured["question"]
    title = f"{question['size']}, {question['method']['name']}, {question['pixels']} px, {question['device']}"
    title += ", ours compiled" if question["compile"] else ""
    table = Table(title=f"{title}: seconds per image (a step: per evaluation), median [least to most]")
    paths = [path for path in PATHS if path in measured]
    for name in ("part", *paths, *(f"{path}, CPU s" for path in paths), "times as fast", "by CPU s"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in ("total", *PARTS):
        cells = [measured[path].get(part) for path in paths]
        if not any(cells):
            continue
        wall = [c and "{median:.3f} [{min:.3f} to {max:.3f}]".format(**c["wall"]) or "" for c in cells]
        cpu = [c and f"{c['cpu']['median']:.3f}" or "" for c in cells]
        rates = measured.get("speed_ratio", {}).get(part, {})
        table.add_row(part, *wall, *cpu, times(rates.get("wall")), times(rates.get("cpu")))
    yield table
    shares = Table(title="work per image (G multiply-accumulates), and share of the measured matrix-product ceiling")
    for name in ("part", *(f"{path}, {kind}" for path in paths for kind in ("G", "of time", "of CPU s"))):
        shares.add_column(name, justify="left" if name == "part" else "right")
    for part in ("total", "encode", "step", "decode"):
        row = []
        for path in paths:
            row.append(f"{measured['macs'][path][part] / 1e9:.2f}")
            row += [f"{100 * (measured[path][part][f'ceiling_{kind}'] or 0):.0f} %" for kind in ("wall", "cpu")]
        shares.add_row(part, *row)
    yield shares
    yield f"ceiling: {measured['ceiling_macs_per_second']['wall'] / 1e9:.1f} G multiply-accumulates per second"
    if "relative_difference" in measured:
        equal = "" if measured["relative_difference"] < EQUAL else f": NOT THE SAME RESULT (above {EQUAL:g})"
        yield f"relative difference of the results: {measured['relative_difference']:.1e}{equal}"
    for path, megabytes in measured.get("memory_mb", {}).items():
        yield f"peak memory above imports, {path}: {megabytes:.0f} MB"
    if len(measured.get("memory_mb", {})) == 2:
        yield f"ours / reference: {measured['memory_mb']['ours'] / measured['memory_mb']['reference']:.2f}"


def plain(rows: list[dict[str, Any]], title: str) -> Table:
    """One row per dictionary."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


def degradation(rows: list[dict[str, Any]], preset: str) -> list[Table | str]:
    """basicsr's data path and ours."""
    theirs, ours = (row["images_per_second"] for row in rows)
    table = plain(rows, f"degradation '{preset}', 400x400: CPU ms per image, images/s and core")
    return [table, f"ours is {ours / theirs:.2f} times as fast"]


def show(shown: Iterable[Table | str], measured: Any, file: Path | None) -> None:
    """What was measured, on the terminal, and all of it in `file`."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    console.print(*shown, sep="\n")
    if file:
        file.write_text(json.dumps(measured, indent=1, default=str))
