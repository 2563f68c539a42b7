"""What a run tells: progress bar, log.jsonl, tracker, and beside them the configuration, commit and versions."""

import json
import logging
import subprocess
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from PIL import Image

from consissr.config.loading import flat, save_config
from consissr.config.machine import whole
from consissr.config.training import TrainConfig
from consissr.training.feed import own_cores, threads

log = logging.getLogger(__name__)

WAITING = 0.1
"""Share of a step spent waiting for data from which it is told."""


class RunLog:
    """Files and displays of one run, made by its first process. `bar` counts optimiser steps and shows the ETA.

    A run that goes on from `step` drops what the log says of later steps: they will be done, and told, again.
    """

    def __init__(self, config: TrainConfig, step: int, about: dict[str, Any]) -> None:
        from tqdm import tqdm

        self.folder = Path(config.output_dir)
        self.config = config
        self.quality, self.told_waiting = "", False
        self.folder.mkdir(parents=True, exist_ok=True)
        save_config(config, self.folder / "train.yaml")
        about = {"torch": torch.__version__, "commit": commit(), **about}
        (self.folder / "run.json").write_text(json.dumps(about, indent=1))
        self.lines = self.folder / "log.jsonl"
        earlier = [line for line in read_log(self.lines) if line["step"] <= step]
        self.validated = {line["step"] for line in earlier if "images" not in line}
        """Steps whose validation the log told of at the start; only training's lines count images."""
        with whole(self.lines) as shortened:
            shortened.write_text("".join(json.dumps(line) + "\n" for line in earlier))
        self.tracker = tracker(config, self.folder, step)
        if config.compile:
            log.info("compile=true: networks are compiled in the first steps, which take minutes; others are faster")
        self.bar = tqdm(initial=step, total=config.steps, desc=config.stage, mininterval=2)

    def means(self, values: dict[str, float]) -> None:
        """A line of training (`Loop.tell`): means since the last one, speed, and the most memory of any process."""
        self.line(values)
        rate = values["steps_per_second"]
        loss = next((f"loss {value:.4g}" for name, value in values.items() if name.endswith("/loss")), "")
        words = [loss, self.quality, f"{self.config.batch * rate:.3g} images/s", f"{values['peak_mb'] / 1024:.1f} GiB"]
        words.append(f"{100 * values['peak_share']:.0f} % of peak")
        self.bar.set_postfix_str(", ".join(word for word in words if word), refresh=False)
        waiting = values["data_seconds"] * rate
        if waiting > WAITING and not self.told_waiting:
            self.told_waiting = True
            self.bar.clear()
            log.warning(
                "waiting for data takes %.0f %% of a step: raise workers (now %d, with %d cores for this process), "
                "or read from a local disk, tar shards or smaller JPEGs (scripts/bench.py training --data measures it)",
                100 * waiting, threads(self.config.workers), own_cores(),
            )  # fmt: skip

    def validation(self, values: dict[str, float], step: int, picture: Path) -> None:
        """Figures of the fixed set, and its picture."""
        if "validation/restored_psnr" in values:
            self.quality = f"PSNR {values['validation/restored_psnr']:.2f} dB"
        self.line({"step": step, **values})
        if self.tracker and picture.is_file():
            with Image.open(picture) as image:
                pixels = np.asarray(image.convert("RGB"))
            settings = {"dataformats": "NHWC"} if self.tracker.name == "tensorboard" else {}
            self.tracker.log_images({"validation": pixels[None]}, step=step, **settings)

    def line(self, values: dict[str, Any]) -> None:
        """Append to log.jsonl and to the tracker; nothing where `values` has a step alone."""
        if len(values) == 1:
            return
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


def tracker(config: TrainConfig, folder: Path, step: int) -> Any:
    """accelerate's tracker that the config names, started and told of the config, or None.

    TensorBoard forgets what it was told of after `step`; wandb goes on with the run whose name is kept in the folder.
    """
    if config.tracker == "none":
        return None
    from accelerate import tracking

    if config.tracker == "tensorboard":
        made = tracking.TensorBoardTracker("tensorboard", logging_dir=str(folder), purge_step=step + 1)
    else:
        name = folder / "wandb_id"
        if not step or not name.is_file():
            name.write_text(uuid4().hex[:8])
        made = tracking.WandBTracker("consissr", dir=str(folder), id=name.read_text(), resume="allow")
    made.start()
    if config.tracker == "tensorboard":
        text = (folder / "train.yaml").read_text()
        made.writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), global_step=step)
    else:
        made.store_init_configuration(flat(config))
    return made
