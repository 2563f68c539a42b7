"""Batches for the loop: which samples a process sees in which step, and their degradation on the compute device."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from consissr.config import machine
from consissr.config.training import TrainConfig
from consissr.data.as_released import PairPool, degrade_as_released
from consissr.data.datasets import PhotoDataset
from consissr.data.degradation import check_size, degrade, preset
from consissr.data.draws import ReleasedDraws
from consissr.images.device import to_device
from consissr.training.checks import accumulation
from consissr.training.precision import without_autocast
from consissr.training.stage import Batch, seed_of

SPARE = 2
"""Batches that wait ready, or are being made, beyond one per thread."""


def own_cores() -> int:
    """Cores that this process may use, shared with the other processes of its machine."""
    return max(1, machine.cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def threads(workers: int) -> int:
    """How many threads `workers` of the config means; decoding leaves the interpreter's lock, so that they scale."""
    return workers or min(16, max(1, own_cores() - 1))


class Feed:
    """Micro-batches of one of `world` processes; those of any step can be asked for."""

    def __init__(self, config: TrainConfig, device: torch.device, rank: int, world: int, needs_lq: bool) -> None:
        self.config, self.device, self.rank, self.world, self.needs_lq = config, device, rank, world, needs_lq
        self.micro_batches = accumulation(config, world)
        self.degradation = preset(config.data.degradation)
        if config.data.enlarge:
            self.degradation = replace(self.degradation, enlarge=tuple(config.data.enlarge))
        data = config.data
        given = data.lq_paths and all(data.lq_paths) and (data.validation_lq or not data.validation)
        if needs_lq and not given:
            check_size((config.data.crop, config.data.crop), self.degradation)
        self.dataset = PhotoDataset(config.data, config.seed)
        self.workers = threads(config.workers)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and torch.cuda.is_available() else None
        """Where batches are copied and degraded while the step computes."""
        self.pool = None
        if config.data.pair_pool and needs_lq:
            self.pool = PairPool(config.data.pair_pool, seed_of(config.seed, "pool", rank))

    def make_batch(self, samples: list[dict[str, Any]], draws: str = "per_image") -> Batch:
        """Samples of the dataset on the device, degraded there if the stage needs low-quality partners.

        draws: as `data.draws`; draws per batch would make a validation image depend on those beside it.
        In float32, as in threads, also where autocast is on (validation): JPEG's coefficients need all their digits.
        """
        hq = self.moved([s["hq"] for s in samples])
        with without_autocast(self.device):
            lq = self.degraded(hq, samples, draws) if self.needs_lq else None
        hq, lq = (x if x is None else x.contiguous(memory_format=torch.channels_last) for x in (hq, lq))
        return Batch(
            hq=hq,
            names=[s["name"] for s in samples],
            generators=[torch.Generator().manual_seed(seed_of(s["seed"], "loss")) for s in samples],
            lq=lq,
        )

    def moved(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Images as one tensor on the device; the copy does not keep the host waiting."""
        return to_device(torch.stack(images), self.device)

    def degraded(self, hq: torch.Tensor, samples: list[dict[str, Any]], draws: str) -> torch.Tensor:
        """The low-quality images (B, 3, S, S) in [-1, 1] of `hq`: the samples' own, or made here."""
        own = [i for i, s in enumerate(samples) if "lq" in s]
        rest = [i for i in range(len(samples)) if i not in own]
        seeds = [samples[i]["seed"] for i in rest]
        if not own:
            return self.made(hq, seeds, draws)
        lq = torch.empty_like(hq)
        lq[own] = self.moved([samples[i]["lq"] for i in own])
        if rest:
            lq[rest] = self.made(hq[rest], seeds, draws)
        return lq

    def made(self, hq: torch.Tensor, seeds: list[int], draws: str) -> torch.Tensor:
        """Low-quality images (B, 3, S, S) made from `hq`."""
        if draws == "per_batch":
            return degrade_as_released(hq, self.degradation, ReleasedDraws(seeds[0] % 2**32))[1]
        return degrade(hq, self.degradation, seeds)[1]

    def numbers(self, step: int, micro: int) -> range:
        """Sample numbers of this process in micro-batch `micro` of a step."""
        c = self.config
        first = step * c.batch + (micro * self.world + self.rank) * c.micro_batch
        return range(first, first + c.micro_batch)

    def batches(self, step: int) -> Iterator[Batch]:
        """Micro-batches of this process from `step` on; through the pool of pairs, where there is one."""
        for batch in self.prepared(step):
            if self.pool is not None:
                *pair, batch.names = self.pool.exchange(batch.hq, batch.lq, batch.names)
                batch.hq, batch.lq = (x.contiguous(memory_format=torch.channels_last) for x in pair)
            yield batch

    def prepared(self, step: int) -> Iterator[Batch]:
        """Micro-batches in order, prepared ahead in threads."""
        positions = ((later, micro) for later in range(step, self.config.steps) for micro in range(self.micro_batches))
        # A thread's device is GPU 0 until told: each would open a context there, from every process of a machine.
        begin = None if self.stream is None else partial(torch.cuda.set_device, self.device)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="feed", initializer=begin)
        pending: deque[Future] = deque()
        try:
            for position in positions:
                pending.append(pool.submit(self.prepare, self.numbers(*position)))
                if len(pending) >= self.workers + SPARE:
                    yield self.received(pending.popleft())
            while pending:
                yield self.received(pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def prepare(self, numbers: range) -> tuple[Batch, torch.cuda.Event | None]:
        """One micro-batch, in a thread; on a GPU beside the step, and complete when the event has happened."""
        samples, draws = [self.dataset[n] for n in numbers], self.config.data.draws
        if self.stream is None:
            return self.make_batch(samples, draws), None
        with torch.cuda.stream(self.stream):
            batch = self.make_batch(samples, draws)
            return batch, self.stream.record_event()

    def received(self, future: Future) -> Batch:
        """A prepared micro-batch, which the device's current work now waits for."""
        batch, complete = future.result()
        if complete is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(complete)
            for tensor in (batch.hq, batch.lq):
                if tensor is not None:
                    tensor.record_stream(current)
        return batch
