"""What a `Restorer` is called with and gives back: a PIL image, a list of them or of photos, or a tensor (B,3,H,W)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from numbers import Integral, Real

import torch
from PIL.Image import Image
from torch import Tensor

from consissr.errors import UserError
from consissr.images import codec
from consissr.images.codec import Photo
from consissr.images.geometry import Prepared
from consissr.images.rows import Rows, strips

Images = Image | list[Image] | list[Photo] | Tensor
Place = Callable[[torch.device, tuple[int, int]], torch.device]
"""(a device, a result's height and width) -> where such a result may be: there or on the CPU (models.memory)."""


def unpacked(inputs: Images) -> tuple[list[Tensor | Rows], list[Photo]]:
    """The images, each (1,3,H,W) float32 in [-1, 1], and how they were stored (nothing for a tensor).

    UserError for what is no image, and for a tensor of another shape, of whole numbers or of no image at all.
    """
    if isinstance(inputs, Tensor):
        if inputs.ndim != 4 or inputs.shape[1] != 3 or not inputs.numel() or not inputs.is_floating_point():
            found = f"{inputs.dtype} {tuple(inputs.shape)}"
            raise UserError(f"cannot restore a tensor of {found}: give floats (B, 3, H, W) in [-1, 1]")
        if inputs.device.type == "cpu" and inputs.abs().max() > 2:  # resampling overshoots by less; GPUs are not asked
            raise UserError(f"a tensor has values up to {inputs.abs().max():g}: give floats in [-1, 1]")
        return list(inputs.detach().float().split(1)), []
    if not isinstance(inputs, (Image, list, tuple)):
        raise UserError(f"cannot restore a {type(inputs).__name__}: give a PIL image, a list of them or a tensor")
    listed = [inputs] if isinstance(inputs, Image) else list(inputs)
    for item in listed:
        if not isinstance(item, (Image, Photo)):
            raise UserError(f"cannot restore a {type(item).__name__}: give a PIL image, a list of them or a tensor")
        if isinstance(item, Image) and 0 in item.size:  # which Pillow makes
            raise UserError(f"a picture of {item.width}x{item.height} pixels: both sides must be at least 1")
    photos = [item if isinstance(item, Photo) else codec.from_pil(item) for item in listed]
    return [photo.image for photo in photos], photos


def check_numbers(scale: float, **whole: int) -> None:
    """UserError for a scale that is no finite number above 0, and for others that are no whole numbers above 0."""
    if scale == inf:
        raise UserError(f"scale is {scale}: use a finite number, such as 4")
    for name, value in {"scale": scale, **whole}.items():
        kind = Real if name == "scale" else Integral
        if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
            raise UserError(f"{name} is {value!r}: use a {'number' if name == 'scale' else 'whole number'} above 0")


def noise_names(seed: int, repeat: int, keys: Sequence[str | int]) -> tuple[int, int, list[str | int]]:
    """What names the noise, as Python's own numbers and text. UserError for others: 1.0 would draw other noise."""
    for name, value in {"seed": seed, "repeat": repeat}.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise UserError(f"{name} is {value!r}: use a whole number")
    if odd := [key for key in keys if not isinstance(key, (str, Integral)) or isinstance(key, bool)]:
        raise UserError(f"key {odd[0]!r} is a {type(odd[0]).__name__}: use text or whole numbers, such as str(path)")
    return int(seed), int(repeat), [key if isinstance(key, str) else int(key) for key in keys]


def packed(inputs: Images, photos: list[Photo], results: list[Rows], place: Place) -> Images:
    """Results as the kind of thing that `inputs` is; a tensor on its device, where that has room: see Place."""
    if isinstance(inputs, Tensor):
        rows = [result.whole() for result in results]
        y = torch.cat(rows) if len(rows) > 1 else rows[0]  # a single one is not copied
        return y.to(place(inputs.device, y.shape[2:]))
    restored = [photo.restored(result) for photo, result in zip(photos, results, strict=True)]
    if isinstance(inputs, Image):
        return codec.to_pil(restored[0])
    pairs = zip(inputs, restored, strict=True)
    return [photo if isinstance(item, Photo) else codec.to_pil(photo) for item, photo in pairs]


def equal_sizes(shapes: Sequence[tuple], batch_size: int) -> list[list[int]]:
    """Indices in batches of at most `batch_size` whose shapes are equal; in order, where each is a batch of its own."""
    if batch_size <= 1:
        return [[i] for i in range(len(shapes))]
    groups: dict[tuple, list[int]] = {}
    for i, shape in enumerate(shapes):
        groups.setdefault(tuple(shape), []).append(i)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


def network_input(images: Sequence[Prepared], dtype: torch.dtype) -> Tensor:
    """Prepared images of one size as (B,3,H,W); made strip by strip, so that float32 needs room for one only."""
    x = torch.empty(len(images), 3, *images[0].shape, dtype=dtype, device=images[0].device)
    for row, image in zip(x, images, strict=True):
        for top, bottom in strips(image.shape[0], image.device):
            row[:, top:bottom] = image.rows(top, bottom)[0]
    return x
