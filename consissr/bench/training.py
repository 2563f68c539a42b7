"""Images per second and peak memory of short training runs, as a stage's configuration says and with switches."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from consissr.errors import UserError

STEPS = 6
WARM = 2
"""Optimiser steps of a run, and how many of the first are not counted."""


def measure(configs: list[str], overrides: list[str], switches: list[str]) -> list[dict[str, Any]]:
    """Every config as it is and with each switch (key=value), each in a process of its own."""
    if not configs:
        raise UserError("name stages to run (--config), or photographs to read (--data)")
    rows = []
    for config in configs:
        for switch in [[], *([switch] for switch in switches)]:
            rows.append({"config": config, "switch": " ".join(switch), **run(config, [*overrides, *switch])})
    return rows


def run(config: str, overrides: list[str]) -> dict[str, Any]:
    """One run of STEPS steps without checkpoints and validation. Raises UserError if it fails."""
    script = Path(__file__).parents[2] / "scripts" / "train.py"
    with tempfile.TemporaryDirectory() as folder:
        short = [f"steps={STEPS}", "log_every=1", f"checkpoint_every={STEPS}", f"output_dir={folder}/run"]
        rest = ["validate_every=0", "data.validation=", "tracker=none", *overrides]
        call = [sys.executable, str(script), "--config", config, *short, *rest]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{config} {' '.join(overrides)} failed: {last}")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "steps_per_second" in line][WARM:]
    seconds = sum(1 / line["steps_per_second"] for line in steps)
    images = steps[-1]["images"] // steps[-1]["step"] * len(steps)
    waiting = sum(line["data_seconds"] for line in steps) / seconds
    return {"images_per_second": images / seconds, "peak_mb": steps[-1]["peak_mb"], "waiting_for_data": waiting}
