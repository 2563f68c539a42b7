"""Pixels between files and GPUs: up and down as whole numbers, through pinned memory, without waiting for each other.

A GPU resizes, colours and rounds the pixels of the images it restores itself, so that only files' bytes are worked on
beside it. Results are those of the CPU up to rounding, within one level of 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

KINDS = ("cuda",)
"""Kinds of devices that work on pixels themselves."""
PIXEL_BYTES = 100
"""What they need for each pixel of a result: some maps of three float32 values."""


def works_on_pixels(device: torch.device | str) -> bool:
    """Whether `device` works on pixels itself."""
    return torch.device(device).type in KINDS


def sent(samples: np.ndarray, device: torch.device | str) -> Tensor:
    """Whole numbers (uint8 or uint16) as float32 on `device`."""
    deep = samples.dtype == np.uint16  # with which torch computes nothing
    values = to_device(torch.from_numpy(samples.view(np.int16) if deep else samples), device)
    return values.to(torch.int32).bitwise_and_(0xFFFF).float() if deep else values.float()


def fetched(values: Tensor) -> tuple[np.ndarray, Callable[[], None]]:
    """Whole numbers 0..255 or 0..65535 (an integer tensor) on their way to the CPU, and what waits for their arrival.

    The array is uint8 for a tensor of that type, else uint16; it holds nothing of use before.
    """
    deep = values.dtype != torch.uint8
    values = values.to(torch.int16) if deep else values  # the same 16 bits
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=torch.cuda.is_available())
    there.copy_(values, non_blocking=True)
    array = there.numpy().view(np.uint16) if deep else there.numpy()
    if values.device.type != "cuda":
        return array, lambda: None
    return array, torch.cuda.current_stream(values.device).record_event().synchronize


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on `device`; on its way to a GPU the host does not wait for what that was given before."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda" and torch.cuda.is_available():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
