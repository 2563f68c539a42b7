"""What a run tells: progress bar, log.jsonl, tracker, and beside them the configuration, commit and versions."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import torch

from consissr.config.loading import changed_fields, load_config, save_config
from consissr.config.training import TrainConfig
from consissr.models.memory import peak_memory_mb

log = logging.getLogger(__name__)


class Report:
    """Files and displays of one run, made by its first process. `bar` counts optimiser steps and shows the ETA.

    A run that goes on from `step` drops what the log says of later steps: they will be done, and told, again.
    """

    def __init__(self, config: TrainConfig, step: int, about: dict[str, Any]) -> None:
        from tqdm import tqdm

        self.folder = Path(config.output_dir)
        self.batch = config.batch
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.folder / "train.yaml"
        if step and before.is_file():
            differ = changed_fields(load_config(TrainConfig, before), config, ("output_dir", "data.validation"))
            if differ:
                log.warning("step %d goes on with other settings than before: %s", step, ", ".join(differ))
        save_config(config, before)
        about = {"torch": torch.__version__, "commit": commit(), **about}
        (self.folder / "run.json").write_text(json.dumps(about, indent=1))
        self.lines = self.folder / "log.jsonl"
        kept = [line for line in read_log(self.lines) if line["step"] <= step]
        self.validated = any(line["step"] == step and "images" not in line for line in kept)
        """Whether the log tells of the validation of that `step`; only training's lines count images."""
        shortened = self.folder / ".log.jsonl"
        shortened.write_text("".join(json.dumps(line) + "\n" for line in kept))
        shortened.replace(self.lines)
        self.tracker = tracker(config.tracker, self.folder, step)
        self.bar = tqdm(initial=step, total=config.steps, desc=config.stage, mininterval=2)

    def means(self, values: dict[str, float], step: int, seconds: float, data_seconds: float, skipped: int) -> None:
        """Means since the last line; seconds per step, in all and waiting for data; images found unusable so far."""
        timing = {"steps_per_second": round(1 / seconds, 4), "data_seconds": round(data_seconds, 4)}
        memory = {"peak_mb": peak_memory_mb()}
        self.line({"step": step, "images": step * self.batch, **timing, **memory, "skipped": skipped, **values})

    def line(self, values: dict[str, Any]) -> None:
        """Append to log.jsonl and to the tracker."""
        with open(self.lines, "a") as handle:
            handle.write(json.dumps(values) + "\n")
        if self.tracker:
            self.tracker.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=values["step"])

    def close(self) -> None:
        """Finish the bar's line, and what the tracker has not written yet."""
        self.bar.close()
        try:
            if self.tracker:
                self.tracker.finish()
        except OSError as error:
            log.warning("the tracker's last lines could not be written: %s", error)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of log.jsonl, without one that was cut off by a kill; [] where there is none."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def commit() -> str:
    """The commit of the code, where it is a git checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown: git is not installed"
    return done.stdout.strip() or "not a git checkout"


def tracker(name: str, folder: Path, step: int) -> Any:
    """accelerate's tracker of that name, started, or None. TensorBoard forgets what it was told of after `step`."""
    if name == "none":
        return None
    from accelerate import tracking

    if name == "tensorboard":
        made = tracking.TensorBoardTracker("tensorboard", logging_dir=str(folder), purge_step=step + 1)
    else:
        made = tracking.WandBTracker("consissr", dir=str(folder))
    made.start()
    return made
