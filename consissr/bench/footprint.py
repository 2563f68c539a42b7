"""Peak memory of restoring one image, above what the loaded model takes. Each measurement has a process of its own."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from consissr.errors import UserError

MB = 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Linux: a process's memory figures, and where writing 5 starts its peak anew."""


@dataclass
class Footprint:
    """What one image of side x side pixels took."""

    side: int
    """Of the result, in pixels."""
    loaded: float
    """MB before: the program and the model."""
    peak: float
    """MB above that at most."""
    seconds: float


def footprint(
    model: str, side: int, scale: int = 4, device: str = "cpu", precision: str = "auto", **settings: Any
) -> Footprint:
    """Restores an image of random pixels to side x side with `model` (name or folder) in a new process.

    settings: fields of SamplerConfig, such as tile=256, vae_tile=256. Raises UserError if the restoration failed.
    """
    if side < scale or side % scale:
        raise UserError(f"a side of {side} px is no multiple of the scale {scale}: use one that is")
    task = {"side": side, "scale": scale, "load": {"name": model, "device": device, "precision": precision} | settings}
    call = [sys.executable, "-m", "consissr.bench.footprint", json.dumps(task)]
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{side}x{side} with {model} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def measure(side: int, scale: int, load: dict[str, Any]) -> Footprint:
    """The measurement itself, in this process. A small image goes first: what libraries set up once doesn't count."""
    import torch

    from consissr.restorer import Restorer

    restorer = Restorer.load(**load)
    image = torch.rand(1, 3, side // scale, side // scale, generator=torch.Generator().manual_seed(0)) * 2 - 1
    restorer(image[..., :16, :16], scale)
    before, begin = start_peak(restorer.device.type), time.perf_counter()
    restorer(image, scale)
    return Footprint(side, before / MB, (peak(restorer.device.type) - before) / MB, time.perf_counter() - begin)


def start_peak(device: str) -> int:
    """Start the peak anew, where the system can; bytes in use.

    What the program has freed goes back to the system first: a peak that fits into it would otherwise not be seen.
    """
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    import psutil

    from consissr.models.memory import trim_heap

    trim_heap()
    if CLEAR.exists():
        CLEAR.write_text("5")
    return psutil.Process().memory_info().rss


def peak(device: str) -> int:
    """Most bytes in use since `start_peak`, or since the process began where the system cannot start anew."""
    if not device.startswith("cuda") and STATUS.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())[1]) * 1024
    from consissr.models.memory import peak_memory_mb

    return peak_memory_mb() * MB


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(asdict(measure(**json.loads(sys.argv[1])))) + "\n")
    except UserError as error:
        sys.exit(str(error))
