"""The one sampler: runs a plan. And the one source of noise: draws that depend on nothing but an image's key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from consissr.diffusion.plans import Step
from consissr.diffusion.schedule import Schedule
from consissr.images.device import to_device

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(z_t (B,C,h,w), t (B,) int64) -> predicted noise (B,C,h,w)."""

Draw = Callable[[str, Sequence[int]], Tensor]
"""(name, shape) -> standard normal noise, float32. Names: `posterior` (VAE sample of the low-quality image; CCSR v2
takes a second one, `posterior_positive`), `init` (the start), `tmax` (re-noising; later ones `tmax[i]`), `step[i]` (the
DDPM step at position i of the plan)."""


@torch.no_grad()
def sample(
    denoise: Denoise,
    plan: Sequence[Step],
    z: Tensor,
    schedule: Schedule,
    draw: Draw,
    first: Denoise | None = None,
    on_step: Callable[[int, Step, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Run `plan` from latent z (B,C,h,w), float32, as `start_latent` makes it -> x0 (B,C,h,w).

    `first`: another denoiser for the first evaluation (CCSR v2 takes its first step without guidance).
    `on_step(i, step, eps, x0)` is called after each evaluation.
    """
    for i, step in enumerate(plan):
        t = torch.full((len(z),), step.t, dtype=torch.int64, device=z.device)
        eps = (first if first and i == 0 else denoise)(z, t)
        x0 = schedule.x0_from_eps(z, eps, step.t)
        if on_step:
            on_step(i, step, eps, x0)
        del eps  # large images: what is not needed any more makes room
        if step.kind == "renoise":
            again = any(earlier.kind == "renoise" for earlier in plan[:i])
            noise = drawn(draw, f"tmax[{i}]" if again else "tmax", z)
            z = schedule.add_noise(x0, noise, step.t_next)
        elif step.kind == "step":
            mean, variance = schedule.posterior(z, x0, step.t, step.t_next)
            z = mean + variance.sqrt() * drawn(draw, f"step[{i}]", z)
    return x0


def start_latent(start: str, z_lq: Tensor, schedule: Schedule, draw: Draw) -> Tensor:
    """The first latent, like z_lq (B,C,h,w): `noise` itself, or z_lq noised to the last timestep (`lq`)."""
    noise = drawn(draw, "init", z_lq)
    return noise if start == "noise" else schedule.add_noise(z_lq, noise, len(schedule) - 1)


def drawn(draw: Draw, name: str, like: Tensor) -> Tensor:
    """Noise of the shape, device and type of `like`; the host does not wait for a GPU."""
    return to_device(draw(name, like.shape), like.device).to(like.dtype)


def seeded_draw(seed: int, keys: Iterable[str | int], repeat: int = 0) -> Draw:
    """Noise for a batch of images, on the CPU: image b's depends only on (seed, keys[b], repeat, name, shape).

    A key is the image's path below the input folder (str) or its index (int). Each tensor has a generator of its own,
    seeded with BLAKE2b of these values, so batch size, order, device and process count change nothing.
    """
    keys = list(keys)

    def draw(name: str, shape: Sequence[int]) -> Tensor:
        if shape[0] != len(keys):
            raise ValueError(f"noise for {shape[0]} images, but {len(keys)} keys")
        rows = [_noise(json.dumps([seed, key, repeat, name]), (1, *shape[1:])) for key in keys]
        return torch.cat(rows)

    return draw


def _noise(identity: str, shape: Sequence[int]) -> Tensor:
    digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(tuple(shape), generator=generator)
