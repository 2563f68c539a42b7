"""CCSR's training losses: NUTS (stage 1) and DeFT (stage 2), as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from consissr.diffusion.schedule import Schedule
from consissr.errors import UserError

LOSSES = ("l_diff", "l_T", "l_tmax")


def nuts_losses(
    denoise: Callable[[Tensor, Tensor], Tensor],
    z_hq: Tensor,
    z_lq: Tensor,
    t: Tensor,
    noises: Sequence[Tensor],
    schedule: Schedule,
    t_max: int,
    start: str = "lq",
    losses: Sequence[str] = LOSSES,
    weights: Tensor | None = None,
    ordinary: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The three losses of one batch (Eq. 2 and 3, CCSR): `l_diff`, `l_T`, `l_tmax`, each a mean over all elements.

    denoise(z_t, t) -> eps; z_hq, z_lq (B,C,h,w) latents; t (B,) timesteps of the ordinary loss; noises three tensors
    like z_hq (for t, for the noisiest timestep, for t_max); t_max the timestep that x0_from_T is re-noised to.
    start: latent noised to the last timestep, `lq` (what sampling starts from) or `hq` (CCSR's release in stage 1).
    losses: those wanted; the network is evaluated for no others. weights: (C,) of the latent's channels, None for equal
    ones (the paper). ordinary: z_t and the noise to predict of l_diff, where they are not z_hq's at t under noises[0]
    (ConsisSR's latent augmentation). The gradient flows through x0_from_T into l_tmax. Also returned where computed,
    for pictures and tests: `x0_T` and `x0_tmax`.
    """
    if start not in ("lq", "hq"):
        raise UserError(f"NUTS training starts from 'lq' or 'hq', not {start!r}")

    def mse(value: Tensor, target: Tensor) -> Tensor:
        if weights is None:
            return F.mse_loss(value, target)
        return ((value - target).square() * weights.to(value).view(1, -1, 1, 1)).mean()

    last = torch.full_like(t, len(schedule) - 1)
    at_max = torch.full_like(t, t_max)

    found: dict[str, Tensor] = {}
    if "l_diff" in losses:
        z_t, eps = ordinary or (schedule.add_noise(z_hq, noises[0], t), noises[0])
        found["l_diff"] = mse(denoise(z_t, t), eps)
    if "l_T" in losses or "l_tmax" in losses:
        z_T = schedule.add_noise(z_lq if start == "lq" else z_hq, noises[1], last)
        x0_T = schedule.x0_from_eps(z_T, denoise(z_T, last), last)
        found |= {"l_T": mse(x0_T, z_hq), "x0_T": x0_T.detach()}
    if "l_tmax" in losses:
        z_tmax = schedule.add_noise(x0_T, noises[2], at_max)
        x0_tmax = schedule.x0_from_eps(z_tmax, denoise(z_tmax, at_max), at_max)
        found |= {"l_tmax": mse(x0_tmax, z_hq), "x0_tmax": x0_tmax.detach()}
    return found


def generator_adversarial(logits_fake: Tensor) -> Tensor:
    """-mean(D(fake)) of logits of any shape: what the decoder minimises against a hinge discriminator."""
    return -logits_fake.mean()


def discriminator_hinge(logits_real: Tensor, logits_fake: Tensor, weight: float = 0.5) -> dict[str, Tensor]:
    """Hinge loss of the discriminator over logits of any shape: `loss` = weight (`loss_real` + `loss_fake`)."""
    real, fake = F.relu(1 - logits_real).mean(), F.relu(1 + logits_fake).mean()
    return {"loss": weight * (real + fake), "loss_real": real, "loss_fake": fake}


def adversarial_weight(step: int, weight: float = 0.05, begin: int = 100) -> float:
    """The weight of the adversarial term at an optimiser step: 0 up to and including `begin`, then `weight`."""
    return weight if step > begin else 0.0


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, limit: float = 1e4) -> Tensor:
    """||grad reconstruction|| / ||grad adversarial|| at the decoder's last layer, detached (CCSR v1, VQGAN's rule)."""
    (g_rec,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (g_adv,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (g_rec.norm() / (g_adv.norm() + 1e-4)).clamp(0, limit).detach()
