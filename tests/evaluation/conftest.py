"""Small synthetic result folders."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZE = (96, 192)  # height, width: the smallest that NIQE takes


def picture(seed: int, noise: float = 0.0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A smooth random colour image with texture, uint8 (H, W, 3), plus `noise` levels of noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]] / 16.0
    waves = [np.sin(x * rng.uniform(0.3, 3) + y * rng.uniform(0.3, 3) + rng.uniform(0, 6)) for _ in range(9)]
    image = 128 + 30 * np.stack([sum(waves[c::3]) for c in range(3)], axis=-1) / 1.5
    image += rng.normal(0, 4, image.shape) + np.random.default_rng(seed + 1000).normal(0, 1, image.shape) * noise
    return image.clip(0, 255).round().astype(np.uint8)


@pytest.fixture
def make_picture() -> Callable[..., np.ndarray]:
    """make_picture(seed, noise, size): see `picture`."""
    return picture


@pytest.fixture
def save() -> Callable[..., Path]:
    """save(folder, {name: array}, ext=".png") writes images and returns the folder."""

    def write(folder: Path, images: dict[str, np.ndarray], ext: str = ".png") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            Image.fromarray(image).save(folder / f"{name}{ext}")
        return folder

    return write


@pytest.fixture
def sets(tmp_path: Path, save: Callable[..., Path]) -> dict[str, Path]:
    """Folders of three images: hr, lr (a quarter of the size), good and bad results, and three runs."""
    names = ("a", "b", "c")
    folders = {
        "hr": save(tmp_path / "hr", {n: picture(i) for i, n in enumerate(names)}),
        "good": save(tmp_path / "good", {n: picture(i, 2) for i, n in enumerate(names)}),
        "bad": save(tmp_path / "bad", {n: picture(i, 20) for i, n in enumerate(names)}),
        "lr": save(tmp_path / "lr", {n: picture(i)[::4, ::4] for i, n in enumerate(names)}),
        "runs": tmp_path / "runs",
    }
    for run in range(3):
        noisy = {n: picture(i, 3 + run) for i, n in enumerate(names)}
        save(folders["runs"] / f"sample{run}", noisy)
    return folders
