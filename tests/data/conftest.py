"""Small photographs for the tests of training's data."""

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.data.datasets import PhotoDataset
from consissr.nano.config import NanoDataConfig


def photo(seed: int, width: int = 60, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def no_cache(tmp_path_factory, monkeypatch):
    """Nothing is remembered of other tests' shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    """Eight images in two sub-folders, and a file that is none."""
    root = tmp_path / "photos"
    for i in range(8):
        path = root / ("a" if i < 4 else "b/c") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(path)
    (root / "notes.txt").write_text("not a list\n")
    return root


def same(a: dict, b: dict) -> bool:
    return torch.equal(a["hq"], b["hq"]) and a["name"] == b["name"] and a["seed"] == b["seed"]


def photos_of(*paths: object, crop: int = 32, seed: int = 0, **settings: object) -> PhotoDataset:
    """A data set of `paths`; `settings` are fields of the configuration."""
    return PhotoDataset(NanoDataConfig(paths=[str(path) for path in paths], crop=crop, **settings), seed)
