"""The noise schedule: how much signal is left at timestep t, and the formulas that follow from it.

Notation: the papers' x_t is z_t here, but for estimates of the clean latent: x0 (CCSR's x0_from_T). `alpha_bar[t]` is
the share of signal power at timestep t, t counts 0..T-1 (in ConsisSR 1..T), `eps` is unit noise,
`z_t = sqrt(alpha_bar[t]) z_0 + sqrt(1 - alpha_bar[t]) eps`. Coefficients are computed in float64 and cast to the type
of the tensors they meet, as ConsisSR's release does. In formulas `a` is alpha_bar[t] (not the papers' alpha_t).
"""

from __future__ import annotations

import torch
from torch import Tensor

from consissr.config.sd21 import SD_BETAS

CLEAN = -1
"""The timestep after the last one: `alpha_bar[CLEAN]` is 1, nothing but signal."""


def alpha_bar(T: int = SD_BETAS[0], beta_start: float = SD_BETAS[1], beta_end: float = SD_BETAS[2]) -> Tensor:
    """Stable Diffusion's "scaled linear" schedule -> float64 [T]: cumulative products of 1 - beta."""
    beta = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, 0)


class Schedule:
    """Formulas of one schedule `alpha_bar` [T], strictly between 0 and 1 and falling.

    Timesteps are an int (the whole batch) or an integer tensor (B,); latents are (B, C, h, w). A timestep may be CLEAN
    where a formula makes sense there.
    """

    def __init__(self, alpha_bar: Tensor):
        a = alpha_bar.detach().double().cpu()
        if a.ndim != 1 or not ((a > 0) & (a < 1)).all() or (a.diff() >= 0).any():
            raise ValueError("alpha_bar must be a falling sequence strictly between 0 and 1")
        self.alpha_bar = a
        self._values = torch.cat([a, a.new_ones(1)])  # the last entry is what index CLEAN = -1 reads
        self._table = self._values

    def __len__(self) -> int:
        return len(self.alpha_bar)

    def _at(self, t: int | Tensor, device) -> Tensor:
        """alpha_bar at t, float64, shaped to broadcast over latents: () or (B, 1, 1, 1)."""
        if not isinstance(t, Tensor):
            if not CLEAN <= t < len(self):
                raise ValueError(f"timestep {t} is outside 0..{len(self) - 1}")
            return self._values[t]  # one number on the CPU goes with tensors of any device
        if self._table.device != t.device:
            self._table = self._table.to(t.device)
        return self._table[t].reshape(-1, 1, 1, 1).to(device)

    def add_noise(self, z0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """z_t = sqrt(a) z_0 + sqrt(1 - a) eps  (Eq. 1, ConsisSR and CCSR)."""
        a = self._at(t, z0.device)
        return (a.sqrt().to(z0.dtype) * z0).add_((1 - a).sqrt().to(z0.dtype) * eps)

    def x0_from_eps(self, z_t: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """x0 = (z_t - sqrt(1 - a) eps) / sqrt(a)  (Sec. III-B, CCSR). Not clipped."""
        a = self._at(t, z_t.device)
        return ((1 / a).sqrt().to(z_t.dtype) * z_t).sub_((1 / a - 1).sqrt().to(z_t.dtype) * eps)

    def eps_from_x0(self, z_t: Tensor, z0: Tensor, t: int | Tensor) -> Tensor:
        """eps = (z_t - sqrt(a) z_0) / sqrt(1 - a): the noise that leads from z_t to z_0  (Eq. 4, ConsisSR).

        Where z_t is z_lq under noise eps', it is eps' + sqrt(a) (z_lq - z_0) / sqrt(1 - a), as Eq. 4 goes on.
        """
        a = self._at(t, z_t.device)
        return (z_t - a.sqrt().to(z_t.dtype) * z0) / (1 - a).sqrt().to(z_t.dtype)

    def posterior(self, z_t: Tensor, z0: Tensor, t: int | Tensor, t_next: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of z at t_next < t given z_t and z_0 (DDPM, Ho et al.'s Eq. 6 and 7; broadcastable).

        With t_next = CLEAN the mean is z_0 and the variance 0.
        """
        a, a_next = self._at(t, z_t.device), self._at(t_next, z_t.device)
        beta = 1 - a / a_next
        of_z0 = (a_next.sqrt() * beta / (1 - a)).to(z_t.dtype)
        of_zt = ((a / a_next).sqrt() * (1 - a_next) / (1 - a)).to(z_t.dtype)
        return of_z0 * z0 + of_zt * z_t, (beta * (1 - a_next) / (1 - a)).to(z_t.dtype)
