"""Training checkpoints: `output_dir/checkpoint-{step}`, complete or absent, never half-written.

A checkpoint holds the trained tensors, the optimisers' states and the step. Nothing else is needed to go on: data
order, crops, degradations and noise are functions of (seed, place in the sequence). Folders appear and go by renaming,
which a kill or a loss of power cannot interrupt half-way.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from consissr.errors import UserError

NAME = re.compile(r"checkpoint-(\d+)$")
STALE = ".stale-*"
"""Folders being written or removed; what a killed run left of them goes with the next checkpoint."""


def step_of(path: Path) -> int:
    """The optimiser steps that the checkpoint `path` has behind it."""
    return int(json.loads((path / "state.json").read_text())["step"])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if NAME.match(p.name) and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(NAME.match(p.name).group(1)))


def last_good(output_dir: Path) -> str:
    """The newest complete checkpoint in words, for messages."""
    found = list_checkpoints(output_dir)
    return f"last good checkpoint: {found[-1] if found else 'none'}"


def save_checkpoint(output_dir: Path, step: int, state: dict[str, Any], limit: int) -> Path:
    """Write `state` (tensors and plain values) as the checkpoint of `step`; keep the newest `limit`.

    Raises UserError if the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    import torch

    target = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".stale-partial-{step}"
    try:
        for left in output_dir.glob(STALE):
            shutil.rmtree(left)
        partial.mkdir(parents=True)
        with open(partial / "state.pt", "wb") as file:  # given a path, torch would hide the system's words
            torch.save(state, file)
        (partial / "state.json").write_text(json.dumps({"step": step}))
        for place in (*partial.iterdir(), partial):
            flush(place)
        if target.exists():
            os.rename(target, output_dir / f".stale-replaced-{step}")
        os.rename(partial, target)
        flush(output_dir)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"checkpoint of step {step} could not be written to {output_dir} ({reason(error)}); "
            f"free some space and continue with --resume latest ({last_good(output_dir)})"
        ) from error
    for old in list_checkpoints(output_dir)[:-limit]:
        os.rename(old, output_dir / f".stale-{old.name}")
    for left in output_dir.glob(STALE):
        shutil.rmtree(left, ignore_errors=True)
    return target


def flush(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, outlast a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: BaseException) -> str:
    """The operating system's words where torch hides them behind its own."""
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return str(error).strip().splitlines()[0]


def find_checkpoint(output_dir: Path, resume: str) -> Path:
    """The checkpoint that `--resume` names: 'latest' or a path. Raises UserError if there is none."""
    if resume == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            raise UserError(f"--resume latest: {output_dir} has no complete checkpoint; start anew without --resume")
        return found[-1]
    path = Path(resume)
    if not (path / "state.json").is_file():
        raise UserError(f"--resume {resume}: not a complete checkpoint folder; give 'latest' or .../checkpoint-STEP")
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """State written by `save_checkpoint`, on the CPU. Raises UserError if the file is damaged."""
    import torch

    try:
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}): name an earlier checkpoint") from error
