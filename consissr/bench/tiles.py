"""CPU seconds and memory per megapixel of results from small to very large, each in a process of its own.

What one result took from PNG file to PNG file, as scripts/infer.py does it, after the model was warmed up:

    cpu_seconds, per_megapixel, ratio   CPU seconds, these per megapixel, and those to the smallest result's
    loaded_mb, peak_mb                  of the whole process before, with the program and the model, and at most
    tiles                               how many the image was restored in; 0 for one piece
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from consissr.bench.process import MB, apart, peak, start_peak
from consissr.errors import UserError


def sides(megapixels: float, scale: float) -> tuple[int, int]:
    """Width and height of an input, 4 to 3, whose result has so many megapixels."""
    height = (megapixels * 1e6 * 3 / 4) ** 0.5 / scale
    return max(round(height * 4 / 3), 1), max(round(height), 1)


def table(model: str, sizes: list[float], load: dict[str, Any], scale: float = 2.0) -> list[dict[str, Any]]:
    """One row per size in megapixels. load: more arguments of Restorer.load. UserError if a process failed."""
    rows: list[dict[str, Any]] = []
    for megapixels in sizes:
        given = {"model": model, "megapixels": megapixels, "scale": scale, "load": load}
        row = apart(f"{megapixels:g} megapixels with {model}", measure, **given)
        rows.append(row | {"ratio": row["per_megapixel"] / (rows[0] if rows else row)["per_megapixel"]})
    return rows


def measure(model: str, megapixels: float, scale: float, load: dict[str, Any]) -> dict[str, Any]:
    """The measurement itself, in this process. A small image goes first: what is set up once doesn't count."""
    import torch
    from rich.console import Console

    from consissr.images import codec
    from consissr.images.resize import resize
    from consissr.inference import batch, jobs, progress
    from consissr.models.memory import set_heap
    from consissr.restorer import Restorer

    set_heap()
    restorer = Restorer.load(model, **load)
    width, height = sides(megapixels, scale)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, max(height // 40, 2), max(width // 40, 2), generator=generator) / 3
    lq = resize(coarse, (height, width)).add_(0.03 * torch.randn(1, 1, height, width, generator=generator))
    lq.clamp_(-1, 1)
    restorer(lq[..., :64, :64].contiguous(), scale)
    tiles = [0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{width * height * scale**2 / 1e6:.2f} megapixels.png"
        codec.write(path, codec.Photo(lq[0], None, codec.Form()))
        del lq
        (job,) = jobs.plan([str(path)], jobs.Naming(output=path.parent / "restored", scale=scale))
        with progress.Terminal(Console(stderr=True), 1) as terminal:

            def on_tile(*now: Any) -> None:
                tiles.append(now[2])
                terminal.on_tile(*now)

            report = batch.Report(on_tile=on_tile)
            loaded, begin = start_peak(restorer.device.type) / MB, time.process_time()
            batch.run(restorer, [job], batch.Settings(scale=scale), report)
            seconds = time.process_time() - begin
    if not report.counts["done"]:
        raise UserError(job.error or "the result was not written")
    area = job.out_width * job.out_height / 1e6
    return {
        "megapixels": round(area, 2), "width": job.out_width, "height": job.out_height, "cpu_seconds": seconds,
        "per_megapixel": seconds / area, "ratio": 1.0, "loaded_mb": loaded, "peak_mb": peak(restorer.device.type) / MB,
        "tiles": tiles[-1], "precision": restorer.precision,
    }  # fmt: skip
