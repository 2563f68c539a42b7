"""Configuration of the bundled models' runs: their base stages, and what they add to the papers' stages.

`run_config` reads any run's configuration by the schema that belongs to its stage.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from consissr.config.data import DataConfig
from consissr.config.deft import DeftConfig
from consissr.config.folder import StoredModelConfig
from consissr.config.loading import check_word, load_config, read_word
from consissr.config.model import ModelConfig
from consissr.config.nuts import NutsConfig
from consissr.config.tala import TalaConfig
from consissr.config.training import TrainConfig
from consissr.data.settings import MODES
from consissr.errors import UserError

PAPER_STAGES = ("rclip", "tala", "nuts", "deft")
"""Stages whose runs are described by `TrainConfig`; those of the others by `NanoConfig`."""
STAGES = (*PAPER_STAGES, "autoencoder", "clip", "prior", "nano_rclip", "nano_tala", "nano_nuts", "nano_deft")
"""All stages; their classes: scripts/train.py."""


def run_config(path: str | Path | None, overrides: list[str] | None = None) -> TrainConfig:
    """The configuration of a run from a YAML file and `key=value` overrides, by its stage. Raises UserError."""
    stage = read_word("stage", path, overrides)
    if stage or "stage=" in (overrides or []):
        check_word(stage, STAGES, "stage")
    return load_config(TrainConfig if stage in ("", *PAPER_STAGES) else NanoConfig, path, overrides)


@dataclass(kw_only=True)
class AutoencoderConfig:
    """Stage 'autoencoder': a KL autoencoder from scratch (for `nano`)."""

    patch: int = 2
    """Space-to-depth factor before the encoder and after the decoder."""
    widths: list[int] = field(default_factory=lambda: [32, 64, 128])
    """Channels per resolution; each further entry halves the side."""
    layers: int = 1
    """Residual blocks per resolution."""
    latent_channels: int = 16
    """Channels of the latent."""
    linear_path: bool = True
    """Add a linear code of pixel blocks, started at their principal components, beside the networks."""
    whitening: float = 0.75
    """How far the linear code's channels are brought to equal variance: 0 not at all, 1 fully."""
    kl_weight: float = 1e-4
    """Weight of the Kullback-Leibler term (mean over latent elements)."""
    gradient_weight: float = 1.0
    """Weight of the L1 loss on image differences, which keeps edges sharp."""


@dataclass(kw_only=True)
class ClipConfig:
    """Stage 'clip': a small text/image encoder pair from scratch (for `nano`)."""

    image_size: int = 128
    """Side of the image tower's input in pixels."""
    patch_size: int = 16
    """Side of its patches in pixels."""
    width: int = 96
    """Width of the image tower."""
    layers: int = 3
    """Transformer blocks of the image tower."""
    head_width: int = 32
    """Width of one attention head of the image tower."""
    embed_dim: int = 64
    """Width of the shared embedding."""
    text_width: int = 64
    """Width of the text encoder, which the prior's `context_dim` must equal."""
    text_layers: int = 2
    """Transformer blocks of the text encoder."""
    text_heads: int = 4
    """Attention heads of the text encoder."""
    text_length: int = 24
    """Tokens of a prompt, both ends included; longer prompts are cut."""
    smallest: float = 0.4
    """Least side of the windows that are shown, relative to `data.crop`; the greatest is 1."""
    held_out: int = 400
    """Crops of `data.validation` on which the result's retrieval is measured."""


@dataclass(kw_only=True)
class PriorConfig:
    """Stage 'prior': an unconditional diffusion UNet on latents (for `nano`)."""

    widths: list[int] = field(default_factory=lambda: [64, 128, 192])
    """Channels per resolution."""
    layers: int = 1
    """Residual blocks per resolution."""
    heads: int = 4
    """Attention heads at every resolution that has attention."""
    attention: list[bool] = field(default_factory=lambda: [False, True, True])
    """Which resolutions have transformer blocks."""
    context_dim: int = 64
    """Width of prompt embeddings."""
    text: str = ""
    """output_dir of a clip run: its text encoder reads the captions that are measured on the crops."""
    caption_dropout: float = 0.15
    """Share of the captions that are replaced by the empty prompt."""

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.attention):
            counts = f"{len(self.widths)} resolutions, prior.attention {len(self.attention)}"
            raise UserError(f"prior.widths has {counts}: give one of each for every resolution")


