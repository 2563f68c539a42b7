"""Our rows of a table, restored by scripts/infer.py before they are measured."""

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from consissr.config.loading import nearest
from consissr.errors import UserError
from consissr.evaluation import origin
from consissr.evaluation.folders import EXTENSIONS
from consissr.evaluation.tables import Table


def ours(table: Table, args: argparse.Namespace, script: Path, find: Callable[[str], Path] = Path) -> dict[str, Path]:
    """The rows that --run asks for, restored from --lr: result folders by row; none without --run.

    find: model name -> its folder (`weights.find_model`); by default names are folders.
    """
    if not args.run:
        return {}
    if args.lr is None:
        raise UserError("--run restores the images of --lr: give that folder")
    try:
        flags = shlex.split(args.infer_flags)
    except ValueError as error:
        raise UserError(f"--infer-flags {args.infer_flags} cannot be split into words ({error})") from error
    models = plan(table, args.run)
    return produce(table, models, args.lr, args.output, script, args.repeat or table.runs, flags, find)


def timer(table: Table, run: list[str], script: Path) -> Callable[[str], float] | None:
    """A function from a row of ours to seconds per image of the model that --run names for it (NaN where none)."""
    models = plan(table, run)

    def seconds(row: str) -> float:
        return seconds_per_image(models[row], table.ours[row]["flags"], script) if row in models else math.nan

    return seconds if run else None


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
    table: Table,
    models: dict[str, str],
    lr: Path,
    output: Path,
    script: Path,
    repeat: int,
    flags: list[str],
    find: Callable[[str], Path] = Path,
) -> dict[str, Path]:
    """Restore the LR folder once per row, `repeat` times with different noise; files of the same origin are kept.

    Raises UserError where infer.py fails.
    """
    results, images = {}, origin.fingerprint(lr, EXTENSIONS)
    for row, model in models.items():
        own_flags = table.ours[row].get("flags", [])
        made_of = {"model": model, "weights": contents(find(model)), "images": images, "flags": [*own_flags, *flags]}
        folder = origin.place(output / "results", re.sub(r"[^A-Za-z0-9.]+", "-", row).strip("-"), **made_of)
        command = [sys.executable, str(script), "-i", str(lr), "-o", str(folder), "-m", model, "--skip-existing"]
        command += [*own_flags, "--repeat", str(repeat), *flags]
        if subprocess.run(command).returncode != 0:
            raise UserError(f"{row} could not be restored; the command was: {' '.join(command)}")
        results[row] = folder
    return results


def contents(folder: Path) -> str:
    """Hash of the files of a model folder that results depend on; the name of one that is not on this machine."""
    return origin.fingerprint(folder, origin.MODEL_FILES) if folder.is_dir() else str(folder)
