"""CPU seconds and memory per megapixel of results from small to very large, each in a process of its own."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consissr.bench.process import MB, apart, peak, start_peak


@dataclass
class Row:
    """What one result took: from pixels in memory to a written PNG file, after the model was loaded and warmed up."""

    megapixels: float
    width: int
    height: int
    cpu_seconds: float
    per_megapixel: float
    """CPU seconds per megapixel."""
    ratio: float
    """Of these to the smallest result's."""
    loaded_mb: float
    """Of the whole process before, with the program and the model."""
    peak_mb: float
    """Of the whole process at most."""
    tiles: int
    """How many the image was restored in; 0 for one piece."""
    precision: str


def sides(megapixels: float, scale: float) -> tuple[int, int]:
    """Width and height of an input, 4 to 3, whose result has so many megapixels."""
    height = (megapixels * 1e6 * 3 / 4) ** 0.5 / scale
    return max(round(height * 4 / 3), 1), max(round(height), 1)


def table(model: str, sizes: list[float], load: dict[str, Any], scale: float = 2.0) -> list[Row]:
    """One row per size in megapixels. load: more arguments of Restorer.load. UserError if a process failed."""
    rows: list[Row] = []
    for megapixels in sizes:
        given = {"model": model, "megapixels": megapixels, "scale": scale, "load": load}
        row = apart(f"{megapixels:g} megapixels with {model}", measure, **given)
        row.ratio = row.per_megapixel / (rows[0] if rows else row).per_megapixel
        rows.append(row)
    return rows


def measure(model: str, megapixels: float, scale: float, load: dict[str, Any]) -> Row:
    """The measurement itself, in this process. A small image goes first: what is set up once doesn't count."""
    import torch

    from consissr.images import codec
    from consissr.models.memory import set_heap
    from consissr.restorer import Restorer

    set_heap()
    restorer = Restorer.load(model, **load)
    width, height = sides(megapixels, scale)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, max(height // 40, 2), max(width // 40, 2), generator=generator) / 3
    lq = codec.resize(coarse, (height, width)).add_(0.03 * torch.randn(1, 1, height, width, generator=generator))
    lq.clamp_(-1, 1)
    restorer(lq[..., :64, :64].contiguous(), scale)
    loaded = start_peak(restorer.device.type) / MB
    tiles, begin = [0], time.process_time()
    y = restorer(lq, scale, on_tile=lambda done, number, share: tiles.append(number))
    size = (y.shape[3], y.shape[2])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        samples = codec.samples_for(path, codec.Photo(y[0], None, codec.Form()))
        del y  # as scripts/infer.py does
        codec.write_samples(path, samples)
    seconds, area = time.process_time() - begin, size[0] * size[1] / 1e6
    memory = peak(restorer.device.type) / MB
    return Row(round(area, 2), *size, seconds, seconds / area, 1.0, loaded, memory, tiles[-1], restorer.precision)
