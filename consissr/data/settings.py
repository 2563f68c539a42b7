"""Settings of the two-stage degradation, and the papers' values under two names."""

from dataclasses import dataclass, field

from consissr.config.loading import check_word

MODES = ("area", "bilinear", "bicubic")


def _list(*values):
    return field(default_factory=lambda: list(values))


@dataclass(kw_only=True)
class StageConfig:
    """One of the two stages. Ranges are [low, high], drawn uniformly unless said otherwise. Defaults: CCSR's first."""

    sinc_prob: float = 0.1
    """Probability that the blur is a circular low-pass filter."""
    family_weights: list[float] = _list(0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    """Weights of the other blur families, in the order of `kernels.FAMILIES`."""
    sigma: list[float] = _list(0.2, 1.5)
    """Standard deviations of a kernel along its two axes, pixels."""
    betag: list[float] = _list(0.5, 2.0)
    """Shape of generalized Gaussians: half of the draws lie below 1, half above."""
    betap: list[float] = _list(1.0, 1.5)
    """Shape of plateau kernels, drawn likewise."""
    resize_weights: list[float] = _list(0.2, 0.7, 0.1)
    """Weights of enlarging, shrinking and keeping the size."""
    resize: list[float] = _list(0.3, 1.5)
    """Smallest and largest resize factor; relative to the LQ size in the second stage."""
    gaussian_prob: float = 0.5
    """Probability of Gaussian noise; Poisson noise otherwise."""
    gaussian: list[float] = _list(1.0, 15.0)
    """Standard deviation of Gaussian noise, 8-bit steps."""
    poisson: list[float] = _list(0.05, 2.0)
    """Factor on Poisson noise."""
    gray_prob: float = 0.4
    """Probability that all channels share one noise field."""
    jpeg: list[float] = _list(60.0, 95.0)
    """JPEG quality, below 100."""


@dataclass(kw_only=True)
class DegradationConfig:
    """The whole degradation. `preset` returns the papers' settings."""

    scale: int = 4
    """HQ side / LQ side."""
    first: StageConfig = field(default_factory=StageConfig)
    """First stage; it always blurs."""
    second: StageConfig = field(default_factory=StageConfig)
    """Second stage."""
    second_blur_prob: float = 0.5
    """Probability that the second stage blurs."""
    final_sinc_prob: float = 0.8
    """Probability of the circular low-pass filter after the last resize."""
    enlarge: list[str] = _list("area", "bilinear", "bicubic")
    """Filters from which the one that brings the LQ image back to HQ size is picked."""


def ccsr_degradation() -> DegradationConfig:
    """CCSR's training settings, milder than Real-ESRGAN's."""
    second = StageConfig(
        sigma=[0.2, 1.0],
        resize_weights=[0.3, 0.4, 0.3],
        resize=[0.6, 1.2],
        gaussian=[1.0, 12.0],
        poisson=[0.05, 1.0],
        jpeg=[60.0, 100.0],
    )
    return DegradationConfig(second=second)


def consissr_degradation() -> DegradationConfig:
    """ConsisSR's training settings: Real-ESRGAN's own."""
    first = StageConfig(
        sigma=[0.2, 3.0],
        betag=[0.5, 4.0],
        betap=[1.0, 2.0],
        resize=[0.15, 1.5],
        gaussian=[1.0, 30.0],
        poisson=[0.05, 3.0],
        jpeg=[30.0, 95.0],
    )
    second = StageConfig(
        sigma=[0.2, 1.5],
        betag=[0.5, 4.0],
        betap=[1.0, 2.0],
        resize_weights=[0.3, 0.4, 0.3],
        resize=[0.3, 1.2],
        gaussian=[1.0, 25.0],
        poisson=[0.05, 2.5],
        jpeg=[30.0, 95.0],
    )
    return DegradationConfig(first=first, second=second, second_blur_prob=0.8, enlarge=["bicubic"])


PRESETS = {"ccsr": ccsr_degradation, "consissr": consissr_degradation}


def preset(name: str) -> DegradationConfig:
    """The named settings, fresh each time. Raises UserError for an unknown name."""
    check_word(name, tuple(PRESETS), "degradation")
    return PRESETS[name]()
