"""Training data as the releases make them: draws shared by a batch, and the pool of pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from consissr.errors import UserError
from consissr.nano.config import run_config
from consissr.training.checks import check_run
from consissr.training.feed import Feed
from consissr.training.stage import Batch


def stream(photos: Path, *more: str) -> list[Batch]:
    """All micro-batches of a run of 12 steps."""
    words = [f"data.paths=[{photos}]", "data.crop=64", "batch=2", "micro_batch=2", "steps=12", "workers=2", *more]
    config = run_config(None, words)
    return list(Feed(config, torch.device("cpu"), 0, 1, needs_lq=True).batches(0))


def test_shared_draws_are_another_degradation_and_repeat(photos: Path) -> None:
    own, shared, again = (stream(photos, f"data.draws={word}") for word in ("per_image", "per_batch", "per_batch"))
    for a, b, c in zip(own, shared, again, strict=True):
        assert torch.equal(a.hq, b.hq) and torch.equal(b.lq, c.lq)
        assert not torch.equal(a.lq, b.lq) and b.lq.shape == b.hq.shape and b.lq.abs().max() <= 1
    assert not torch.equal(shared[0].lq, shared[1].lq)


def test_the_pool_mixes_batches_and_keeps_partners(photos: Path) -> None:
    plain, pooled, again = stream(photos), *(stream(photos, "data.pair_pool=6") for _ in range(2))
    assert all(torch.equal(a.lq, b.lq) for a, b in zip(pooled, again, strict=True))
    pairs = [pair for batch in plain for pair in zip(batch.hq, batch.lq, batch.names, strict=True)]
    places = []
    for batch in pooled:
        for hq, lq, name in zip(batch.hq, batch.lq, batch.names, strict=True):
            places.append([i for i, pair in enumerate(pairs) if torch.equal(pair[0], hq) and torch.equal(pair[1], lq)])
            assert pairs[places[-1][0]][2] == name, "what a message names is what was trained on"
    assert all(len(found) == 1 for found in places)
    order = [found[0] for found in places]
    assert order[:6] == list(range(6)) and order != sorted(order)
    assert any(abs(a - b) > 1 for a, b in zip(order[6::2], order[7::2], strict=True))  # of different batches


def test_a_pool_is_not_resumed_silently(photos: Path, tmp_path: Path) -> None:
    config = run_config(None, [f"data.paths=[{photos}]", f"output_dir={tmp_path}", "data.pair_pool=8"])
    with pytest.raises(UserError, match="not in checkpoints: resume with data.pair_pool=0 and --allow-changes"):
        check_run(config, "latest")
    with pytest.raises(UserError, match="pair_pool is 7: use 0 or a multiple of micro_batch"):
        run_config(None, ["data.pair_pool=7"])
