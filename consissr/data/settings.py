"""Settings of the two-stage degradation: the releases' values under two names, and a heavier one of ours."""

from dataclasses import dataclass, replace

from consissr.config.loading import check_word

MODES = ("area", "bilinear", "bicubic")
Range = tuple[float, float]
"""Least and largest value, drawn uniformly unless said otherwise."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One of the two stages. Defaults: CCSR's first."""

    sinc_prob: float = 0.1
    """Probability that the blur is a circular low-pass filter."""
    family_weights: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    """Weights of the other blur families, in the order of `kernels.FAMILIES`."""
    sigma: Range = (0.2, 1.5)
    """Standard deviations of a kernel along its two axes, pixels."""
    betag: Range = (0.5, 2.0)
    """Shape of generalized Gaussians: half of the draws lie below 1, half above."""
    betap: Range = (1.0, 1.5)
    """Shape of plateau kernels, drawn likewise."""
    resize_weights: tuple[float, float, float] = (0.2, 0.7, 0.1)
    """Weights of enlarging, shrinking and keeping the size."""
    resize: Range = (0.3, 1.5)
    """Resize factor; relative to the LQ size in the second stage."""
    gaussian_prob: float = 0.5
    """Probability of Gaussian noise; Poisson noise otherwise."""
    gaussian: Range = (1.0, 15.0)
    """Standard deviation of Gaussian noise, 8-bit steps."""
    poisson: Range = (0.05, 2.0)
    """Factor on Poisson noise."""
    gray_prob: float = 0.4
    """Probability that all channels share one noise field."""
    jpeg: Range = (60.0, 95.0)
    """JPEG quality, below 100."""


@dataclass(frozen=True, kw_only=True)
class DegradationConfig:
    """The whole degradation."""

    scale: int = 4
    """HQ side / LQ side."""
    first: StageConfig
    """First stage; it always blurs."""
    second: StageConfig
    """Second stage."""
    second_blur_prob: float = 0.5
    """Probability that the second stage blurs."""
    final_sinc_prob: float = 0.8
    """Probability of the circular low-pass filter after the last resize."""
    enlarge: tuple[str, ...] = MODES
    """Filters from which the one that brings the LQ image back to HQ size is picked."""


CCSR = DegradationConfig(
    first=StageConfig(),
    second=StageConfig(
        sigma=(0.2, 1.0), resize_weights=(0.3, 0.4, 0.3), resize=(0.6, 1.2),
        gaussian=(1.0, 12.0), poisson=(0.05, 1.0), jpeg=(60.0, 100.0),
    ),
)  # fmt: skip
"""CCSR's release: milder than Real-ESRGAN's."""

CONSISSR = DegradationConfig(
    first=StageConfig(
        sigma=(0.2, 3.0), betag=(0.5, 4.0), betap=(1.0, 2.0), resize=(0.15, 1.5),
        gaussian=(1.0, 30.0), poisson=(0.05, 3.0), jpeg=(30.0, 95.0),
    ),
    second=StageConfig(
        sigma=(0.2, 1.5), betag=(0.5, 4.0), betap=(1.0, 2.0), resize_weights=(0.3, 0.4, 0.3), resize=(0.3, 1.2),
        gaussian=(1.0, 25.0), poisson=(0.05, 2.5), jpeg=(30.0, 95.0),
    ),
    second_blur_prob=0.8,
    enlarge=("bicubic",),
)  # fmt: skip
"""ConsisSR's release: Real-ESRGAN's own strengths."""

HEAVY = replace(CONSISSR, second=replace(CONSISSR.second, gaussian_prob=1.0, gaussian=(25.0, 50.0), jpeg=(10.0, 30.0)))
"""Ours, of no paper's tables: ConsisSR's with so much noise and compression in the second stage that an image itself
says little about its colours and textures. Here a prompt could add something."""

PRESETS = {"ccsr": CCSR, "consissr": CONSISSR, "heavy": HEAVY}


def preset(name: str) -> DegradationConfig:
    """The named settings. Raises UserError for an unknown name."""
    check_word(name, tuple(PRESETS), "degradation")
    return PRESETS[name]
