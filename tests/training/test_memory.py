"""What saves memory and changes no result: frozen weights in bf16, AdamW's moments in 8 bits; averaged weights."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from consissr.nano.config import run_config
from consissr.training.checkpoints import load_checkpoint
from consissr.weights.files import WEIGHTS, read_weights
from scripts.train import main
from tests.training.tiny import beside, started, words


def test_frozen_weights_in_bf16_change_nothing(runs: Path, photos: Path, tmp_path: Path) -> None:
    """Bit for bit: neither what is learned under autocast, nor what is exported of the frozen parts."""
    ends = []
    for word in ("fp32", "bf16"):
        folder = beside(runs, tmp_path / word, "deft")
        more = ("precision=bf16", f"frozen_precision={word}", "export_precision=fp32")
        assert main(words("deft", photos, folder, *more)) == 0
        state = load_checkpoint(folder / "deft/checkpoint-2")
        ends.append((state["weights"], read_weights(folder / "deft/controlnet" / WEIGHTS)))
    for fp32, bf16 in zip(*ends, strict=True):
        assert fp32.keys() == bf16.keys() and all(torch.equal(fp32[name], bf16[name]) for name in fp32)


def test_frozen_weights_take_half(runs: Path, photos: Path, tmp_path: Path) -> None:
    folder = beside(runs, tmp_path, "deft")
    _, path, *overrides = words("deft", photos, folder, "precision=bf16", "frozen_precision=bf16")
    loop = started(run_config(path, overrides))
    trained = {id(p) for p in loop.weights().values()}
    frozen = [p for p in loop.stage.networks.parameters() if id(p) not in trained]
    assert not any(p.requires_grad for p in frozen) and {p.dtype for p in loop.weights().values()} == {torch.float32}
    size = sum(p.numel() * p.element_size() for p in frozen) / sum(p.numel() * 4 for p in frozen)
    assert 0.5 <= size < 0.55


def test_eight_bit_adamw_resumes_bit_for_bit(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    more = ("steps=4", "checkpoint_limit=9", "optimizer.kind=adamw8bit", "autoencoder.widths=[32,32]")
    arguments = words("autoencoder", photos, tmp_path, *more)  # tensors below 4096 elements keep 32 bits
    assert main(arguments) == 0
    through = load_checkpoint(tmp_path / "autoencoder/checkpoint-4")
    moments = [v for s in through["optimizers"]["autoencoder"]["state"].values() for v in _tensors(s)]
    assert any(v.dtype == torch.uint8 for v in moments)
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"autoencoder/checkpoint-{step}")
    assert main(["--resume", "latest", *arguments]) == 0
    resumed = load_checkpoint(tmp_path / "autoencoder/checkpoint-4")["weights"]
    assert all(torch.equal(value, resumed[name]) for name, value in through["weights"].items())


def _tensors(state: object) -> list[torch.Tensor]:
    """All tensors of nested dicts."""
    if isinstance(state, dict):
        return [t for value in state.values() for t in _tensors(value)]
    return [state] if isinstance(state, torch.Tensor) else []


def test_validation_is_the_same_every_time(photos: Path, tmp_path: Path, runs: Path) -> None:
    """Fixed images, degradations and noise: equal weights give equal figures, in new runs, too."""
    found = []
    for name in ("one", "two"):
        folder = beside(runs, tmp_path / name, "nuts")
        more = (f"data.validation={photos}", "data.validation_count=3")
        _, path, *overrides = words("nuts", photos, folder, *more, f"seed={len(found)}", f"init={runs}/nuts")
        loop = started(run_config(path, overrides))
        found += [loop.validation.run(loop.stage, 0) for _ in range(2)]
    assert found[0] == found[1] == found[2] == found[3]
    names = {f"validation/{kind}_{metric}" for kind in ("lq", "restored") for metric in ("psnr", "ssim")}
    assert found[0].keys() == names
