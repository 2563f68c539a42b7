"""p(t) of time-aware latent augmentation (Sec. 3.4, ConsisSR): how often a timestep is trained from z_lq.

Algorithm 1 itself, which draws by it, is `training/tala.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def probability(t: Tensor, form: str = "power", gamma: float = 10.0, T: int = 1000) -> Tensor:
    """p(t), the chance that timestep t (0..T-1) starts from the low-quality latent -> float64, shape of t.

    `power`        ((t + 1) / T) ** gamma, the paper's (it counts 1..T): 1 at the noisiest step
    `as_released`  (t / T) ** gamma, at most 0.990 for gamma 10
    `linear`       max(1 - 2.5 (1 - (t + 1) / T), 0): 1 at the noisiest step, 0 from 0.6 T down. The paper prints
                   max(1 - 2.5 t / T, 0), which reverses time: Sec. 3.4 wants p(T) = 1
    `off`          0: ordinary DDPM training
    """
    t = t.double()
    if form == "off":
        return torch.zeros_like(t)
    if form == "linear":
        return (1 - 2.5 * (1 - (t + 1) / T)).clamp(min=0)
    if form == "as_released":
        return (t / T) ** gamma
    if form != "power":
        raise ValueError(f"p(t) has no form {form!r}")
    return ((t + 1) / T) ** gamma
