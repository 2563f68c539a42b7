"""Time-Aware Latent Augmentation (Algorithm 1, ConsisSR).

Late in sampling the network sees latents of its own making, which are closer to the low-quality image than training on
noised high-quality latents suggests. TALA therefore starts some training inputs from the low-quality latent, the more
often the noisier the timestep, and keeps asking for the noise that leads to the high-quality one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consissr.diffusion.schedule import Schedule
from consissr.errors import UserError

FORMS = ("power", "as_released", "linear", "off")


def probability(t: Tensor, form: str = "power", gamma: float = 10.0, T: int = 1000) -> Tensor:
    """p(t), the chance that timestep t (0..T-1) starts from the low-quality latent -> float64, shape of t.

    `power`        ((t + 1) / T) ** gamma, the paper's (it counts 1..T): 1 at the noisiest step
    `as_released`  (t / T) ** gamma, at most 0.990
    `linear`       max(1 - 2.5 (1 - (t + 1) / T), 0): 1 at the noisiest step, 0 from 0.6 T down
    `off`          0: ordinary DDPM training
    """
    if form not in FORMS:
        raise UserError(f"TALA form {form!r} is unknown; choose one of {', '.join(FORMS)}")
    t = t.double()
    if form == "off":
        return torch.zeros_like(t)
    if form == "linear":
        return (1 - 2.5 * (1 - (t + 1) / T)).clamp(min=0)
    return ((t + (form == "power")) / T) ** gamma


def tala_inputs(
    z_hq: Tensor, z_lq: Tensor, eps: Tensor, t: Tensor, r: Tensor, p: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor, Tensor]:
    """One batch of training inputs: z_t (B,C,h,w), target noise (B,C,h,w), mask (B,) of augmented images.

    z_hq, z_lq, eps are (B,C,h,w); t (B,) integers; p = probability(t); r uniform in [0, 1), (B,) for a draw per image
    or (1,) for one draw shared by the batch (as released). The target of an augmented image is the noise that leads
    from z_t to z_hq  (Eq. 4, ConsisSR).
    """
    mask = r.to(p) < p
    chosen = mask.to(z_hq.device).reshape(-1, 1, 1, 1)
    z_t = schedule.add_noise(torch.where(chosen, z_lq, z_hq), eps, t)
    return z_t, torch.where(chosen, schedule.eps_from_x0(z_t, z_hq, t), eps), mask
