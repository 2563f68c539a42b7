"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.models.image_prompt import build_tower
from consissr.nano.config import ClipConfig, NanoConfig
from consissr.weights.image_encoder import save_tower
from scripts.train import main
from tests.training.tiny import SMALL, validated, words


@pytest.fixture(scope="session")
def photos(made_once: Callable[..., Path]) -> Path:
    """Six smooth random pictures of 80x96 pixels."""

    def draw(folder: Path) -> None:
        rng = np.random.default_rng(0)
        for i in range(6):
            small = Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8))
            small.resize((96, 80), Image.Resampling.BICUBIC).save(folder / f"{i}.png")

    return made_once("photos", draw)


@pytest.fixture(scope="session")
def runs(photos: Path, made_once: Callable[..., Path]) -> Path:
    """The stages, each trained for two steps."""

    def train(folder: Path) -> None:
        for stage in SMALL:
            assert main(words(stage, photos, folder, *validated(photos))) == 0, stage

    return made_once("runs", train)


VISION = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8}


@pytest.fixture(scope="session")
def base(made_once: Callable[..., Path]) -> Path:
    """A base of random weights with a text encoder and an image tower. Tests that change it change a copy."""
    return made_once("base", make_base)


def make_base(folder: Path) -> None:
    """Writes it to `folder`."""
    from diffusers import AutoencoderKL, DDPMScheduler
    from transformers import CLIPTokenizer

    from consissr.nano.clip import build_text, write_tokenizer
    from consissr.nano.prior import build_unet

    torch.manual_seed(0)
    config = NanoConfig()
    config.prior.widths, config.prior.attention = [16, 32], [False, True]
    config.prior.heads, config.prior.context_dim = 2, 8
    blocks = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    write_tokenizer(folder / "tokenizer", 8)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = build_text(ClipConfig(text_width=8, text_layers=1, text_heads=2, text_length=8, embed_dim=8), tokenizer)
    vae = AutoencoderKL(**blocks, **kinds)
    parts = {"unet": build_unet(config, 4, 4), "vae": vae, "scheduler": scheduler, "text_encoder": text}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    save_tower(folder, build_tower(12, VISION))
