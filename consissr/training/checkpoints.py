"""Training checkpoints: `output_dir/checkpoint-{step}`, complete or absent, never half-written.

A checkpoint holds the trained tensors, the optimisers' states and the step. Nothing else is needed to go on: data
order, crops, degradations and noise are functions of (seed, place in the sequence).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from consissr.errors import UserError

NAME = re.compile(r"checkpoint-(\d+)$")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if NAME.search(p.name) and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(NAME.search(p.name).group(1)))


def save_checkpoint(output_dir: Path, step: int, state: dict[str, Any], limit: int) -> Path:
    """Write `state` (tensors and plain values) as the checkpoint of `step`; keep the newest `limit`.

    Raises UserError if the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    target = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".partial-checkpoint-{step}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        torch.save(state, partial / "state.pt")
        (partial / "state.json").write_text(json.dumps({"step": step}))
        for file in partial.iterdir():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            shutil.rmtree(target)
        os.rename(partial, target)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = list_checkpoints(output_dir)
        raise UserError(
            f"checkpoint of step {step} could not be written to {output_dir} ({str(error).splitlines()[0]}); "
            f"free some space and continue with --resume latest (last good: {kept[-1] if kept else 'none'})"
        ) from error
    for old in list_checkpoints(output_dir)[:-limit]:
        shutil.rmtree(old)
    return target


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
    """State written by `save_checkpoint`, on the CPU."""
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)
