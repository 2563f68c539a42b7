"""Our rows of a table, restored by scripts/infer.py before they are measured."""

import argparse
import subprocess
import sys
from pathlib import Path

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
        folder = output / "results" / f"{row.strip('()+').replace('/', '-').replace(',', '_')}"
        command = [sys.executable, str(script), "-i", str(lr), "-o", str(folder), "-m", model, "--skip-existing"]
        command += [*table.ours[row].get("flags", []), "--repeat", str(repeat), *flags]
        if subprocess.run(command).returncode != 0:
            raise UserError(f"{row} could not be restored; the command was: {' '.join(command)}")
        folders[row] = folder
    return folders
