"""Stage 'tala'."""

from dataclasses import dataclass

from consissr.config.loading import check_word
from consissr.errors import UserError


@dataclass(kw_only=True)
class TalaConfig:
    """Stage 'tala' (Algorithm 1, ConsisSR), and time-aware latent augmentation of l_diff in stage 'nuts'."""

    probability: str = "default"
    """p(t), t counted from 0: 'power' ((t+1)/T)^gamma (the paper's (t/T)^gamma, which counts from 1), 'as_released'
    (t/T)^gamma, 'linear' or 'off' (Table 4, ConsisSR); 'default' is 'power' in stage 'tala' and 'off' in stage 'nuts',
    where it acts on l_diff (a hybrid of ours)."""
    gamma: float = 10.0
    """Exponent of p(t) (Table 4, ConsisSR: 5, 10 or 20)."""
    shared_draw: bool = False
    """One r for all images of a micro-batch (as released) in place of one each (Algorithm 1)."""
    encoder_gradients: bool = True
    """Stage 'tala': train what is added to the UNet's encoder and middle, too (the release does not)."""
    posterior: str = "mode"
    """Stage 'tala': z_hq and z_lq are the 'mode' or a 'sample' (as released) of the VAE posterior, on which the paper
    is silent; the hint is the mode (as released)."""

    def __post_init__(self) -> None:
        if self.probability == "False":  # what YAML makes of a bare off
            self.probability = "off"
        check_word(self.probability, ("default", "power", "as_released", "linear", "off"), "tala.probability")
        check_word(self.posterior, ("mode", "sample"), "tala.posterior")
        if not self.gamma > 0:
            raise UserError(f"tala.gamma is {self.gamma}: use a number above 0 (10 in the paper)")
