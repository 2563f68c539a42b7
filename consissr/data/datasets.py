"""Training photographs: sample number n is a pure function of (seed, n), whatever the restarts and processes."""

import logging
import math
import threading
from typing import Any

import numpy as np

from consissr.config.data import DataConfig
from consissr.data.listing import Photos, list_photos
from consissr.data.pairs import check_names, pairs
from consissr.data.photo import PhotoFile
from consissr.errors import UserError
from consissr.images.resize import resize
from consissr.images.rgb8 import center_crop, decode, resized_window, to_tensor

log = logging.getLogger(__name__)

MAX_RETRIES = 20


class RejectedError(Exception):
    """An image that cannot give a sample; the message says why."""


def generator(*key: int) -> np.random.Generator:
    """A generator that belongs to `key`, independent of those of other keys."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


class PhotoDataset:
    """Crops of the photographs that a configuration names, by sample number: an endless sequence.

    Where entries have probabilities, their images are drawn with replacement; else in epochs over all images.

    Images that cannot be read are replaced by another draw of the same sample number, counted in `skipped` (label ->
    reason) and logged once each. Damaged ones are remembered; one that could not be read is tried again when it is next
    drawn. Reading is safe from several threads. Raises UserError for settings that cannot be.
    """

    def __init__(self, config: DataConfig, seed: int):
        check(config)
        self.config, self.seed, self.crop, self.scale = config, seed, config.crop, config.scale
        groups: list[Photos | list[PhotoFile]] = [list_photos(path) for path in config.paths]
        self.partners: list[list[PhotoFile]] = [[] for _ in groups]
        """For each entry of `paths` the partners of its images, in their order; [] where there are none."""
        for i, folder in enumerate(config.lq_paths):
            if folder:
                groups[i], self.partners[i] = pairs(groups[i], folder, config.pair_names)
        self.groups = groups
        self._starts = np.cumsum([0, *map(len, groups)])
        shares = config.probabilities
        self._edges = np.cumsum(shares) / np.sum(shares) if shares else None
        self.skipped: dict[str, str] = {}
        self._damaged: dict[str, str] = {}
        self._cache: dict[str, np.ndarray] = {}
        self._cache_size = self._cache_left = config.cache_mb * 2**20
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of images; an epoch."""
        return int(self._starts[-1])

    def order(self, epoch: int) -> np.ndarray:
        """The image indices of an epoch, a permutation that depends on (seed, epoch)."""
        indices = self._orders.get(epoch)
        if indices is None:
            indices = generator(self.seed, 0, epoch).permutation(len(self))
            last = list(self._orders.items())[-1:]  # threads are on both sides of an epoch's end
            self._orders = dict([*last, (epoch, indices)])
        return indices

    def index(self, n: int, attempt: int = 0) -> int:
        """Which image sample number `n` shows; `attempt` counts replacements of unreadable ones."""
        if self._edges is None and attempt == 0:
            return int(self.order(n // len(self))[n % len(self)])
        rng = generator(self.seed, 1, n, attempt)
        if self._edges is None:
            return int(rng.integers(len(self)))
        group = min(int(np.searchsorted(self._edges, rng.random(), side="right")), len(self._edges) - 1)
        return int(rng.integers(self._starts[group], self._starts[group + 1]))

    def pair(self, index: int) -> tuple[PhotoFile, PhotoFile | None]:
        """Image number `index` of all, and its low-quality partner, if it has one."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        number = int(index - self._starts[group])
        partners = self.partners[group]
        return self.groups[group][number], partners[number] if partners else None

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Sample number `n` >= 0: hq [3,S,S] in [-1,1], name, and seed (for its degradation).

        Pairs have lq too: the low-quality crop, enlarged to [3,S,S] in [-1,1] as in use.

        Raises UserError when many replacements in a row cannot be read either.
        """
        for attempt in range(MAX_RETRIES):
            photo, partner = self.pair(self.index(n, attempt))
            try:
                return self._sample(photo, partner, n)
            except RejectedError as reason:
                self._skip(photo.label, str(reason))
        label, reason = next(reversed(self.skipped.items()))
        last = f"the last: {label}: {reason}"
        raise UserError(f"{MAX_RETRIES} images in a row gave no sample, {last}; check data.paths and data.crop")

    def _sample(self, photo: PhotoFile, partner: PhotoFile | None, n: int) -> dict[str, Any]:
        rng = generator(self.seed, 2, n)
        images = [self._image(p) for p in (photo, partner) if p is not None]
        if self.config.crop_rule == "center":
            images = [center_crop(images[0], self.crop)]
        elif self.config.shrink < 1:
            images = [self._shrunk_crop(images[0], rng)]
        else:
            images = self._random_crops(images, rng)
        mirror, upend = rng.random(2) < 0.5
        if self.config.flips != "none" and mirror:
            images = [image[:, ::-1] for image in images]
        if self.config.flips == "both" and upend:
            images = [image[::-1] for image in images]
        sample: dict[str, Any] = {"hq": to_tensor(images[0])[0]}
        if partner is not None:
            sample["lq"] = resize(to_tensor(images[1])[0], (self.crop, self.crop))
        return sample | {"name": photo.name, "seed": int(rng.integers(2**62))}

    def _shrunk_crop(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random window, larger than the crop by a random factor, brought to the crop's size."""
        side = min(round(self.crop / rng.uniform(self.config.shrink, 1)), *image.shape[:2])
        if side < self.crop:
            raise RejectedError(f"its shorter side, {side} pixels, is less than a {self.crop}-pixel crop needs")
        top, left = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
        return resized_window(image, left, top, side, self.crop)

    def _random_crops(self, images: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        """The same random window of an HQ image and, for pairs, of its LQ partner."""
        step = self.scale if len(images) == 2 else 1
        h, w = images[0].shape[:2]
        if len(images) == 2 and images[1].shape[:2] != (h // step, w // step):
            lh, lw = images[1].shape[:2]
            raise RejectedError(f"its {w}x{h} pixels are not {step} times its partner's {lw}x{lh}")
        if min(h, w) < self.crop:
            raise RejectedError(f"its {w}x{h} pixels are fewer than a {self.crop}-pixel crop needs")
        top = int(rng.integers((h - self.crop) // step + 1))
        left = int(rng.integers((w - self.crop) // step + 1))
        return [
            image[top * s : top * s + self.crop * s // step, left * s : left * s + self.crop * s // step]
            for image, s in zip(images, (step, 1)[: len(images)], strict=True)
        ]

    def _image(self, photo: PhotoFile) -> np.ndarray:
        """Decoded uint8 RGB [H,W,3], from memory where it is kept."""
        cached = self._cache.get(photo.label)
        if cached is not None:
            return cached
        if photo.label in self._damaged:
            raise RejectedError(self._damaged[photo.label])
        try:
            image = self._decoded(photo)
        except OSError as error:  # perhaps not for ever
            raise RejectedError(str(error)) from error
        except UserError as error:
            self._damaged[photo.label] = str(error)
            raise RejectedError(str(error)) from error
        with self._lock:
            if image.nbytes * len(self) > 4 * self._cache_size:
                self._cache_left = 0
            if image.nbytes <= self._cache_left and photo.label not in self._cache:
                self._cache[photo.label] = image
                self._cache_left -= image.nbytes
        return image

    def _decoded(self, photo: PhotoFile) -> np.ndarray:
        """Pixels; bytes that cannot be decoded are read once more, as a hiccup may have cut them short."""
        least = self.crop if self.config.crop_rule == "center" else 0
        data = photo.read()
        try:
            return decode(data, least)
        except UserError:
            again = photo.read()
            if again == data:
                raise
            return decode(again, least)

    def _skip(self, label: str, reason: str) -> None:
        with self._lock:
            if label in self.skipped:
                return
            self.skipped[label] = reason
        log.warning("skipped %s: %s (%d so far)", label, reason, len(self.skipped))


def check(config: DataConfig) -> None:
    """UserError for settings that cannot be."""
    entries, shares = len(config.paths), config.probabilities
    if not entries:
        raise UserError("no training images: name at least one folder, list or shard in data.paths")
    for name, values in (("probabilities", shares), ("lq_paths", config.lq_paths)):
        if len(values) not in (0, entries):
            raise UserError(f"data.{name} has {len(values)} entries for {entries} data.paths")
    if shares and not (all(0 <= p < math.inf for p in shares) and sum(shares) > 0):
        raise UserError(f"data.probabilities is {list(shares)}: use numbers from 0 up, not all 0")
    if not 0 < config.shrink <= 1:
        raise UserError(f"data.shrink is {config.shrink}: use a factor above 0 and at most 1")
    if config.shrink < 1 and config.crop_rule != "random":
        raise UserError("data.shrink is for random crops: leave it at 1")
    if not any(config.lq_paths):
        return
    if config.crop_rule != "random" or config.shrink < 1:
        raise UserError("LQ/HQ pairs are never resized: data.crop_rule must be 'random', and data.shrink 1")
    if config.scale not in (1, 2, 4):
        raise UserError(f"data.scale is {config.scale}: the HQ sides of pairs are 1, 2 or 4 times the LQ sides")
    if config.crop % config.scale:
        raise UserError(f"data.crop {config.crop} does not divide by the pairs' scale {config.scale}")
    check_names(config.pair_names)
