"""Several processes: shared-out moments, gradients sent during the backward pass, and what failures look like."""

from __future__ import annotations

import os
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch import nn

from consissr.training.checkpoints import list_checkpoints, load_checkpoint
from consissr.training.run_log import read_log
from tests.training.children import finish, forkserver, start, start_several, world
from tests.training.test_processes import MORE, assert_same_figures
from tests.training.tiny import beside, slow_but, words


@pytest.mark.parametrize("stage", slow_but("autoencoder"))
def test_shared_out_moments_change_nothing(runs: Path, photos: Path, tmp_path: Path, stage: str) -> None:
    """ZeRO's two processes train like one, resume bit for bit, and leave checkpoints that one process goes on with."""
    one, two = (beside(runs, tmp_path / name, stage) for name in ("one", "two"))
    out = tmp_path / "out.txt"
    alone = start(words(stage, photos, one, *MORE), out)
    together = words(stage, photos, two, *MORE, "engine=zero1")
    assert finish(alone, *start_several(together, out, 2)) == [0, 0, 0], out.read_text()[-3000:]
    assert_same_figures(one, two, stage)
    states = [load_checkpoint(folder / stage / "checkpoint-2")["optimizers"] for folder in (one, two)]
    for name, state in states[0].items():
        assert state["state"].keys() == states[1][name]["state"].keys()
        for index, moments in state["state"].items():
            for key, value in moments.items():
                torch.testing.assert_close(states[1][name]["state"][index][key], value, rtol=1e-3, atol=1e-8)
    through = load_checkpoint(two / stage / "checkpoint-2")["weights"]
    shutil.rmtree(two / stage / "checkpoint-2")
    assert finish(*start_several(["--resume", "latest", *together], out, 2)) == [0, 0], out.read_text()[-3000:]
    resumed = load_checkpoint(two / stage / "checkpoint-2")["weights"]
    assert all(torch.equal(value, resumed[name]) for name, value in through.items())
    shutil.rmtree(two / stage / "checkpoint-2")
    assert finish(start(["--resume", "latest", *words(stage, photos, two, *MORE)], out)) == [0]
    assert_same_figures(one, two, stage)


class Slow(torch.autograd.Function):
    """Nothing, but its gradient takes 0.1 s."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        time.sleep(0.1)
        return gradient


def show_overlap(environment: dict[str, str], told: Path) -> None:
    """One of two processes: writes when the first collective began, and when the backward pass ended, to `told`."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    from consissr.config.optimizer import OptimizerConfig
    from consissr.training.engine import Player
    from consissr.training.stage import Batch, Phase

    settings = DistributedDataParallelKwargs(gradient_as_bucket_view=True, bucket_cap_mb=1)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[settings])
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(600, 600) for _ in range(4))  # 1.4 MB each: a bucket of its own

    def loss(batch: Batch, step: int) -> dict[str, torch.Tensor]:
        x = batch.hq
        for layer in layers:
            x = layer(Slow.apply(x))
        return {"loss": x.square().mean()}

    player = Player(Phase("p", dict(layers.named_parameters()), loss, OptimizerConfig()), accelerator, sharded=False)
    begun: list[float] = []
    reduce = torch.distributed.all_reduce

    def hook(state, bucket):
        begun.append(time.perf_counter() - started)
        future = reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / 2)

    player.module.register_comm_hook(None, hook)
    x = torch.randn(4, 600) + accelerator.process_index
    for last in (False, True):
        started = time.perf_counter()
        with player.averaging(last):
            player.module(Batch(x, [], []), 0)["loss"].backward()
        ended = time.perf_counter() - started
        assert begun if last else not begun
    mine = torch.stack([p.grad.sum() for p in layers.parameters()])
    wanted = mine.clone()
    reduce(wanted)
    assert torch.allclose(wanted / 2, mine), "gradients are not the same in both processes"
    told.write_text(f"{min(begun)} {ended}")
    torch.distributed.destroy_process_group()


def test_gradients_are_sent_while_the_backward_pass_goes_on(tmp_path: Path) -> None:
    """And only in a step's last micro-batch."""
    places = [(environment, tmp_path / f"{rank}.txt") for rank, environment in enumerate(world(2))]
    processes = [forkserver().Process(target=show_overlap, args=place) for place in places]
    for process in processes:
        process.start()
    assert finish(*processes) == [0, 0]
    for _, told in places:
        begun, ended = map(float, told.read_text().split())
        assert begun < ended - 0.15, "the first bucket waits for the whole backward pass"


def two_running(photos: Path, folder: Path, *more: str) -> list[BaseProcess]:
    """Two processes that train without end, some steps in."""
    endless = ("batch=4", "steps=100000", "checkpoint_every=100000", *more)
    processes = start_several(words("autoencoder", photos, folder, *endless), folder / "out.txt", 2)
    while not read_log(folder / "autoencoder/log.jsonl"):
        assert all(process.is_alive() for process in processes), (folder / "out.txt").read_text()[-2000:]
        time.sleep(0.05)
    return processes


def the_line(folder: Path) -> str:
    """The only line that tells of an error; it stands on its own."""
    text = (folder / "out.txt").read_text()
    lines = [line for line in text.replace("\r", "\n").splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and "Traceback" not in text, text[-3000:]
    assert lines[0].startswith("error: "), lines[0]
    return lines[0]


def test_a_stopped_process_is_named(photos: Path, tmp_path: Path) -> None:
    first, second = two_running(photos, tmp_path, "timeout=0.1")
    os.kill(second.pid, signal.SIGSTOP)
    assert finish(first, seconds=90) == [2]
    second.kill()
    assert "process 1 not heard of for 6 s: stopped" in the_line(tmp_path)


def test_a_killed_process_ends_the_others_with_one_line(photos: Path, tmp_path: Path) -> None:
    first, second = two_running(photos, tmp_path)
    second.kill()
    assert finish(first, seconds=90) == [2]
    assert "process 0 (pid" in the_line(tmp_path) and "lost the others" in the_line(tmp_path)


def test_what_all_processes_meet_is_told_once(photos: Path, tmp_path: Path) -> None:
    """With the images of all of them."""
    bad = ("batch=4", "steps=9", "optimizer.lr=1e30", "optimizer.warmup=3", "optimizer.final=0", "optimizer.clip=0")
    processes = start_several(words("autoencoder", photos, tmp_path, *bad), tmp_path / "out.txt", 2)
    assert finish(*processes, seconds=120) == [2, 2]
    line = the_line(tmp_path)
    assert "is not finite" in line and line.count(".png") == 4


def test_steps_that_are_not_finite_can_be_left_out(photos: Path, tmp_path: Path) -> None:
    """The weights stay finite, and the log counts them."""
    bad = ("steps=6", "optimizer.lr=1e30", "optimizer.warmup=3", "optimizer.final=0", "optimizer.clip=0", "ema=0.5")
    out = tmp_path / "out.txt"
    assert finish(start(words("autoencoder", photos, tmp_path, *bad, "skip_not_finite=true"), out)) == [0]
    counts = [line["not_finite"] for line in read_log(tmp_path / "autoencoder/log.jsonl")]
    assert counts == sorted(counts) and counts[-1] > 0
    state = load_checkpoint(list_checkpoints(tmp_path / "autoencoder")[-1])
    assert all(value.isfinite().all() for part in ("weights", "ema") for value in state[part].values())
