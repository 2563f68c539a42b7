"""Batches for the loop: which samples a process sees in which step, and their degradation on the compute device."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from consissr.config.training import TrainConfig
from consissr.data.as_released import PairPool, degrade_as_released
from consissr.data.degradation import check_size, degrade, preset
from consissr.data.draws import ReleasedDraws
from consissr.training.checks import accumulation
from consissr.training.precision import without_autocast
from consissr.training.stage import Batch, photographs, seed_of


class Feed:
    """Micro-batches of one of `world` processes; those of any step can be asked for."""

    def __init__(self, config: TrainConfig, device: torch.device, rank: int, world: int, needs_lq: bool) -> None:
        self.config, self.device, self.rank, self.world, self.needs_lq = config, device, rank, world, needs_lq
        self.micro_batches = accumulation(config, world)
        self.degradation = preset(config.data.degradation)
        if config.data.enlarge:
            self.degradation = replace(self.degradation, enlarge=list(config.data.enlarge))
        if needs_lq and not config.data.lq_paths:
            check_size((config.data.crop, config.data.crop), self.degradation)
        self.dataset = photographs(config.data, config.seed)
        self.pool = None
        if config.data.pair_pool and needs_lq:
            self.pool = PairPool(config.data.pair_pool, seed_of(config.seed, "pool", rank))

    def make_batch(self, samples: list[dict[str, Any]]) -> Batch:
        """Samples of the dataset on the device, degraded there if the stage needs low-quality partners.

        In float32, as in threads, also where autocast is on (validation): JPEG's coefficients need all their digits.
        """
        with without_autocast(self.device):
            return self.made(samples)

    def made(self, samples: list[dict[str, Any]]) -> Batch:
        """What `make_batch` gives, under the caller's autocast."""
        batch = Batch(
            hq=torch.stack([s["hq"] for s in samples]).to(self.device, non_blocking=True),
            names=[s["name"] for s in samples],
            generators=[torch.Generator().manual_seed(seed_of(s["seed"], "loss")) for s in samples],
        )
        if self.needs_lq:
            if "lq" in samples[0]:
                batch.lq = torch.stack([s["lq"] for s in samples]).to(self.device, non_blocking=True)
            elif self.config.data.draws == "per_batch":
                _, batch.lq = degrade_as_released(batch.hq, self.degradation, ReleasedDraws(samples[0]["seed"] % 2**32))
            else:
                _, batch.lq = degrade(batch.hq, self.degradation, seeds=[s["seed"] for s in samples])
        batch.hq = batch.hq.contiguous(memory_format=torch.channels_last)
        return batch

    def numbers(self, step: int, micro: int) -> range:
        """Sample numbers of this process in micro-batch `micro` of a step."""
        c = self.config
        first = step * c.batch + (micro * self.world + self.rank) * c.micro_batch
        return range(first, first + c.micro_batch)

    def batches(self, step: int) -> Iterator[Batch]:
        """Micro-batches of this process from `step` on; through the pool of pairs, where there is one."""
        for batch in self.prepared(step):
            if self.pool is not None:
                hq, batch.lq = self.pool.exchange(batch.hq, batch.lq)
                batch.hq = hq.contiguous(memory_format=torch.channels_last)
            yield batch

    def prepared(self, step: int) -> Iterator[Batch]:
        """Micro-batches in order, prepared ahead in threads."""
        c = self.config
        with ThreadPoolExecutor(max_workers=max(1, c.workers)) as pool:
            pending = []
            for later in range(step, c.steps):
                for micro in range(self.micro_batches):
                    numbers = self.numbers(later, micro)
                    pending.append(pool.submit(lambda n: self.make_batch([self.dataset[i] for i in n]), numbers))
                    if len(pending) > max(1, c.workers):
                        yield pending.pop(0).result()
            for future in pending:
                yield future.result()
