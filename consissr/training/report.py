"""What a run tells: progress bar, log.jsonl, tracker, and beside them the configuration, commit and versions."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from consissr.config import save_config
from consissr.train_config import TrainConfig


class Report:
    """Files and displays of one run, made by its first process. `bar` counts optimiser steps."""

    def __init__(self, config: TrainConfig, step: int, about: dict[str, Any]) -> None:
        from tqdm import tqdm

        self.folder = Path(config.output_dir)
        self.batch = config.batch
        self.folder.mkdir(parents=True, exist_ok=True)
        save_config(config, self.folder / "train.yaml")
        about = {"torch": torch.__version__, "commit": commit(), **about}
        (self.folder / "run.json").write_text(json.dumps(about, indent=1))
        self.tracker = tracker(config.tracker, self.folder)
        self.bar = tqdm(initial=step, total=config.steps, desc=config.stage, mininterval=2)

    def means(self, values: dict[str, float], step: int, seconds: float, data_share: float) -> None:
        """Means since the last line; seconds per step; the share of time that the step waited for data."""
        memory = {}
        if torch.cuda.is_available():
            memory = {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
        timing = {"seconds_per_step": round(seconds, 4), "data_share": round(data_share, 3)}
        self.line({"step": step, "images": step * self.batch, **timing, **memory, **values})

    def line(self, values: dict[str, Any]) -> None:
        """Append to log.jsonl and to the tracker."""
        with open(self.folder / "log.jsonl", "a") as handle:
            handle.write(json.dumps(values) + "\n")
        if self.tracker:
            self.tracker.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=values["step"])


def commit() -> str:
    """The commit of the code, where it is a git checkout."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "not a git checkout"


def tracker(name: str, folder: Path) -> Any:
    """accelerate's tracker of that name, started, or None."""
    if name == "none":
        return None
    from accelerate import tracking

    if name == "tensorboard":
        made = tracking.TensorBoardTracker("tensorboard", logging_dir=str(folder))
    else:
        made = tracking.WandBTracker("consissr", dir=str(folder))
    made.start()
    return made
