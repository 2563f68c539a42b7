"""Batches of the loop: own pairs beside degraded images, whatever the number of threads."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.config.training import TrainConfig
from consissr.data.degradation import degrade
from consissr.errors import UserError
from consissr.training.feed import Feed, threads
from consissr.training.processes import Processes
from consissr.training.stage import Batch, seed_of
from consissr.training.validation import Validation


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Four photographs to degrade, and four that have partners."""
    rng = np.random.default_rng(0)
    for kind, side in (("plain", 96), ("hq", 96), ("lq", 24)):
        (tmp_path / kind).mkdir()
        for number in range(4):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{kind if kind == 'plain' else 'pair'}{number}.png")
    config = TrainConfig(steps=6, batch=4, micro_batch=2)
    config.data.crop = 64
    config.data.paths = [str(tmp_path / "plain"), str(tmp_path / "hq")]
    config.data.lq_paths = ["", str(tmp_path / "lq")]
    return config


def test_processes_share_out_a_steps_samples(config: TrainConfig) -> None:
    """Of step 2, images 16 to 23 of the sequence: two processes, two micro-batches of two each, none twice."""
    config.batch = 8
    feeds = [Feed(config, torch.device("cpu"), rank=rank, world=2, needs_lq=False) for rank in range(2)]
    shares = [[list(feed.numbers(2, micro)) for micro in range(feed.micro_batches)] for feed in feeds]
    assert shares == [[[16, 17], [20, 21]], [[18, 19], [22, 23]]]


def test_own_pairs_are_not_degraded(config: TrainConfig) -> None:
    feed = Feed(config, torch.device("cpu"), rank=0, world=1, needs_lq=True)
    seen = set()
    for n, batch in enumerate(feed.batches(0)):
        for i in range(2):
            sample = feed.dataset[2 * n + i]
            assert torch.equal(batch.hq[i], sample["hq"]) and batch.names[i] == sample["name"]
            made = degrade(sample["hq"][None], feed.degradation, [sample["seed"]])[1][0]
            assert torch.equal(batch.lq[i], sample.get("lq", made))
            seen.add("lq" in sample)
    assert n == 11 and seen == {True, False}


def test_crops_that_validation_alone_degrades_are_checked_at_the_start(config: TrainConfig, tmp_path: Path) -> None:
    config.data.paths, config.data.lq_paths = [str(tmp_path / "hq")], [str(tmp_path / "lq")]
    config.data.crop = 32
    Feed(config, torch.device("cpu"), rank=0, world=1, needs_lq=True)
    config.data.validation = str(tmp_path / "hq")
    with pytest.raises(UserError, match="crops of 32x32 pixels can shrink to"):
        Feed(config, torch.device("cpu"), rank=0, world=1, needs_lq=True)


def test_a_validation_image_does_not_depend_on_those_beside_it(config: TrainConfig) -> None:
    """Not even where training's draws are shared by a batch."""
    config.data.lq_paths, config.data.draws = [], "per_batch"
    feed = Feed(config, torch.device("cpu"), rank=0, world=1, needs_lq=True)
    samples = [feed.dataset[n] for n in range(2)]
    apart = torch.cat([feed.make_batch([sample]).lq for sample in samples])
    assert torch.equal(feed.make_batch(samples).lq, apart)
    assert not torch.equal(next(feed.batches(0)).lq, apart), "training's are as released"


def test_validation_on_own_pairs(config: TrainConfig, tmp_path: Path) -> None:
    config.data.validation, config.data.validation_lq = str(tmp_path / "hq"), str(tmp_path / "lq")
    config.output_dir, config.data.validation_count = str(tmp_path / "run"), 4
    feed = Feed(config, torch.device("cpu"), rank=0, world=1, needs_lq=True)
    alone = Processes(0, 1, torch.device("cpu"), timeout=1)
    validation = Validation(config, feed.make_batch, alone)

    class Stage:
        def prepare(self, batch: Batch) -> None:
            self.batch = batch

        def restore(self, batch: Batch) -> torch.Tensor:
            return batch.hq

    figures = validation.run(stage := Stage(), 7)
    assert torch.equal(stage.batch.lq, torch.stack([validation.dataset[n]["lq"] for n in (2, 3)]))
    assert figures["validation/restored_psnr"] > 60 > figures["validation/lq_psnr"]


def test_threads_change_nothing(config: TrainConfig) -> None:
    runs = []
    for config.workers in (1, 5):
        runs.append(list(Feed(config, torch.device("cpu"), rank=1, world=2, needs_lq=True).batches(2)))
    for one, five in zip(*runs, strict=True):
        assert torch.equal(one.hq, five.hq) and torch.equal(one.lq, five.lq) and one.names == five.names


def test_threads_follow_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of eight processes on a node of 96 cores may use 12, and leaves one to the step."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert threads(0) == 11 and threads(3) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert threads(0) == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert threads(0) == 1


def test_threads_work_on_their_process_s_gpu(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread's current device is GPU 0, on which every process of a machine would open a context."""
    feed = Feed(config, torch.device("cpu"), rank=0, world=1, needs_lq=False)
    told: list = []

    def prepare(self: Feed, numbers: range) -> tuple[Batch, None]:
        told.append("work")
        return self.make_batch([self.dataset[n] for n in numbers]), None

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append((device, threading.get_ident())))
    monkeypatch.setattr(Feed, "prepare", prepare)
    list(feed.batches(4))
    assert set(told) == {"work"}, "on the CPU there is nothing to tell"
    told.clear()
    feed.stream, feed.device = object(), torch.device("cuda:3")
    monkeypatch.setattr(Feed, "make_batch", lambda self, samples: None)
    monkeypatch.setattr(Feed, "received", lambda self, future: future.result()[0])
    list(feed.prepared(4))
    assert told[0][0] == torch.device("cuda:3") and told[0][1] != threading.get_ident()


def test_every_sample_has_seeds_of_its_own(config: TrainConfig) -> None:
    """Of its degradation, and of its timestep and noise: `loss`, hashed with the sample's seed."""
    feed = Feed(config, torch.device("cpu"), rank=0, world=1, needs_lq=True)
    samples = [feed.dataset[n] for n in range(24)]
    assert len({sample["seed"] for sample in samples}) == 24
    rows = torch.cat([batch.randn(4) for batch in feed.batches(0)])
    wanted = [torch.randn(4, generator=torch.Generator().manual_seed(seed_of(s["seed"], "loss"))) for s in samples]
    assert torch.equal(rows, torch.stack(wanted)) and len(torch.unique(rows, dim=0)) == 24


def test_each_batch_is_degraded_anew_as_released(config: TrainConfig, tmp_path: Path) -> None:
    """One draw of the whole pipeline per batch, and another in the next: here of the same photograph, uncropped."""
    config.data.paths, config.data.lq_paths, config.data.draws = [str(tmp_path / "plain/plain0.png")], [], "per_batch"
    config.data.crop, config.data.flips = 96, "none"
    first, second, *_ = Feed(config, torch.device("cpu"), rank=0, world=1, needs_lq=True).batches(0)
    assert torch.equal(first.hq, second.hq) and not torch.equal(first.lq, second.lq)
