"""A stand-in for the model, and uploads as visitors bring them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.images import formats
from consissr.images.resize import resize
from consissr.images.rows import rows_of
from consissr.inference.batch import Settings


class Enlarger:
    """Bicubic, in three tiles; `begun` is called before each with its number."""

    device, precision = torch.device("cpu"), "fp32"

    def __init__(self, begun=lambda tile: None):
        self.begun, self.calls = begun, []

    def __call__(self, photos, *, scale, longest, on_tile, **settings):
        self.calls.append(SimpleNamespace(keys=settings["keys"], seed=settings["seed"], plan=settings["plan"]))
        for tile in (1, 2, 3):
            self.begun(tile)
            on_tile(tile, 3, tile / 3)
        x = rows_of(photos[0].image, 0, photos[0].image.shape[2])
        return [photos[0].restored(resize(x, formats.output_size(*x.shape[-2:], scale, longest))[0])]


@pytest.fixture
def enlarger():
    return Enlarger


@pytest.fixture
def load():
    """load(enlarger) -> what a run loads."""
    return lambda model=None, **settings: lambda: (model or Enlarger(), Settings(**settings))


@pytest.fixture
def upload(tmp_path, rng):
    """upload(name) -> a file of that name in a folder of its own, as gradio stores it: a picture if it can be one."""
    numbers = iter(range(1000))

    def make(name: str, size: tuple[int, int] = (9, 12)) -> str:
        path = tmp_path / f"upload{next(numbers)}" / name
        path.parent.mkdir()
        if path.suffix in formats.WRITABLE and "broken" not in name:
            Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(path)
        else:
            path.write_text(f"{tmp_path / 'secret.png'}\n")
        return str(path)

    return make