@dataclass(kw_only=True)
class NanoDataConfig(DataConfig):
    """Training images: small photographs, whose grain and compression a small network would learn."""

    shrink: float = 1.0
    """Random crops come from photographs shrunk by a factor drawn evenly from [shrink, 1]; 1: never (both papers)."""
    enlarge: list[str] = field(default_factory=list)
    """Filters that bring LQ crops back to full size, one drawn per image; empty: the preset's. Use is 'bicubic'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for mode in self.enlarge:
            check_word(mode, MODES, "data.enlarge")


@dataclass(kw_only=True)
class NanoTalaConfig(TalaConfig):
    """Stage 'nano_tala': Algorithm 1 under other errors and timesteps."""

    weighting: str = "eps"
    """Squared error of the noise ('eps', Eq. 4) or of v ('v': divided by alpha_bar, so that errors of x0 count at noisy
    timesteps, too)."""
    metric: str = "latents"
    """Squared errors weigh all latent channels alike ('latents', the papers) or by what they change in 'pixels', for an
    autoencoder with a linear path, whose channels were brought to similar variances."""
    error: str = "squared"
    """'squared' (Eq. 4, ConsisSR) or 'absolute', which counts small errors in smooth areas for more; with
    `metric: pixels`, of pixels."""
    plan_share: float = 0.0
    """Share of images trained at one of the sampler's timesteps, for few steps; the rest is uniform (Algorithm 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word(self.weighting, ("eps", "v"), "tala.weighting")
        check_word(self.metric, ("latents", "pixels"), "tala.metric")
        check_word(self.error, ("squared", "absolute"), "tala.error")
        if not 0 <= self.plan_share <= 1:
            raise UserError(f"tala.plan_share is {self.plan_share}: use a share from 0 to 1")


@dataclass(kw_only=True)
class NanoNutsConfig(NutsConfig):
    """Stage 'nano_nuts': NUTS' losses under another error."""

    metric: str = "latents"
    """As `tala.metric`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word(self.metric, ("latents", "pixels"), "nuts.metric")


@dataclass(kw_only=True)
class NanoDeftConfig(DeftConfig):
    """Stage 'nano_deft': perceptual losses that need no weights, or fewer."""

    PERCEPTUAL: ClassVar[tuple[str, ...]] = ("features", "vgg", "lpips", "none")

    perceptual: str = "features"
    """'features' (matching in the discriminator's features), 'vgg' (LPIPS without its learned weights of channels, for
    a VGG16 of any origin), 'lpips' or 'none'."""
    weights: str = ""
    """'lpips': folder with its weight files; empty: the folders where torchvision and pyiqa keep theirs. 'vgg':
    safetensors file of VGG16's convolutions by torchvision's names (`python -m ccsr.vgg` converts one)."""


@dataclass(kw_only=True)
class NanoConfig(TrainConfig):
    """A training run of a bundled model."""

    model: ModelConfig = field(default_factory=StoredModelConfig)
    """What is trained, and on which base."""
    data: NanoDataConfig = field(default_factory=NanoDataConfig)
    """Training and validation images."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Read by stage 'autoencoder'."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """Read by stage 'clip'."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """Read by stage 'prior'."""
    tala: NanoTalaConfig = field(default_factory=NanoTalaConfig)
    """Read by stage 'nano_tala', and its p(t) by 'nano_nuts'."""
    nuts: NanoNutsConfig = field(default_factory=NanoNutsConfig)
    """Read by stage 'nano_nuts'."""
    deft: NanoDeftConfig = field(default_factory=NanoDeftConfig)
    """Read by stage 'nano_deft'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prior.text = os.path.expanduser(self.prior.text)
