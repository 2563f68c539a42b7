"""Training runs in processes of their own, forked from one that has imported everything, so that starting is quick."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from itertools import count
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import accelerate  # noqa: F401 - here and below: imported before the fork, not after each
import torch
import torch._dynamo
import tqdm  # noqa: F401
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel  # noqa: F401

import consissr.training.loop  # noqa: F401
from consissr.nano.config import STAGES
from consissr.training.checkpoints import list_checkpoints, save_checkpoint
from consissr.training.run_log import RunLog
from scripts.train import main, stage_builder

for stage in STAGES:
    stage_builder(stage)


def hold_after(step: int) -> None:
    """Let this process train up to the log's line of `step` and no further, for who kills it may be late."""
    tell = RunLog.means

    def tell_and_hold(self: RunLog, values: dict[str, float]) -> None:
        tell(self, values)
        if values["step"] >= step:
            time.sleep(600)

    RunLog.means = tell_and_hold


def train(arguments: list[str], log: Path, environment: dict[str, str], last: int | None) -> None:
    """scripts/train.py as this process, its output added to `log`. `last`: step that it waits after."""
    os.environ.update(environment)
    if last is not None:
        hold_after(last)
    torch.set_num_threads(1)
    say_into(log)
    sys.exit(main(arguments))


def say_into(log: Path) -> None:
    """Add this process's output to `log`."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


def save(folder: Path, saved: Event) -> None:
    """Checkpoints until it is killed; steps repeat, so that they are replaced, too. `saved`: set after the first."""
    torch.set_num_threads(1)
    for number in count(len(list_checkpoints(folder))):
        step = number % 5
        save_checkpoint(folder, step, {"step": step, "a": torch.full((50_000,), step)}, limit=2)
        saved.set()


def forkserver() -> BaseContext:
    """Where processes come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def start(arguments: list[str], log: Path, last: int | None = None, **environment: str) -> BaseProcess:
    """A process that trains, to the end or until it waits after step `last`; its exit code is the script's."""
    process = forkserver().Process(target=train, args=(arguments, log, environment, last))
    process.start()
    return process


def start_saving(folder: Path) -> tuple[BaseProcess, Event]:
    """A process that writes checkpoints without end, and what it sets after the first."""
    context = forkserver()
    saved = context.Event()
    process = context.Process(target=save, args=(folder, saved))
    process.start()
    return process, saved


def world(count: int) -> list[dict[str, str]]:
    """The environment variables by which `count` processes find each other, as torchrun would set them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    same = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [same | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def start_several(arguments: list[str], log: Path, count: int) -> list[BaseProcess]:
    """`count` processes that train together."""
    return [start(arguments, log, **environment) for environment in world(count)]


def finish(*processes: BaseProcess, seconds: float = 300) -> list[int | None]:
    """Exit codes; a process that takes longer is killed."""
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]
