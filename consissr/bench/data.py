"""Images per second and core of our data path beside basicsr's own, from files to LQ/HQ batches, in one process."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from consissr.bench import basicsr_path
from consissr.config.data import DataConfig
from consissr.data.datasets import PhotoDataset
from consissr.data.degradation import degrade
from consissr.data.listing import list_photos
from consissr.data.settings import DegradationConfig
from consissr.images.rgb8 import decode

CROP = 400  # basicsr's dataset knows no other
BATCH = 4


@dataclass
class Speed:
    """CPU milliseconds per image of one path."""

    name: str
    read: float
    degrade: float

    @property
    def rate(self) -> float:
        """Images per second and core."""
        return 1000 / (self.read + self.degrade)


def compare(config: DegradationConfig, images: int = 48, folder: str = "") -> list[Speed]:
    """Run basicsr's path and ours alternately on one thread, on the same `images` files; [basicsr's, ours].

    folder: photographs to use (enlarged where smaller than a crop), or "" for made-up ones. Both read and decode
    files, crop 400x400, mirror, and degrade by `config` without sharpening, in batches of four. Ours also makes the
    enlarged LQ images, which basicsr's path leaves to others.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            names = write_photos(Path(scratch), folder)
            return _alternate(Path(scratch), names, config, images)
    finally:
        torch.set_num_threads(threads)


def _alternate(scratch: Path, names: list[str], config: DegradationConfig, images: int) -> list[Speed]:
    """Batches of both paths in turn; means over all but the first batch, which warms up."""
    meta = scratch / "meta.txt"
    meta.write_text("\n".join(names))
    theirs = basicsr_path.dataset(scratch, meta, config)
    ours = PhotoDataset(DataConfig(paths=[str(scratch / "*.jpg")], crop=CROP, cache_mb=0), seed=0)

    def read_theirs(first: int):
        items = [theirs[(first + i) % len(names)] for i in range(BATCH)]
        return [torch.stack([item[k] for item in items]) for k in ("gt", "kernel1", "kernel2", "sinc_kernel")]

    def read_ours(first: int):
        samples = [ours[first + i] for i in range(BATCH)]
        return torch.stack([s["hq"] for s in samples]), [s["seed"] for s in samples]

    paths = (
        ("basicsr", read_theirs, lambda batch: basicsr_path.feed_data(batch[0], batch[1:], config)),
        ("ours", read_ours, lambda batch: degrade(batch[0], config, batch[1])),
    )
    rounds = [[_time(read, run, first) for _, read, run in paths] for first in range(0, images + BATCH, BATCH)]
    mean = np.mean(rounds[1:], axis=0) / BATCH * 1000
    return [Speed(name, *mean[i]) for i, (name, _, _) in enumerate(paths)]


def _time(read: Callable, run: Callable, first: int) -> tuple[float, float]:
    """CPU seconds of reading and of degrading one batch."""
    start = time.process_time()
    batch = read(first)
    middle = time.process_time()
    run(batch)
    return middle - start, time.process_time() - middle


def write_photos(scratch: Path, folder: str = "") -> list[str]:
    """At least 512x512 JPEG files for both paths; their names."""
    pictures = []
    if folder:
        pictures = [Image.fromarray(decode(photo.read())) for photo in list_photos(folder)[:32]]
    else:
        rng = np.random.default_rng(0)
        for _ in range(16):
            coarse = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
            pictures.append(coarse.resize((768, 512), Image.Resampling.BICUBIC))
    for i, picture in enumerate(pictures):
        scale = max(1.0, 512 / min(picture.size))
        size = (round(picture.width * scale), round(picture.height * scale))
        picture.resize(size, Image.Resampling.BICUBIC).save(scratch / f"{i:03}.jpg", quality=95)
    return [f"{i:03}.jpg" for i in range(len(pictures))]
