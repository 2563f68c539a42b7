"""CCSR's degradation under recorded seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from fixtures import Check, Fixture, Lack, Stored, lacking
from torch import Tensor

from consissr.data.as_released import degrade_as_released
from consissr.data.degradation import draw_kernels, preset
from consissr.data.draws import ReleasedDraws
from consissr.data.settings import DegradationConfig

FILE = "degradation_seeded.npz"

IMAGE = 2e-3
"""Relative L2 of degraded images: a JPEG coefficient halfway between two steps may be rounded either way."""


def cases(fixture: Fixture) -> Iterator[Check | Lack]:
    """Kernels, flips and degraded images of every recorded seed."""
    if "ccsr" not in fixture.kinds:
        return
    recorded = fixture.arrays(FILE)
    recorded.update({key: torch.from_numpy(value) for key, value in recorded.items()})
    hq = recorded["gt_uint8"].permute(2, 0, 1)[None].float() / 127.5 - 1
    config = preset("ccsr")
    for seed in sorted({int(m[1]) for key in recorded if (m := re.match(r"s(\d+)_", key))}):
        yield from seeded(recorded, seed, hq, config)


@lacking
def seeded(recorded: Stored, seed: int, hq: Tensor, config: DegradationConfig) -> Iterator[Check | Lack]:
    """What one seed gave."""
    kernels = draw_kernels(config, ReleasedDraws(seed))
    for name, kernel in zip(("kernel1", "kernel2", "sinc"), kernels, strict=True):
        if f"s{seed}_{name}" not in recorded:
            yield Lack(f"{FILE}:s{seed}_{name}")
            continue
        want = recorded[f"s{seed}_{name}"]
        padded = F.pad(kernel, ((len(want) - len(kernel)) // 2,) * 4)
        yield Check(f"{FILE}:s{seed}_{name}", padded, want, 1e-6, "absolute")
    draws = ReleasedDraws(seed)
    flipped = draws.flip()
    yield Check(f"{FILE}:s{seed}_gt_flipped", flipped, recorded[f"s{seed}_gt_flipped"], kind="exact")
    _, enlarged = degrade_as_released(hq.flip(-1) if flipped else hq, config, draws)
    image = (enlarged[0].permute(1, 2, 0) + 1) * 127.5
    yield Check(f"{FILE}:s{seed}_lq_uint8", image, recorded[f"s{seed}_lq_uint8"], IMAGE)
