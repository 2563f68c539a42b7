"""The bundled models: load without a network, have learned to restore, and are as deterministic as documented."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ccsr import nuts_plan
from consissr import Restorer
from consissr.data.degradation import degrade, preset
from consissr.evaluation.metrics import psnr
from consissr.images import codec
from consissr.images.resize import resize

ONE_STEP = nuts_plan(6, 2 / 3, 2 / 3)


@pytest.fixture(scope="module")
def nano() -> Restorer:
    return Restorer.load("nano-ccsr")


@pytest.fixture(scope="module")
def pair(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres of the package's six photographs (6, 3, 96, 96), and the same degraded (6, 3, 24, 24)."""
    files = sorted(path for path in (root / "consissr/assets/samples").iterdir() if path.suffix in (".jpg", ".png"))
    whole = [codec.read(file).pixels for file in files]
    places = [((x.shape[1] - 96) // 2, (x.shape[2] - 96) // 2) for x in whole]
    hq = torch.stack([x[:, top : top + 96, left : left + 96] for x, (top, left) in zip(whole, places, strict=True)])
    return hq, degrade(hq, preset("ccsr"), seeds=range(6))[0]


def mean_psnr(x: torch.Tensor, hq: torch.Tensor) -> float:
    return float(psnr(x.clamp(-1, 1) / 2 + 0.5, hq / 2 + 0.5).mean())


def test_it_is_small(root: Path) -> None:
    files = [path for path in (root / "consissr" / "assets" / "nano").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6


@pytest.mark.parametrize(("name", "plan"), [("nano-ccsr", ONE_STEP), ("nano-consissr", None)])
def test_the_condition_matters(name: str, plan: list | None, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """With it a result is no more than 1 dB worse than bicubic (and sharper); another image's latent as the condition
    costs at least 5 dB (start, prompt and colours stay the image's own).
    """
    hq, lq = pair
    model = Restorer.load(name)
    right = mean_psnr(model(lq, plan=plan, batch_size=6), hq)

    class Swapped(torch.nn.Module):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return model.latents.encode(x.roll(1, 0))

    model.hint_latents = Swapped()
    wrong = mean_psnr(model(lq, plan=plan, batch_size=6), hq)
    assert right > mean_psnr(resize(lq, (96, 96)), hq) - 1
    assert right - wrong >= 5


def test_it_restores(nano: Restorer, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """With the decoder as it was before adversarial tuning, one step beats bicubic on degraded photographs."""
    from consissr.weights.base import load_base

    hq, lq = pair
    tuned, nano.latents = nano.latents, load_base("nano").latents.eval().requires_grad_(False)
    try:
        restored = nano(lq, plan=ONE_STEP, batch_size=6)
    finally:
        nano.latents = tuned
    assert mean_psnr(restored, hq) > mean_psnr(resize(lq, (96, 96)), hq)


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
