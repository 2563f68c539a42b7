"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.train import main
from tests.training.tiny import SMALL, words


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six smooth random pictures of 80x96 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(6):
        small = Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8))
        small.resize((96, 80), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def runs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages, each trained for two steps."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in SMALL:
        assert main(words(stage, photos, folder, f"data.validation={photos}", "data.validation_count=2")) == 0, stage
    return folder
