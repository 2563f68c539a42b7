"""CCSR's degradation under recorded seeds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from fixtures import Check, Fixture, Lack

from consissr.data.as_released import degrade_as_released
from consissr.data.degradation import draw_kernels, preset
from consissr.data.draws import ReleasedDraws

FILE = "degradation_seeded.npz"

IMAGE = 2e-3
"""Relative L2 of degraded images: a JPEG coefficient halfway between two steps may be rounded either way."""


def cases(fixture: Fixture) -> Iterator[Check | Lack]:
    """Kernels, flips and degraded images of every recorded seed."""
    if fixture.kind != "ccsr":
        return
    if not fixture.has(FILE):
        yield Lack(FILE)
        return
    with np.load(fixture.folder / FILE) as file:
        recorded = {key: torch.from_numpy(file[key]) for key in file}
    hq = recorded["gt_uint8"].permute(2, 0, 1)[None].float() / 127.5 - 1
    config = preset("ccsr")
    for seed in sorted(int(key[1 : key.index("_")]) for key in recorded if key.endswith("_lq_uint8")):
        kernels = draw_kernels(config, ReleasedDraws(seed))
        for name, kernel in zip(("kernel1", "kernel2", "sinc"), kernels, strict=True):
            want = recorded[f"s{seed}_{name}"]
            padded = F.pad(kernel, ((len(want) - len(kernel)) // 2,) * 4)
            yield Check(f"{FILE}:s{seed}_{name}", padded, want, 1e-6, "absolute")
        draws = ReleasedDraws(seed)
        flipped = draws.flip()
        yield Check(f"{FILE}:s{seed}_gt_flipped", flipped, recorded[f"s{seed}_gt_flipped"], kind="exact")
        _, enlarged = degrade_as_released(hq.flip(-1) if flipped else hq, config, draws)
        image = (enlarged[0].permute(1, 2, 0) + 1) * 127.5
        yield Check(f"{FILE}:s{seed}_lq_uint8", image, recorded[f"s{seed}_lq_uint8"], IMAGE)
