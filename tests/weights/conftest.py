"""A machine with empty caches, the hub that it asks, and small models in every layout that was published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from consissr.weights import find
from tests.weights.standin import Hub, turn_to, v1_state


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with empty caches, and the hub it asks: `machine.root` holds the repositories."""
    hub_ = Hub(tmp_path / "hub")
    turn_to(hub_.address, tmp_path, monkeypatch)
    yield hub_
    hub_.gone()


@pytest.fixture(scope="session")
def v1(shared, tmp_path_factory) -> dict[str, Path]:
    """The v1 checkpoint of the reference's 825 keys, as a Lightning file and as a half-precision safetensors file."""
    shapes = json.loads((shared / "reference" / "ccsr_v1_stage2_keys.json").read_text())
    state, folder = v1_state(shapes), tmp_path_factory.mktemp("v1")
    torch.save({"state_dict": state, "epoch": 3}, folder / "real-world_ccsr.ckpt")
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    weights = {n: v.clone() for n, v in half.items() if not n.startswith(("decoder_loss.", "betas", "logvar"))}
    save_file(weights, folder / "real-world_ccsr-fp16.safetensors")
    return {"ckpt": folder / "real-world_ccsr.ckpt", "half": folder / "real-world_ccsr-fp16.safetensors"}


@pytest.fixture
def all_in_one(shared, tmp_path) -> Path:
    """CCSR v2 with its base in one repository, small: the reference's networks, a text encoder and a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path / "v2"
    for part in ("controlnet", "vae", "unet"):
        shutil.copytree(shared / "conformance" / "ccsr_A" / part, folder / part, copy_function=shutil.copyfile)
        (folder / part).chmod(0o755)  # the reference may be read-only
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(find.ASSETS / "nano" / part, folder / part)
    width = json.loads((folder / "unet" / "config.json").read_text())["cross_attention_dim"]
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(vocab_size=49408, **sizes)).save_pretrained(folder / "text_encoder")
    said = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(said | {"prediction_type": "epsilon"}))
    return folder
