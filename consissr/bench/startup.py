"""How long it takes until something can be done. Nothing heavy is imported here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

IMPORT = "import time; t = time.perf_counter(), time.process_time(); import consissr"
HEAVY = """
import time
import consissr.restorer
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
t = time.perf_counter(), time.process_time()
consissr.restorer.Restorer.load({model!r}, device="cpu")
"""
TELL = "\nprint(time.perf_counter() - t[0], time.process_time() - t[1])"
LIMITS = {"import consissr": 0.5, "infer.py --help": 1.5, "load, after imports": 2.0}
"""Seconds."""


def seconds(call: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a process; those that it prints itself, where it does."""
    begin, before = time.perf_counter(), os.times()
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    after = os.times()
    last = (done.stdout.split("\n")[-2:] or [""])[0].split()
    if "-c" in call and len(last) == 2:
        return float(last[0]), float(last[1])
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begin, cpu


def measure(model: str, runs: int) -> list[dict]:
    """Medians over `runs` processes each: what, wall and CPU seconds, the limit."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "DIFFUSERS_VERBOSITY": "error"}
    calls = {
        "import consissr": [sys.executable, "-c", IMPORT + TELL],
        "infer.py --help": [sys.executable, str(root / "scripts" / "infer.py"), "--help"],
        "load, after imports": [sys.executable, "-c", HEAVY.format(model=model) + TELL],
    }
    found = []
    for what, call in calls.items():
        times = [seconds(call, environment) for _ in range(runs)]
        wall, cpu = (median(column) for column in zip(*times, strict=True))
        found.append({"what": what, "wall": wall, "cpu": cpu, "limit": LIMITS[what]})
    return found
