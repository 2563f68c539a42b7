"""The papers' equations in plain tensors, and a record of what networks are given: what stages are compared with.

Nothing here comes from the code under test but `Batch`, whose draws are recorded, the text encoder's loader, and the
networks themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from consissr.training.stage import Batch
from consissr.weights.base import load_text

T = 1000
BETA = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2
ALPHA_BAR = torch.cumprod(1 - BETA, 0)
"""Stable Diffusion's schedule (T,)."""
SCALE = 0.18215
"""Its latents' factor."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that CLIP was trained on."""

# --- the equations, float64 ---


def level(t: Tensor | int) -> Tensor:
    """alpha_bar at t, for broadcasting over latents; 1 at t = -1."""
    return torch.cat([ALPHA_BAR, ALPHA_BAR.new_ones(1)])[torch.as_tensor(t)].reshape(-1, 1, 1, 1)


def noised(z: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
    """z_t = sqrt(a) z_0 + sqrt(1 - a) eps  (Eq. 1 of both papers)."""
    return level(t).sqrt() * z + (1 - level(t)).sqrt() * eps


def clean(z_t: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
    """x_0 = (z_t - sqrt(1 - a) eps) / sqrt(a)."""
    return (z_t - (1 - level(t)).sqrt() * eps) / level(t).sqrt()


def ddpm(z_t: Tensor, x0: Tensor, t: int, t_next: int, noise: Tensor) -> Tensor:
    """A draw from q(z_next | z_t, x_0)  (Eq. 6 and 7, DDPM)."""
    a, a_next = level(t), level(t_next)
    beta = 1 - a / a_next
    mean = a_next.sqrt() * beta / (1 - a) * x0 + (a / a_next).sqrt() * (1 - a_next) / (1 - a) * z_t
    return mean + (beta * (1 - a_next) / (1 - a)).sqrt() * noise


def mse(a: Tensor, b: Tensor) -> Tensor:
    """A mean over all elements."""
    return ((a - b) ** 2).mean()


# --- images and draws ---


@dataclass
class Recorded(Batch):
    """A batch that notes what is drawn from it; `normal`, `uniform` and `integer` are given out before it draws."""

    normal: list[Tensor] = field(default_factory=list)
    uniform: list[Tensor] = field(default_factory=list)
    integer: list[Tensor] = field(default_factory=list)
    normals: list[Tensor] = field(default_factory=list)
    highs: list[int] = field(default_factory=list)
    """The upper limits of the integers that were asked for."""

    def randn(self, *shape: int) -> Tensor:
        self.normals.append(self.normal.pop(0) if self.normal else super().randn(*shape))
        return self.normals[-1]

    def rand(self) -> Tensor:
        return self.uniform.pop(0) if self.uniform else super().rand()

    def randint(self, high: int) -> Tensor:
        self.highs.append(high)
        return self.integer.pop(0) if self.integer else super().randint(high)


def pictures(count: int = 2, side: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B, 3, side, side) smooth pictures with some grain, no two alike, and blurred, darker ones of the same."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 6, 6, generator=generator) * 2 - 1
    smooth = F.interpolate(small, size=(side, side), mode="bicubic", align_corners=False)
    hq = (smooth + 0.2 * torch.randn(smooth.shape, generator=generator)).clamp(-1, 1)
    return hq, (0.7 * F.avg_pool2d(hq, 7, 1, 3) - 0.2).clamp(-1, 1)


def recorded(count: int = 2, side: int = 64, seed: int = 0, **draws: Sequence[Tensor]) -> Recorded:
    """A batch of `pictures`; draws: lists of tensors (B,) to give out, `uniform` and `integer`."""
    hq, lq = pictures(count, side, seed)
    generators = [torch.Generator().manual_seed(100 + i) for i in range(count)]
    given = {name: list(values) for name, values in draws.items()}
    return Recorded(hq=hq, lq=lq, names=[str(i) for i in range(count)], generators=generators, **given)


# --- networks ---


def latent(base: Path, x: Tensor, noise: Tensor | None = None) -> Tensor:
    """The scaled latent of the base's autoencoder: the mode, or the sample that `noise` makes."""
    posterior = AutoencoderKL.from_pretrained(base / "vae").encode(x).latent_dist
    return SCALE * (posterior.mean if noise is None else posterior.mean + posterior.std * noise).detach()


@torch.no_grad()
def with_hint_encoder(stage: Any, base: Path, folder: Path) -> AutoencoderKL:
    """The stage's result in `folder`, an autoencoder for the hint alone beside it, as converted releases have."""
    stage.export(folder)
    vae = AutoencoderKL.from_pretrained(base / "vae")
    vae.encoder.conv_in.bias.add_(1.0)
    vae.save_pretrained(folder / "hint_vae")
    return vae


@torch.no_grad()
def decoded(base: Path, z: Tensor) -> Tensor:
    """The base's picture of a scaled latent."""
    return AutoencoderKL.from_pretrained(base / "vae").decode((z / SCALE).float()).sample


def text(base: Path, count: int) -> Tensor:
    """Embeddings of the empty prompt."""
    return load_text(base).encode([""]).expand(count, -1, -1)


def seen_by_clip(x: Tensor) -> Tensor:
    """What a CLIP tower of 32 pixels is given of images in [-1, 1]."""
    small = F.interpolate((x + 1) / 2, size=(32, 32), mode="bicubic", align_corners=False)
    return (small - torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)) / torch.tensor(CLIP_STD).view(1, 3, 1, 1)


def wake(stage: Any, seed: int = 5) -> None:
    """Random values where trained layers start at zero, so that what comes before them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for phase in stage.phases for p in phase.parameters.values()):
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def members(networks: nn.Module, kind: type) -> list[nn.Module]:
    """The modules of a class."""
    return [module for module in networks.modules() if isinstance(module, kind)]


def only(networks: nn.Module, kind: type) -> nn.Module:
    """The one module of a class."""
    (found,) = members(networks, kind)
    return found


@contextmanager
def watched(**modules: nn.Module) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Every call of `modules` while the context is open: arguments by parameter name, and what it `returned`."""
    calls: dict[str, list[dict[str, Any]]] = {name: [] for name in modules}

    def watch(name: str, module: nn.Module) -> Callable[[], None]:
        signature = inspect.signature(type(module).forward)

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], returned: Any) -> None:
            calls[name].append(dict(signature.bind(module, *args, **kwargs).arguments) | {"returned": returned})

        return module.register_forward_hook(note, with_kwargs=True).remove

    stops = [watch(name, module) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for stop in stops:
            stop()


def start(phase: Any, networks: nn.Module) -> None:
    """Gradients for what the phase trains and nothing else, as the loop sets them."""
    trained = {id(p) for p in phase.parameters.values()}
    for parameter in networks.parameters():
        parameter.grad = None
        parameter.requires_grad_(id(parameter) in trained)


def learnt(stage: Any, phase: Any, batch: Batch, step: int = 0) -> dict[str, Tensor]:
    """The phase's losses on a batch as the loop has them computed; gradients are in its parameters."""
    with torch.no_grad():
        stage.prepare(batch)
    start(phase, stage.networks)
    losses = phase.loss(batch, step)
    losses["loss"].backward()
    return losses


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Equal shapes, and a relative L2 error within the tolerance."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, (got.shape, want.shape)
    error = ((got - want).norm() / want.norm().clamp(min=1e-12)).item()
    assert error <= tolerance, f"relative error {error:.1e}"


def same_gradients(parameters: dict[str, nn.Parameter], loss: Tensor, tolerance: float = 1e-3) -> None:
    """The parameters' `grad` is the gradient of `loss`, tensor by tensor; some of it is not zero."""
    wanted = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    total = torch.stack([g.norm() for g in wanted if g is not None]).norm()
    assert total > 0
    for (name, parameter), want in zip(parameters.items(), wanted, strict=True):
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        want = torch.zeros_like(parameter) if want is None else want
        error = (got - want).norm().item()
        assert error <= tolerance * want.norm() + 1e-6 * total, f"{name}: {error:.1e} of {want.norm():.1e}"
