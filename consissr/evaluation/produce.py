"""Our rows of a table, restored by scripts/infer.py before they are measured."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from consissr.config import nearest
from consissr.errors import UserError
from consissr.evaluation.tables import Table


def ours(table: Table, args: argparse.Namespace, script: Path) -> dict[str, Path]:
    """The rows that --run asks for, restored from --lr: result folders by row; none without --run."""
    if not args.run:
        return {}
    if args.lr is None:
        raise UserError("--run restores the images of --lr: give that folder")
    models, flags = plan(table, args.run), args.infer_flags.split()
    return produce(table, models, args.lr, args.output, script, args.repeat or table.runs, flags)


def timer(run: list[str], script: Path) -> Callable[[list[str]], float] | None:
    """A function from flags of infer.py to seconds per image of the model that --run names; None without --run."""
    return (lambda flags: seconds_per_image(run[0], flags, script)) if run else None


def seconds_per_image(model: str, flags: list[str], script: Path, repeats: int = 4) -> float:
    """Seconds of the fastest of `repeats` restorations of a 128x128 image to 512x512 on this machine, by infer.py."""
    with tempfile.TemporaryDirectory() as scratch:
        noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
        image, log = Path(scratch) / "lq.png", Path(scratch) / "log.jsonl"
        Image.fromarray(noise).save(image)
        command = [sys.executable, str(script), "-i", str(image), "-o", f"{scratch}/results", "-m", model, "-s", "4"]
        command += [*flags, "--repeat", str(repeats), "--json", str(log), "--quiet"]
        if subprocess.run(command).returncode != 0:
            raise UserError(f"{model} could not be timed; the command was: {' '.join(command)}")
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        return min(entry["seconds"] for entry in entries if entry.get("status") == "done")


def plan(table: Table, requests: list[str]) -> dict[str, str]:
    """`MODEL` (every row of ours that one model gives) or `ROW=MODEL` -> model by row."""
    models: dict[str, str] = {}
    for request in requests:
        row, equals, model = request.rpartition("=")
        if equals and row not in table.ours:
            raise UserError(f"{table.name} has no row of ours called '{row}'{nearest(row, list(table.ours))}")
        rows = [row] if equals else [name for name, entry in table.ours.items() if not entry.get("variant")]
        models |= dict.fromkeys(rows, model if equals else request)
    return models


def produce(
    table: Table, models: dict[str, str], lr: Path, output: Path, script: Path, repeat: int, flags: list[str]
) -> dict[str, Path]:
    """Restore the LR folder once per row, `repeat` times with different noise; existing files are kept."""
    folders = {}
    for row, model in models.items():
        folder = output / "results" / re.sub(r"[^A-Za-z0-9.]+", "-", row).strip("-")
        command = [sys.executable, str(script), "-i", str(lr), "-o", str(folder), "-m", model, "--skip-existing"]
        command += [*table.ours[row].get("flags", []), "--repeat", str(repeat), *flags]
        if subprocess.run(command).returncode != 0:
            raise UserError(f"{row} could not be restored; the command was: {' '.join(command)}")
        folders[row] = folder
    return folders
