"""How a model samples."""

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from consissr.config.loading import check_word
from consissr.errors import UserError


@dataclass(kw_only=True)
class SamplerConfig:
    """How images are restored: the model's default, changed by the flags of scripts/infer.py."""

    plan: str = "nuts"
    """Rule that makes the plan, which is `timesteps`: 'nuts' (CCSR) or 'ddpm' (ConsisSR, spaced DDPM)."""
    steps: int = 6
    """Grid steps T: 6 for NUTS (Sec. IV-A, CCSR), 50 for spaced DDPM (Sec. 4.1, ConsisSR)."""
    t_max: float = 2 / 3
    """NUTS: fraction of T where uniform steps begin (Sec. IV-A, CCSR)."""
    t_min: float = 1 / 2
    """NUTS: fraction of T where sampling is cut off (Sec. IV-A, CCSR)."""
    grid: str = "trailing"
    """NUTS grid: 'trailing' (ours), 'leading' (CCSR v2 as released) or 'linspace' (CCSR v1)."""
    timesteps: list[Any] = field(default_factory=list)
    """The plan written out, a list of [t, t_next, kind]; written into model folders by training and conversion. Empty:
    from `plan`, `steps`, `t_max`, `t_min` and `grid`."""
    start: str = "lq"
    """First latent: 'lq' (z_lq noised to the noisiest timestep, 999: CCSR v2) or 'noise' (ConsisSR, CCSR v1)."""
    guidance: float = 1.0
    """Scale of classifier-free guidance by the text; 1 evaluates the positive prompt only."""
    positive: str = ""
    """Positive prompt."""
    negative: str = ""
    """Negative prompt, used when guidance is not 1."""
    first_prompt: str = "positive"
    """Prompts of the first evaluation under guidance: 'guided' (both, as in the others: ConsisSR), the 'positive' one
    alone (ours) or the 'negative' one alone (CCSR v2 as released). Where a plan begins with a DDPM step, both."""
    posterior: str = "mode"
    """z_lq: 'mode' or 'sample' of the VAE posterior (CCSR v2 samples)."""
    posterior_rows: int = 1
    """Under guidance: 1 posterior sample for both halves, or 2 (CCSR v2 as released)."""
    geometry: str = "pad"
    """Size rules: 'pad' (ours: exact scale, reflection), or as released 'ccsr' (v2), 'ccsr_v1' or 'consissr'."""
    short_side: int = 0
    """Least short side of what the networks see, in pixels: smaller results are made that large and brought back to
    their exact size. 512 for SD2.1's sizes (both releases; CCSR's author advises it); 0: never under 'pad'."""
    margin: int = 0
    """Pixels of the reflected image that the networks see around it (`pad` only): what they make of the zeros beyond
    their input's border, a frame of some pixels, is then cut off. 0 for SD2.1's sizes, where it costs too much."""
    color_fix: str = "adain"
    """Colour transfer from the LQ image: 'adain', 'wavelet' or 'none'."""
    fidelity: float = 1.0
    """How closely results keep to their inputs: strength of the ControlNet's residuals, and of the colour transfer
    where `color_strength` says nothing. 1: as trained; 0: the prior alone, which makes up what it shows."""
    color_strength: float | None = None
    """Strength of the colour transfer: 1 whole, 0 none; null: as `fidelity`."""
    tile: int = -1
    """Side of a diffusion tile in output pixels; 0 turns tiles off, -1 chooses from image size and memory."""
    tile_overlap: int = -1
    """How far diffusion tiles overlap, in output pixels (CCSR: half the tile); -1: a quarter of the tile; of automatic
    tiles of a model that takes any size about a tenth."""
    tile_weights: str = "symmetric"
    """Gaussian weights of a tile: 'symmetric' (ours) or 'as_released' (CCSR v2, centred half a pixel low)."""
    vae_tile: int = -1
    """Side of an autoencoder tile in output pixels; 0 turns tiles off, -1 chooses from image size and memory."""
    vae_tiling: str = "auto"
    """Autoencoder tiles: 'exact', 'sampled' (one pass: norms from a sample of the image, attention in windows),
    'as_released' (CCSR v2, decoder only); 'auto': sampled where a sample fits into the memory, else exact."""

    def __post_init__(self) -> None:
        check_word(self.plan, ("nuts", "ddpm"), "sampler.plan")
        check_word(self.grid, ("trailing", "leading", "linspace"), "sampler.grid")
        check_word(self.start, ("lq", "noise"), "sampler.start")
        check_word(self.first_prompt, ("guided", "positive", "negative"), "sampler.first_prompt")
        check_word(self.posterior, ("mode", "sample"), "sampler.posterior")
        check_word(self.geometry, ("pad", "ccsr", "ccsr_v1", "consissr"), "sampler.geometry")
        check_word(self.color_fix, ("adain", "wavelet", "none"), "sampler.color_fix")
        check_word(self.tile_weights, ("symmetric", "as_released"), "sampler.tile_weights")
        check_word(self.vae_tiling, ("auto", "exact", "sampled", "as_released"), "sampler.vae_tiling")
        if not isfinite(self.guidance):
            raise UserError(f"sampler.guidance is {self.guidance}: use a number, 1 for off")
        for name in ("short_side", "margin"):
            if getattr(self, name) < 0:
                raise UserError(f"sampler.{name} is {getattr(self, name)}: use pixels, or 0 for off")
        for name in ("t_max", "t_min", "fidelity", "color_strength"):
            if not 0 <= (1.0 if getattr(self, name) is None else getattr(self, name)) <= 1:
                raise UserError(f"sampler.{name} is {getattr(self, name)}: use 0 to 1")
        for name in ("tile", "tile_overlap", "vae_tile"):
            if getattr(self, name) < -1:
                raise UserError(f"sampler.{name} is {getattr(self, name)}: use pixels, 0 for off or -1 for automatic")
        if self.posterior_rows not in (1, 2):
            raise UserError(f"sampler.posterior_rows is {self.posterior_rows}: use 1 or 2")
