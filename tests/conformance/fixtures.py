"""Conformance folders: of which kinds one is, its files, its model through our readers, and what is compared how."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

NETWORK = 2e-5
"""Relative L2 of network outputs, latents and losses."""

GUIDED_LATENT = 1e-4
"""Relative L2 of ConsisSR's final latent after guided steps."""

GRADIENT = 1e-3
"""Relative L2 of gradients."""

IMAGE = 1e-3
"""Largest absolute difference of float images."""

KINDS = {
    "consissr": ("outputs.safetensors",),
    "consissr_train": ("train_outputs.safetensors",),
    "consissr_common": (
        "schedule.npz",
        "schedule50.json",
        "colorfix.npz",
        "image_ops.npz",
        "resize_cases.json",
        "stage1_lr_multiplier.json",
        "rclip_distill.*",
    ),
    "ccsr": (
        "controlnet/config.json",
        "networks.safetensors",
        "run_*.safetensors",
        "stage[12]_outputs.safetensors",
        "tiled_vae.safetensors",
        "color_fix.npz",
        "geometry.*",
        "stability_*",
        "degradation_seeded.npz",
    ),
}
"""Files that make a folder one of a kind; it may be of several."""


@dataclass
class Check:
    """One quantity: `name` is "file:key" with the key the authors' code wrote, or words where it has none.

    kind 'relative': relative L2 error at most `tolerance`. 'absolute': largest error at most `tolerance`.
    'exact': equal. 'uint8': equal or off by one.
    """

    name: str
    got: Any
    want: Any
    tolerance: float = NETWORK
    kind: str = "relative"

    def errors(self) -> tuple[float, float]:
        """Largest absolute and relative L2 error; infinite where shapes differ or a value is not finite."""
        got, want = (torch.as_tensor(value).detach().double() for value in (self.got, self.want))
        if got.shape != want.shape:
            return float("inf"), float("inf")
        if got.numel() == 0:
            return 0.0, 0.0
        difference = got - want
        largest = difference.abs().max().item()
        relative = (difference.norm() / want.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()
        finite = bool(torch.isfinite(difference).all())
        return (largest, relative) if finite else (float("inf"), float("inf"))

    def passed(self) -> bool:
        """Whether the errors are within the tolerance."""
        largest, relative = self.errors()
        if self.kind == "relative":
            return relative <= self.tolerance or largest == 0
        return largest <= {"absolute": self.tolerance, "exact": 0.0, "uint8": 1.0}[self.kind]


@dataclass
class Lack:
    """A file or quantity of the format that this fixture does not have."""

    name: str


class Missing(Exception):  # noqa: N818 - no error: a fixture need not be complete
    """Says the file, or "file:key", that a check asked for and the fixture does not have."""


class Stored(dict):
    """What the fixture's file `file` holds; asking for a name that it does not hold raises Missing."""

    def __init__(self, file: str, found: dict[str, Any]) -> None:
        super().__init__(found)
        self.file = file

    def __missing__(self, name: str) -> Any:
        raise Missing(f"{self.file}:{name}" if self else self.file)


def lacking(cases: Callable[..., Iterator[Check | Lack]]) -> Callable[..., Iterator[Check | Lack]]:
    """The same checks, ended by a Lack where they ask for something that the fixture does not have.

    Only what the fixture's own files lack ends them so: a name that our code lacks stays an error.
    """

    @wraps(cases)
    def guarded(*args: Any) -> Iterator[Check | Lack]:
        try:
            yield from cases(*args)
        except Missing as missing:
            yield Lack(str(missing))

    return guarded


class Fixture:
    """One conformance folder. `kinds`: of KINDS, those whose files it has any of."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self.kinds = {kind for kind, names in KINDS.items() if any(any(self.folder.glob(name)) for name in names)}
        if self.has("weights.safetensors") and "consissr_train" not in self.kinds:
            self.kinds.add("consissr")

    def has(self, name: str) -> bool:
        """Whether the folder has this file."""
        return (self.folder / name).is_file()

    def tensors(self, name: str) -> Stored:
        """All tensors of a safetensors file, floating-point ones as float32; empty if it is not there."""
        if not self.has(name):
            return Stored(name, {})
        with safe_open(self.folder / name, "pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        floats = {key: value.float() if value.is_floating_point() else value for key, value in found.items()}
        return Stored(name, floats)

    def arrays(self, name: str) -> Stored:
        """All arrays of an .npz file; empty if it is not there."""
        if not self.has(name):
            return Stored(name, {})
        with np.load(self.folder / name) as file:
            return Stored(name, {key: file[key] for key in file})

    def metadata(self, name: str) -> Stored:
        """The metadata of a safetensors file; Missing if it is not there."""
        if not self.has(name):
            raise Missing(name)
        with safe_open(self.folder / name, "pt") as file:
            return Stored(f"metadata of {name}", file.metadata() or {})

    def json(self, name: str) -> Any:
        """A JSON file, its objects as Stored; Missing if it is not there."""
        if not self.has(name):
            raise Missing(name)
        return json.loads((self.folder / name).read_text(), object_hook=lambda found: Stored(name, found))

    @cached_property
    def model(self) -> Any:
        """The fixture's model through the reader that users run (CCSR v2's, or ConsisSR's); Missing without weights."""
        if self.has("controlnet/config.json"):
            from consissr.weights.released_ccsr import read_v2

            return read_v2(self.folder)
        weights = self.weights_folder / "weights.safetensors"
        if not weights.is_file():
            raise Missing("controlnet/config.json" if "ccsr" in self.kinds else "weights.safetensors")
        from consissr.weights.released_consissr import read

        described = self if self.has("config.json") else Fixture(self.weights_folder)
        return read(weights, dict(described.json("config.json")["clip"]))

    @property
    def latents(self) -> Any:
        """The model's autoencoder; Missing if the folder has none."""
        return self._part("latents", "vae/")

    @property
    def hint_latents(self) -> Any:
        """What encodes the hint."""
        return self.model.hint_latents or self.latents

    @property
    def unet(self) -> Any:
        """The model's UNet; Missing if the folder has none."""
        return self._part("unet", "unet/")

    def _part(self, name: str, folder: str) -> Any:
        if (part := getattr(self.model, name)) is None:
            raise Missing(folder)
        return part

    @property
    def weights_folder(self) -> Path:
        """Where weights.safetensors is: a training fixture uses its sibling's (consissr_train_A: consissr_A)."""
        if self.has("weights.safetensors"):
            return self.folder
        return self.folder.with_name(self.folder.name.replace("_train", ""))

    @cached_property
    def denoiser(self) -> Any:
        """The model's noise prediction, as users run it. The releases' networks predict noise, whatever is said of the
        schedule: only the step of CCSR's loop would read the scheduler's `prediction_type`.
        """
        from consissr.models.denoiser import Denoiser

        return Denoiser(self.unet, self.model.controlnet, self.model.alpha_bar).eval()


def to_image(pixels: Tensor) -> Tensor:
    """uint8 (H, W, 3) or (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1], in the fixtures' order of operations."""
    pixels = pixels if pixels.ndim == 4 else pixels[None]
    return (pixels.float() / 255).clamp(0, 1).permute(0, 3, 1, 2).contiguous() * 2 - 1


def views(stored: dict[str, Tensor], name: str, got: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every stored form of the quantity `name` with the same part of `got` (..., H, W): whole, `_sN` (stride N),
    `_crop` (rows 100-163, columns 200-263), `_mean` and `_std` (per channel). A uint8 `got` is (H, W, C).
    """
    rows, columns = slice(100, 164), slice(200, 264)
    for key in stored:
        if not (match := re.fullmatch(re.escape(name) + r"(?:_(s\d+|crop|mean|std))?", key)):
            continue
        form = match[1] or ""
        if form in ("mean", "std"):
            flat = got.transpose(0, 1).flatten(1)
            yield key, flat.mean(1) if form == "mean" else flat.std(1)
        elif form == "crop":
            yield key, got[rows, columns] if got.dtype == torch.uint8 else got[..., rows, columns]
        elif form:
            step = slice(None, None, int(form[1:]))
            yield key, got[step, step] if got.dtype == torch.uint8 else got[..., step, step]
        else:
            yield key, got


def compare(
    file: str, stored: dict[str, Tensor], name: str, got: Tensor, tolerance: float = NETWORK, kind: str = "relative"
) -> Iterator[Check | Lack]:
    """A check of every stored form of `name`, or a Lack if there is none."""
    found = False
    for key, part in views(stored, name, got):
        found = True
        yield Check(f"{file}:{key}", part, stored[key], tolerance, kind)
    if not found:
        yield Lack(f"{file}:{name}")
