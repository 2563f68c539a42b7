"""Images per second of training's data path, by the number of threads that read and by the kind of degradation."""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from consissr.config.loading import load_config
from consissr.config.training import TrainConfig
from consissr.training.feed import Feed, own_cores

WARM = 2
"""Micro-batches per thread that are not counted."""


def measure(paths: list[str], overrides: list[str], workers: list[int], images: int) -> list[dict[str, Any]]:
    """A row for each number of workers: images/s read, and read and degraded; the first's ms of computing per image.

    overrides: key=value of a run's config, such as data.crop=512. On a CPU, degrading takes the cores that read; on a
    GPU training degrades there.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        quoted = json.dumps([os.path.abspath(os.path.expanduser(path)) for path in paths], ensure_ascii=False)
        config = load_config(TrainConfig, None, [f"data.paths={quoted}", "data.cache_mb=0", *overrides])
        return [row(config, count, images) for count in workers or sorted({1, 2, own_cores()})]
    finally:
        torch.set_num_threads(threads)


def row(config: TrainConfig, workers: int, images: int) -> dict[str, Any]:
    """Figures of one number of workers, measured one after another."""
    config.workers, config.batch = workers, config.micro_batch
    batches = -(-images // config.micro_batch)
    config.steps = batches + WARM * workers
    feeds = [Feed(config, torch.device("cpu"), rank=0, world=1, needs_lq=needs_lq) for needs_lq in (False, True)]
    began = time.process_time()
    read = rate(lambda: feeds[0].batches(0), config, workers)
    computed = 1000 * (time.process_time() - began) / (config.steps * config.micro_batch)
    return {
        "workers": workers,
        "read": read,
        "per core": read / min(workers, own_cores()),
        "CPU ms": computed,
        "and degraded": rate(lambda: feeds[1].batches(0), config, workers),
    }


def rate(start: Callable[[], Iterator], config: TrainConfig, workers: int) -> float:
    """Images per second once all workers are at work."""
    batches = start()
    for _ in itertools.islice(batches, WARM * workers):
        pass
    began = time.perf_counter()
    counted = sum(1 for _ in batches)
    return counted * config.micro_batch / (time.perf_counter() - began)
