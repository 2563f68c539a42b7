"""How time and memory grow with the size of a result that is computed in tiles."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from consissr.bench.footprint import footprint


def exponent(areas: list[float], seconds: list[float]) -> float:
    """p of seconds = c area^p, fitted in logarithms."""
    return float(np.polyfit(np.log(areas), np.log(seconds), 1)[0])


def grow(model: str, sides: list[int], tile: int, runs: int, device: str = "cpu") -> dict[str, Any]:
    """Results of side x side pixels in tiles of `tile`: medians of wall and CPU seconds, peak memory, the exponents.

    Beside them the peak memory of the smallest result in one piece, untiled.
    """
    import torch

    from consissr.restorer import Restorer

    restorer = Restorer.load(model, device=device, tile=tile, vae_tile=tile)
    inputs = {side: torch.rand(1, 3, side // 4, side // 4) * 2 - 1 for side in sides}
    restorer(inputs[min(sides)], 4)
    times: dict[int, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(runs):
        for side, lq in inputs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            restorer(lq, 4)
            times[side].append((time.perf_counter() - wall, time.process_time() - cpu))
    rows = []
    for side in sides:
        wall, cpu = np.median(times[side], axis=0).tolist()
        peak = footprint(model, side, device=device, tile=tile, vae_tile=tile).peak
        rows.append({"side": side, "wall": wall, "cpu": cpu, "peak_mb": peak})
    whole = footprint(model, min(sides), device=device, tile=0, vae_tile=0).peak
    areas = [float(side * side) for side in sides]
    fits = {kind: exponent(areas, [row[kind] for row in rows]) for kind in ("wall", "cpu", "peak_mb")}
    return {"model": model, "tile": tile, "rows": rows, "exponents": fits, "untiled_peak_mb": whole}
