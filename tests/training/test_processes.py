"""Two processes (gloo, on the CPU) train like one, and resume bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed as dist

from consissr.errors import UserError
from consissr.training.checkpoints import load_checkpoint
from consissr.training.processes import Processes
from consissr.training.run_log import read_log
from tests.training.children import finish, forkserver, say_into, start, start_several, world
from tests.training.tiny import beside, slow_but, words

MORE = ("micro_batch=1", "ema=0.9", "optimizer.warmup=2", "optimizer.decay=cosine", "checkpoint_limit=9")


def test_machines_that_cannot_reach_each_other_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as hosts whose own name means 127.0.1.1 to themselves, as Debian sets it."""

    def refused(**_: object) -> None:
        raise RuntimeError("gloo: connectFullMesh failed: Connection refused")

    monkeypatch.setattr(dist, "new_group", refused)
    with pytest.raises(UserError, match=r"connectFullMesh failed.*set GLOO_SOCKET_IFNAME"):
        Processes(0, 2, torch.device("cpu"), timeout=1)


def fail_late(environment: dict[str, str], out: Path, ends: bool) -> None:
    """One of two processes, which all meet the same error, or end; process 1 a second after process 0."""
    os.environ.update(environment)
    say_into(out)
    rank = int(environment["RANK"])
    dist.init_process_group("gloo")
    processes = Processes(rank, 2, torch.device("cpu"), timeout=0.05)  # a sign of life every 0.6 s
    close = processes.close
    processes.close = lambda: (time.sleep(rank), close())
    try:
        with processes.one_line():
            if not ends:
                raise UserError("the loss is not finite")
            processes.leave()
    except UserError as error:
        print(error, flush=True)
        os._exit(2)
    os._exit(0)  # at once, as the interpreter may


@pytest.mark.parametrize("ends", [False, True])
def test_the_process_that_keeps_the_store_leaves_last(tmp_path: Path, ends: bool) -> None:
    """The others, late, would print twenty lines of a connection that was reset."""
    outs = [tmp_path / f"{rank}.txt" for rank in range(2)]
    both = [forkserver().Process(target=fail_late, args=(*place, ends)) for place in zip(world(2), outs, strict=True)]
    for process in both:
        process.start()
    assert finish(*both) == ([0, 0] if ends else [2, 2])
    assert [out.read_text().strip() for out in outs] == ["" if ends else "the loss is not finite", ""]


def assert_same_figures(one: Path, two: Path, stage: str) -> None:
    """Weights, averaged weights, losses, learning rates, counts and validation of two runs within 1e-5."""
    states = [load_checkpoint(folder / stage / "checkpoint-2") for folder in (one, two)]
    for part in ("weights", "ema"):
        size = torch.cat([value.flatten() for value in states[0][part].values()]).norm()
        changes = [states[0][part][name] - states[1][part][name] for name in states[0][part]]
        assert torch.cat([change.flatten() for change in changes]).norm() <= 1e-5 * size, part
    logs = [read_log(folder / stage / "log.jsonl") for folder in (one, two)]
    assert len(logs[0]) == len(logs[1]) >= 2
    for first, second in zip(*logs, strict=True):
        exact = {k for k in first if k.endswith("/lr") or k in ("step", "images", "skipped")}
        assert {k: first[k] for k in exact} == {k: second[k] for k in exact}
        assert first.keys() == second.keys()
        for key in (k for k in first if k.endswith("/loss") or k.startswith("validation/")):
            assert first[key] == pytest.approx(second[key], rel=1e-5), key


@pytest.mark.parametrize("stage", slow_but("deft"))
def test_two_processes_train_like_one(runs: Path, photos: Path, tmp_path: Path, stage: str) -> None:
    one, two = (beside(runs, tmp_path / name, stage) for name in ("one", "two"))
    out = tmp_path / "out.txt"
    more = (*MORE, f"data.validation={photos}", "data.validation_count=3")  # of three images, one process has two
    alone = start(words(stage, photos, one, *more, "processes=1"), out)
    together = words(stage, photos, two, *more, "processes=2")
    assert finish(alone, *start_several(together, out, 2)) == [0, 0, 0], out.read_text()[-3000:]
    assert json.loads((two / stage / "run.json").read_text())["processes"] == 2
    assert_same_figures(one, two, stage)
    pictures = [folder / stage / "validation" / "step-2.png" for folder in (one, two)]
    if stage not in ("clip", "prior", "rclip"):  # which make no image
        first, second = (np.asarray(Image.open(picture)).astype(int) for picture in pictures)
        assert first.size and np.abs(first - second).max() <= 1
    through = load_checkpoint(two / stage / "checkpoint-2")
    shutil.rmtree(two / stage / "checkpoint-2")
    assert finish(*start_several(["--resume", "latest", *together], out, 2)) == [0, 0], out.read_text()[-3000:]
    resumed = load_checkpoint(two / stage / "checkpoint-2")
    for part in ("weights", "ema"):
        for name, value in through[part].items():
            assert torch.equal(value, resumed[part][name]), (part, name)


@pytest.mark.slow
def test_torchrun_starts_two(runs: Path, photos: Path, tmp_path: Path, root: Path) -> None:
    """The command that users type, and its result beside one process's."""
    one, two = (beside(runs, tmp_path / name, "nuts") for name in ("one", "two"))
    assert finish(start(words("nuts", photos, one, *MORE), tmp_path / "out.txt")) == [0]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "scripts/train.py"]
    arguments = words("nuts", photos, two, *MORE, "processes=2")
    done = subprocess.run([*launch, *arguments], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_figures(one, two, "nuts")
