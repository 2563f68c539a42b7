"""Stage 'nuts'."""

from dataclasses import dataclass, field

from consissr.config.loading import check_word
from consissr.errors import UserError


@dataclass(kw_only=True)
class NutsConfig:
    """Stage 'nuts' (Sec. III-B, CCSR). Where its uniform steps begin and end, the sampler's t_max and t_min say."""

    losses: list[str] = field(default_factory=lambda: ["l_diff", "l_T", "l_tmax"])
    """Losses (Eq. 2 and 3, CCSR) of every batch, summed with weight 1 as in CCSR v2; l_diff alone is ControlNet
    pre-training."""
    start: str = "lq"
    """The latent that is noised to x_T (Eq. 1, CCSR): 'hq' (the paper, whose x_0 is the photograph's, and CCSR v2's
    first stage) or 'lq' (ours: what sampling starts from)."""
    l_diff_t: str = "as_released"
    """Timesteps of l_diff: 'as_released' (below t_max's where l_T is trained, otherwise all: CCSR v1 and v2),
    'interval' (from the sampler's t_min to t_max: the paper) or 'all' (with l_T, too: latent augmentation is rare below
    t_max)."""
    t_max_step: int = 0
    """Timestep that x0_from_T is re-noised to in training; 0: that of the sampler's t_max on its grid. CCSR v2 as
    released: 667, while its sampler uses 499."""
    posterior: str = "mode"
    """z_hq and z_lq, the hint included: 'mode' or 'sample' (as released) of the VAE posterior, on which the paper is
    silent."""

    def __post_init__(self) -> None:
        check_word(self.start, ("lq", "hq"), "nuts.start")
        check_word(self.posterior, ("mode", "sample"), "nuts.posterior")
        check_word(self.l_diff_t, ("as_released", "interval", "all"), "nuts.l_diff_t")
        if not self.losses:
            raise UserError("nuts.losses is empty: name at least one of l_diff, l_T, l_tmax")
        for name in self.losses:
            check_word(name, ("l_diff", "l_T", "l_tmax"), "nuts.losses")
