"""CPU seconds and memory per megapixel of results from small to very large, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from consissr.bench.footprint import peak
from consissr.errors import UserError


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
    peak_mb: float
    """Of the whole process, the program and the model included."""
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
        task = {"model": model, "megapixels": megapixels, "scale": scale, "load": load}
        call = [sys.executable, "-m", "consissr.bench.tiles", json.dumps(task)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["killed"]
            raise UserError(f"{megapixels:g} megapixels with {model} failed: {lines[-1]}")
        row = Row(**json.loads(done.stdout.splitlines()[-1]))
        row.ratio = row.per_megapixel / (rows[0] if rows else row).per_megapixel
        rows.append(row)
    return rows


def measure(model: str, megapixels: float, scale: float, load: dict[str, Any]) -> Row:
    """The measurement itself, in this process."""
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
    tiles, begin = [0], time.process_time()
    y = restorer(lq, scale, on_tile=lambda done, number, share: tiles.append(number))
    size = (y.shape[3], y.shape[2])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        samples = codec.samples_for(path, codec.Photo(y[0], None, codec.Form()))
        del y  # as scripts/infer.py does
        codec.write_samples(path, samples)
    seconds, area = time.process_time() - begin, size[0] * size[1] / 1e6
    memory = peak(restorer.device.type) / 2**20
    return Row(round(area, 2), *size, seconds, seconds / area, 1.0, memory, tiles[-1], restorer.precision)


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(asdict(measure(**json.loads(sys.argv[1])))) + "\n")
    except UserError as error:
        sys.exit(str(error))
