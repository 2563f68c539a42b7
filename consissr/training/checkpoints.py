"""Training checkpoints: `output_dir/checkpoint-{step}`, complete or absent, never half-written.

A checkpoint holds the trained tensors, the optimisers' states and the step. Nothing else is needed to go on: data
order, crops, degradations and noise are functions of (seed, place in the sequence). Folders appear and go by renaming,
which a kill or a loss of power cannot interrupt half-way; `state.json` has the checksum of `state.pt`.
"""

import json
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from consissr.errors import UserError, reason_of
from consissr.weights.cache import sha256_of

log = logging.getLogger(__name__)

NAME = re.compile(r"checkpoint-(\d+)$")
STALE = ".stale-*"
"""Folders being written or removed; what a killed run left of them goes with the next checkpoint."""


def step_of(path: Path) -> int:
    """The optimiser steps that the checkpoint `path` has behind it."""
    return int(NAME.search(path.name).group(1))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = [p for p in output_dir.glob("checkpoint-*") if NAME.match(p.name) and (p / "state.json").is_file()]
    return sorted(folders, key=step_of)


def last_good(output_dir: Path) -> str:
    """The newest complete checkpoint in words, for messages."""
    complete = list_checkpoints(output_dir)
    return f"last good checkpoint: {complete[-1] if complete else 'none'}"


# --- writing ----------------------------------------------------------------------------------------------------------


def save_checkpoint(output_dir: Path, step: int, state: dict[str, Any], limit: int) -> Path:
    """Write `state` (tensors and plain values) as the checkpoint of `step`; keep the newest `limit` up to it.

    Later ones go: they belong to no run that goes on from here (`damage` found them unusable). Raises UserError if the
    disk is full or cannot be written; earlier checkpoints are untouched.
    """
    import torch

    target = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".stale-partial-{step}"
    try:
        for left in output_dir.glob(STALE):
            shutil.rmtree(left, ignore_errors=True)  # a file server may keep what another process still reads
        partial.mkdir(parents=True)
        with open(partial / "state.pt", "wb") as file:  # given a path, torch would hide the system's words
            torch.save(state, file)
        (partial / "state.json").write_text(described(step, partial / "state.pt"))
        for path in (*partial.iterdir(), partial):
            flush(path)
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
    complete = list_checkpoints(output_dir)
    earlier = [path for path in complete if step_of(path) <= step]
    for old in [*earlier[:-limit], *complete[len(earlier) :]]:
        os.rename(old, output_dir / f".stale-{old.name}")
    for left in output_dir.glob(STALE):
        shutil.rmtree(left, ignore_errors=True)
    return target


class Writer:
    """Writes checkpoints in a thread while training goes on, one after another."""

    def __init__(self, output_dir: Path, limit: int) -> None:
        self.output_dir, self.limit = output_dir, limit
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy `state` to the CPU, now, and start writing it. Raises what an earlier write ran into."""
        self.finish()
        from accelerate.utils import recursively_apply

        # copies on the CPU: what is written later is what was true now
        copied = recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), state)
        self.pending = self.thread.submit(save_checkpoint, self.output_dir, step, copied, self.limit)

    def check(self) -> None:
        """Raise what the last write ran into, if it has ended."""
        if self.pending is not None and self.pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the last write, and raise what it ran into."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the last write; what it ran into is told by whoever asked for it."""
        self.thread.shutdown()


def described(step: int, file: Path) -> str:
    """The text of `state.json`, in its only form."""
    return json.dumps({"step": step, "sha256": sha256_of(file)})


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
    return reason_of(error)


# --- reading ----------------------------------------------------------------------------------------------------------


def damage(path: Path) -> str:
    """What is wrong with a complete checkpoint's bytes; '' if they are those that were written."""
    try:
        if (path / "state.json").read_text() != described(step_of(path), path / "state.pt"):
            return "its checksum is another"
    except (OSError, ValueError) as error:
        return reason(error)
    return ""


def find_checkpoint(output_dir: Path, resume: str) -> Path:
    """The checkpoint that `--resume` names: 'latest' or a path. Raises UserError if there is none."""
    if resume == "latest":
        complete = list_checkpoints(output_dir)
        if not complete:
            raise UserError(f"--resume latest: {output_dir} has no complete checkpoint; start anew without --resume")
        return complete[-1]
    path = Path(resume)
    if not (path / "state.json").is_file() or not NAME.search(path.name):
        raise UserError(f"--resume {resume}: not a complete checkpoint folder; give 'latest' or .../checkpoint-STEP")
    return path


def sound_checkpoint(output_dir: Path, resume: str) -> Path:
    """As `find_checkpoint`, with every byte compared; 'latest' passes over damaged ones with a warning."""
    path = find_checkpoint(output_dir, resume)
    candidates = list_checkpoints(output_dir)[::-1] if resume == "latest" else [path]
    for candidate in candidates:
        if not (wrong := damage(candidate)):
            return candidate
        if resume == "latest":
            log.warning("%s is damaged (%s): taking an earlier one", candidate, wrong)
    raise UserError(f"--resume {resume}: {path} is damaged ({wrong}): name an earlier checkpoint, or start anew")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """State written by `save_checkpoint`, on the CPU. Raises UserError if the file is damaged."""
    import torch

    try:
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}): name an earlier checkpoint") from error
