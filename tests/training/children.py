"""Training runs in processes of their own, forked from one that has imported everything, so that starting is quick."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import accelerate  # noqa: F401 - here and below: imported before the fork, not after each
import torch
import torch._dynamo
import tqdm  # noqa: F401
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel  # noqa: F401

import consissr.training.loop  # noqa: F401
from scripts.train import STAGES, main, stage_builder

for stage in STAGES:
    stage_builder(stage)


def train(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """scripts/train.py as this process, its output added to `log`."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(log, "a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(main(arguments))


def start(arguments: list[str], log: Path, **environment: str) -> BaseProcess:
    """A process that trains; its exit code is the script's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=train, args=(arguments, log, environment))
    process.start()
    return process


def start_several(arguments: list[str], log: Path, count: int) -> list[BaseProcess]:
    """`count` processes that train together, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(arguments, log, RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in range(count)]


def finish(*processes: BaseProcess, seconds: float = 300) -> list[int | None]:
    """Exit codes; a process that takes longer is killed."""
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]
