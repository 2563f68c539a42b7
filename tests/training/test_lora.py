"""Low-rank adapters of the UNet: what learns, what is stored, and that ours and plain diffusers read the same of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from consissr.config.loading import load_config
from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.training.loop import Loop
from consissr.weights.base import load_base
from consissr.weights.files import LORA, UNET_ADAPTER, read_weights
from consissr.weights.folder import load_model
from scripts.train import stage_builder
from tests.training.tiny import COMMON

pytest.importorskip("peft")
RANK = 2


def run(base: Path, photos: Path, folder: Path, *more: str) -> Loop:
    words = [f"data.paths=[{photos}]", f"output_dir={folder}", f"model.base={base}", *COMMON, "optimizer.lr=0.01"]
    config = load_config(TrainConfig, "configs/ccsr/nuts.yaml", [*words, f"model.unet_lora={RANK}", *more])
    return Loop(config, stage_builder("nuts"))


def test_adapters_learn_are_stored_and_merged(base: Path, photos: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    loop = run(base, photos, tmp_path / "run")
    unet = loop.stage.model.unet
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    attentions = sum(name.endswith("attn1.to_q.lora_A.default.weight") for name in before)
    adapters = [name for name in loop.weights() if "lora_" in name]
    assert len(adapters) == 2 * 2 * 4 * attentions > 0, "A and B, self- and cross-attention, four layers"
    loop.run()
    changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name.removeprefix("controlnet/unet.") for name in adapters}

    stored = read_weights(tmp_path / "run" / LORA)
    assert len(stored) == len(adapters) and not (tmp_path / "run" / UNET_ADAPTER).exists()
    assert all(min(value.shape) == RANK and value.abs().sum() > 0 for value in stored.values())
    merged = load_model(tmp_path / "run").unet
    plain = load_base(str(base)).unet
    theirs = UNet2DConditionModel.from_pretrained(base / "unet")
    theirs.load_lora_adapter(stored, prefix="unet")
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), torch.randn(2, 5, 8)
    with torch.no_grad():
        ours, trained = merged(x, t, text).sample, unet(x, t, text).sample
        torch.testing.assert_close(ours, trained, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours, theirs(x, t, text).sample, atol=1e-5, rtol=1e-4)
        assert (ours - plain(x, t, text).sample).abs().max() > 1e-3

    again = run(base, photos, tmp_path / "again", f"init={tmp_path / 'run'}", "steps=1")
    with torch.no_grad():
        torch.testing.assert_close(again.stage.model.unet(x, t, text).sample, trained, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="use model.unet_lora=2"):
        run(base, photos, tmp_path / "lost", f"init={tmp_path / 'run'}", "model.unet_lora=0")


def test_what_excludes_each_other() -> None:
    with pytest.raises(UserError, match="use one of them"):
        load_config(TrainConfig, None, ["model.unet_lora=4", "model.unet_trained=[conv_in]"])
