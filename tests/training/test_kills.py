"""kill -9 at any moment: what is resumed ends as what ran through, and checkpoints are complete or absent."""

from __future__ import annotations

import json
import os
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from consissr.training.checkpoints import list_checkpoints, load_checkpoint
from consissr.training.run_log import read_log
from tests.training.children import finish, start
from tests.training.tiny import beside, slow_but, words

KILLS = int(os.environ.get("CONSISSR_TEST_KILLS", "2"))
"""How often a run of each stage is killed; CONSISSR_TEST_KILLS=10 takes minutes."""
LAST = 3 * KILLS + 2
"""Step after which no kill is asked for."""
STEPS = LAST + 2 * KILLS + 2  # a kill comes at most two steps after the one asked for, where its run waits for it
EVERY = 2
"""Steps between checkpoints: most kills lose a step."""


def kill_after(process: BaseProcess, log: Path, step: int, share: float) -> None:
    """kill -9 after `log` tells of `step` and this share of its fastest step's time."""
    while process.is_alive() and not any(line["step"] >= step for line in read_log(log)):
        time.sleep(0.002)
    time.sleep(share / max((line["steps_per_second"] for line in read_log(log)), default=1000))
    process.kill()
    process.join()


@pytest.mark.parametrize("stage", slow_but("autoencoder"))
def test_killed_runs_end_like_one_that_ran_through(runs: Path, photos: Path, tmp_path: Path, stage: str) -> None:
    ends = {}
    for name, kills in (("whole", 0), ("killed", KILLS)):
        folder = beside(runs, tmp_path / name, stage)
        more = (f"steps={STEPS}", f"checkpoint_every={EVERY}", "log_every=1", "ema=0.9", "optimizer.warmup=2")
        arguments, output = words(stage, photos, folder, *more), folder / stage
        draw = random.Random(stage)
        for step in sorted(draw.sample(range(1, LAST), kills)):
            found = list_checkpoints(output)
            resume = ["--resume", "latest"] if found else []
            done = json.loads((found[-1] / "state.json").read_text())["step"] if found else 0
            step = max(step, done + 1)
            process = start([*resume, *arguments], folder / "out.txt", last=step + 2)
            kill_after(process, output / "log.jsonl", step, draw.uniform(0, 1))
            assert process.exitcode == -9, (folder / "out.txt").read_text()[-2000:]
        resume = ["--resume", "latest"] if list_checkpoints(output) else []  # early kills leave none
        assert finish(start([*resume, *arguments], folder / "out.txt")) == [0], (folder / "out.txt").read_text()[-2000:]
        ends[name] = load_checkpoint(output / f"checkpoint-{STEPS}"), read_log(output / "log.jsonl")
    (whole, told), (killed, told_again) = ends["whole"], ends["killed"]
    for part in ("weights", "ema"):
        assert whole[part].keys() == killed[part].keys() and whole[part]
        for name, value in whole[part].items():
            assert torch.equal(value, killed[part][name]), (part, name)
    timing = {"steps_per_second", "data_seconds", "peak_mb", "peak_share"}
    same = [[{k: v for k, v in line.items() if k not in timing} for line in log] for log in (told, told_again)]
    assert same[0] == same[1] and [line["step"] for line in same[0]] == list(range(1, STEPS + 1))
