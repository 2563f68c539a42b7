"""Training images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from consissr.config.loading import check_word


@dataclass(kw_only=True)
class DataConfig:
    """Training images and how their low-quality partners are made."""

    shrink: ClassVar[float] = 1.0
    """A field of the bundled models' runs (consissr/nano/config.py), here off."""
    enlarge: ClassVar[Sequence[str]] = ()
    """A field of the bundled models' runs, here the preset's."""

    paths: list[str] = field(default_factory=list)
    """Folders (recursive), text lists of files, tar shards, or patterns of these with *, {000..099} or {a,b}."""
    probabilities: list[float] = field(default_factory=list)
    """How often each entry of `paths` is drawn; empty: in proportion to its image count."""
    lq_paths: list[str] = field(default_factory=list)
    """Own pairs: for each entry of `paths`, the folder of its low-quality partners, or '' to degrade its images; empty:
    degrade all."""
    scale: int = 4
    """Own pairs: HQ side / LQ side, 1 (RealSR version 3, whose LQ images have the HQ size), 2 or 4."""
    pair_names: list[str] = field(default_factory=lambda: ["NAME", "NAME"])
    """Own pairs: file names without extension of an HQ and an LQ image; NAME is what they share, as are sub-folders.
    DIV2K, LSDIR: [NAME,NAMEx4]; RealSR version 3, both in one folder: [NAME_HR,NAME_LR4]."""
    cache_mb: int = 1024
    """Memory for decoded photographs, MiB; not used where it would hold less than a quarter of them."""
    crop: int = 512
    """Side of a training crop in pixels (512 in both papers)."""
    crop_rule: str = "random"
    """'random' (CCSR) or 'center' (ConsisSR: short side resized to the crop, centre)."""
    flips: str = "horizontal"
    """Random flips: 'none', 'horizontal' or 'both' (Sec. 4.1, ConsisSR)."""
    degradation: str = "ccsr"
    """Preset of the two-stage Real-ESRGAN degradation, as the method's release sets it: 'consissr', of Real-ESRGAN's
    own strength, or 'ccsr', milder (blur up to 1.5 and 1.0 instead of 3.0 and 1.5, noise up to 15 and 12 instead of 30
    and 25, JPEG from quality 60 instead of 30; the paper says "the degradation pipeline in RealESRGAN"). Or 'heavy',
    ours: ConsisSR's with Gaussian noise of 25 to 50 and JPEG of quality 10 to 30 in the second stage."""
    draws: str = "per_image"
    """What the images of a micro-batch share of the degradation: nothing ('per_image') or all but blur kernels and
    strengths ('per_batch', ConsisSR as released)."""
    pair_pool: int = 0
    """Pairs that Real-ESRGAN's pool holds per process, to mix what shares its draws (ConsisSR as released: 192, in
    stage 1 256); 0: no pool. A run with a pool cannot be resumed."""
    validation: str = ""
    """Folder of photographs for the fixed validation set; empty: no validation."""
    validation_lq: str = ""
    """Folder of their low-quality partners, named as `pair_names` says, at `scale`; empty: degrade."""
    validation_count: int = 8
    """Images of the fixed validation set."""

    def __post_init__(self) -> None:
        check_word(self.crop_rule, ("random", "center"), "data.crop_rule")
        check_word(self.flips, ("none", "horizontal", "both"), "data.flips")
        check_word(self.draws, ("per_image", "per_batch"), "data.draws")
