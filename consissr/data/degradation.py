"""The two-stage Real-ESRGAN degradation: HQ batches -> LQ batches, on the batch's device.

    blur -> resize -> noise -> JPEG -> blur -> resize -> noise -> {resize and low-pass, JPEG, in either order}

(Wang et al., "Real-ESRGAN", 2021.) `degrade` is what training uses: every image has its own seed and its own draws,
so its result does not depend on the batch around it. `as_released` holds the batch-shared form.
"""

import functools
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from consissr.data.draws import Draws, SeededDraws
from consissr.data.jpeg import jpeg
from consissr.data.kernels import FAMILIES, SIZES, gaussian_like, low_pass
from consissr.data.noise import gaussian_noise, poisson_noise
from consissr.data.settings import MODES, DegradationConfig, StageConfig, preset
from consissr.errors import UserError
from consissr.images.device import to_device

__all__ = ["DegradationConfig", "StageConfig", "degrade", "preset"]

LARGEST = max(SIZES)


@torch.no_grad()
def degrade(hq: torch.Tensor, config: DegradationConfig, seeds: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Degrade a batch, each image by its own seed.

    hq: [B,3,H,W] in [-1,1], H and W multiples of `config.scale`; seeds: B integers >= 0.
    Returns (lq [B,3,H/scale,W/scale], lq enlarged to [B,3,H,W]) in [-1,1], on hq's device, rounded to 8-bit steps.
    An image's result depends on its pixels and its seed only. Raises UserError for sizes that cannot be.
    """
    check_size(hq.shape[-2:], config)
    pairs, sources = [], [SeededDraws(int(seed)) for seed in seeds]
    kernels = sent([draw_kernels(config, draws) for draws in sources], hq.device)
    for image, draws, own in zip(((hq.float() + 1) / 2).split(1), sources, kernels, strict=True):
        lq = quantise(run_stages(image, config, own, draws))
        pairs.append((lq, quantise(enlarge(lq, hq.shape[-2:], config, draws))))
    lq, enlarged = (torch.cat(part) * 2 - 1 for part in zip(*pairs, strict=True))
    return lq, enlarged


def sent(kernels: list[list[torch.Tensor]], device: torch.device) -> list[list[torch.Tensor]]:
    """The kernels [k,k] of every image on `device`, in one copy."""
    sizes = [[kernel.shape[-1] for kernel in own] for own in kernels]
    flat = to_device(torch.cat([kernel.flatten() for own in kernels for kernel in own]), device)
    parts = iter(flat.split([k * k for own in sizes for k in own]))
    return [[next(parts).view(k, k) for k in own] for own in sizes]


def check_size(size: tuple[int, int], config: DegradationConfig) -> None:
    """Raise UserError unless crops (H, W) divide by the scale and stay larger than half a blur kernel throughout."""
    h, w = size
    if h % config.scale or w % config.scale:
        raise UserError(f"crops of {w}x{h} pixels do not divide by the scale {config.scale}: choose a multiple of it")
    smallest = int(min(h, w) * min(1 / config.scale, config.first.resize[0]))
    if smallest <= LARGEST // 2:
        raise UserError(
            f"crops of {w}x{h} pixels can shrink to {smallest}, but blurring needs over {LARGEST // 2}: enlarge them"
        )


def draw_kernels(config: DegradationConfig, draws: Draws) -> list[torch.Tensor]:
    """The blur kernels of one image, in the first, in the second stage, and last (one pixel: no filter): [k,k] each."""
    kernels = [draw_kernel(config.first, draws), draw_kernel(config.second, draws), torch.ones(1, 1)]
    if draws.uniform() < config.final_sinc_prob:
        size = draws.pick(SIZES)
        kernels[2] = low_pass(size, draws.uniform(math.pi / 3, math.pi))
    return kernels


def draw_kernel(stage: StageConfig, draws: Draws) -> torch.Tensor:
    """A stage's blur kernel, [k,k] float32 with k in `kernels.SIZES`."""
    size = draws.pick(SIZES)
    if draws.uniform() < stage.sinc_prob:
        return low_pass(size, draws.uniform(math.pi / 3 if size < 13 else math.pi / 5, math.pi))
    family = draws.pick(FAMILIES, stage.family_weights)
    sigma_x = sigma_y = draws.uniform(*stage.sigma)
    angle, beta = 0.0, 1.0
    if family.endswith("aniso"):
        sigma_y = draws.uniform(*stage.sigma)
        angle = draws.uniform(-math.pi, math.pi)
    if family.startswith(("generalized", "plateau")):
        low, high = stage.betap if family.startswith("plateau") else stage.betag
        beta = draws.uniform(low, 1) if draws.uniform() < 0.5 else draws.uniform(1, high)
    return gaussian_like(family, size, sigma_x, sigma_y, angle, beta)


def run_stages(hq: torch.Tensor, config: DegradationConfig, kernels: list[torch.Tensor], draws: Draws) -> torch.Tensor:
    """Both stages on `hq` [B,3,H,W] in [0,1] with one set of structural draws; [B,3,H/scale,W/scale], not rounded.

    kernels: first, second, last, [k,k] for the whole batch or [B,k,k]. The draws' order is the releases'.
    """
    h, w = hq.shape[-2:]
    low = (h // config.scale, w // config.scale)
    x = blur(hq, kernels[0])
    factor, mode = draw_resize(config.first, draws)
    x = x if factor == 1 else F.interpolate(x, scale_factor=factor, mode=mode)
    x = add_noise(x, config.first, draws)
    x = compress(x, config.first, draws)

    if draws.uniform() < config.second_blur_prob:
        x = blur(x, kernels[1])
    factor, mode = draw_resize(config.second, draws)
    x = resize(x, (int(h / config.scale * factor), int(w / config.scale * factor)), mode)
    x = add_noise(x, config.second, draws)
    if draws.uniform() < 0.5:
        x = blur(resize(x, low, draws.pick(MODES)), kernels[2])
        return compress(x, config.second, draws)
    x = compress(x, config.second, draws)
    return blur(resize(x, low, draws.pick(MODES)), kernels[2])


def enlarge(lq: torch.Tensor, size: tuple[int, int], config: DegradationConfig, draws: Draws) -> torch.Tensor:
    """`lq` brought to `size` (H, W) by one of the configured filters."""
    mode = config.enlarge[0] if len(config.enlarge) == 1 else draws.pick(config.enlarge)
    return resize(lq, size, mode)


def resize(x: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """`x` at `size` (H, W) by one of `MODES`, not antialiased; to the same size all of them change nothing."""
    return x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x, size=tuple(size), mode=mode)


def blur(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Correlate the channels of `x` [B,C,H,W] with `kernel` [k,k] or [B,k,k] (k odd), reflecting at the borders.

    By FFT, whose time does not depend on k.
    """
    k = kernel.shape[-1]
    if k == 1:
        return x * kernel.to(x)
    h, w = x.shape[-2:]
    x = F.pad(x, (k // 2,) * 4, mode="reflect")
    rows, columns = fast_length(h + k - 1), fast_length(w + k - 1)
    kernel = kernel.to(x).view(-1, 1, k, k)
    response = torch.fft.fft(torch.fft.rfft(kernel, n=columns), n=rows, dim=-2).conj()
    return torch.fft.irfft2(torch.fft.rfft2(x, s=(rows, columns)) * response, s=(rows, columns))[..., :h, :w]


@functools.cache
def fast_length(n: int) -> int:
    """The smallest multiple of 8 from n on that has no prime factor above 7: lengths that FFTs handle fast."""
    n = -(-n // 8) * 8
    while True:
        rest = n
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 8


def draw_resize(stage: StageConfig, draws: Draws) -> tuple[float, str]:
    """(factor, filter) of a stage's resize."""
    kind = draws.pick(("up", "down", "keep"), stage.resize_weights)
    factor = 1.0
    if kind == "up":
        factor = draws.uniform(1, stage.resize[1])
    elif kind == "down":
        factor = draws.uniform(stage.resize[0], 1)
    return factor, draws.pick(MODES)


def add_noise(x: torch.Tensor, stage: StageConfig, draws: Draws) -> torch.Tensor:
    """Gaussian or Poisson noise of drawn strength, coloured or gray, on `x` [B,3,H,W] in about [0,1]; clamped to it."""
    gaussian = draws.uniform() < stage.gaussian_prob
    strength = draws.strengths(*(stage.gaussian if gaussian else stage.poisson), len(x))
    gray = draws.strengths(0, 1, len(x)) < stage.gray_prob
    noise_of = gaussian_noise if gaussian else poisson_noise
    noise = noise_of(x, draws, gray=True) if gray.any() else None
    if draws.always_coloured or not gray.all():
        coloured = noise_of(x, draws, gray=False)
        if noise is None or not gray.all():
            noise = coloured if noise is None else torch.where(per_image(gray, x), noise, coloured)
    return (x + noise * per_image(strength, x)).clamp_(0, 1)


def per_image(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One number per image of `x` [B,C,H,W], shaped to go with it; a single one may stay on the CPU."""
    return values[0] if len(values) == 1 else to_device(values, x.device).view(-1, 1, 1, 1)


def compress(x: torch.Tensor, stage: StageConfig, draws: Draws) -> torch.Tensor:
    """JPEG at a drawn quality per image."""
    return jpeg(x.clamp(0, 1), draws.strengths(*stage.jpeg, len(x)))


def quantise(x: torch.Tensor) -> torch.Tensor:
    """`x` rounded to the 8-bit steps of [0,1]."""
    return (x * 255).round_().clamp_(0, 255) / 255
