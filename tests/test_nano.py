"""The bundled model: loads without a network, has learned to restore, and is as deterministic as documented."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ccsr import nuts_plan
from consissr import Restorer, images
from consissr.data.degradation import degrade, preset
from consissr.evaluation.metrics import psnr

ONE_STEP = nuts_plan(6, 2 / 3, 2 / 3)


@pytest.fixture(scope="module")
def nano() -> Restorer:
    return Restorer.load("nano-ccsr")


@pytest.fixture(scope="module")
def pair(shared: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight validation photographs' centres (8, 3, 192, 192), and the same degraded (8, 3, 48, 48)."""
    files = sorted((shared / "data" / "photos" / "val").glob("*.jpg"))[:8]
    hq = torch.stack([images.read(file).pixels[:, 64:256, 96:288] for file in files])
    return hq, degrade(hq, preset("ccsr"), seeds=range(8))[0]


def mean_psnr(x: torch.Tensor, hq: torch.Tensor) -> float:
    return float(psnr(x.clamp(-1, 1) / 2 + 0.5, hq / 2 + 0.5).mean())


def test_it_is_small(root: Path) -> None:
    files = [path for path in (root / "consissr" / "assets" / "nano").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6


def test_its_condition_matters(nano: Restorer, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Another image's latent as the condition costs at least 3 dB (the start and the colours stay the image's own)."""
    hq, lq = pair
    right = mean_psnr(nano(lq, plan=ONE_STEP, batch_size=8), hq)

    class Swapped(torch.nn.Module):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return nano.latents.encode(x.roll(1, 0))

    usual, nano.hint_latents = nano.hint_latents, Swapped()
    try:
        wrong = mean_psnr(nano(lq, plan=ONE_STEP, batch_size=8), hq)
    finally:
        nano.hint_latents = usual
    assert right - wrong >= 3


def test_it_restores(nano: Restorer, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """With the decoder as it was before adversarial tuning, one step beats bicubic on degraded photographs."""
    from consissr.models.base import load_base

    hq, lq = pair
    tuned, nano.latents = nano.latents, load_base("nano").latents.eval().requires_grad_(False)
    try:
        restored = nano(lq, plan=ONE_STEP, batch_size=8)
    finally:
        nano.latents = tuned
    assert mean_psnr(restored, hq) > mean_psnr(images.resize(lq, (192, 192)), hq)


def test_running_again_gives_the_same_bits(nano: Restorer) -> None:
    x = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(nano(x, seed=3), nano(x, seed=3))
    assert not torch.equal(nano(x, seed=3), nano(x, seed=4))


def test_batches_and_order_change_rounding_only(nano: Restorer) -> None:
    x = torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one_by_one = nano(x, keys=["a", "b", "c"])
    together = nano(x, keys=["a", "b", "c"], batch_size=3)
    backwards = nano(x.flip(0), keys=["c", "b", "a"]).flip(0)
    assert torch.equal(one_by_one, backwards)
    close = (one_by_one - together).abs().mul(127.5) <= 1
    assert close.float().mean() >= 0.999
