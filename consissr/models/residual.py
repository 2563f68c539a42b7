"""A denoiser whose network predicts what is missing in z_lq: of the bundled models, in neither paper.

A small network copies z_lq badly; this one need not copy it at all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from consissr.errors import UserError
from consissr.models.denoiser import Denoiser


class ResidualDenoiser(Denoiser):
    """Reads the UNet's output as v of (z_hq - z_lq) / residual, where `residual` is that difference's deviation."""

    def __init__(self, *networks: Any, residual: float) -> None:
        super().__init__(*networks)
        if self.prediction_type != "v_prediction":
            raise UserError(f"model.residual is {residual}, which needs a base that predicts v: use 0 with this one")
        self.residual = residual

    def to_eps(self, out: Tensor, z_t: Tensor, t: Tensor, z_lq: Tensor) -> Tensor:
        """The UNet's output (B, C, h, w) for `z_t` at `t` (B,), as predicted noise.

        u_t = z_t - sqrt(alpha_bar_t) z_lq is the noised residual, `size` its standard deviation, and `out` the v of
        u_t / size: where that is 0, the estimate of z_hq is z_lq plus the share of u_t that is signal.
        """
        signal, noise = self.coefficients(t)
        u_t = z_t - signal * z_lq.float()
        size = ((self.residual * signal) ** 2 + noise**2).sqrt()
        return (noise * u_t + self.residual * signal * size * out) / size**2
