"""Configuration of training runs: their data, and what all stages share. stages.py has what each stage adds."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from consissr.config.loading import check_word
from consissr.config.model import ModelConfig
from consissr.config.sampler import SamplerConfig
from consissr.config.stages import (
    AutoencoderConfig,
    ClipConfig,
    DeftConfig,
    NutsConfig,
    OptimizerConfig,
    PriorConfig,
    RclipConfig,
    TalaConfig,
)
from consissr.errors import UserError


@dataclass(kw_only=True)
class DataConfig:
    """Training images and how their low-quality partners are made."""

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
    shrink: float = 1.0
    """Random crops come from photographs shrunk by a factor drawn evenly from [shrink, 1], which removes grain and
    compression from small sources (`nano`); 1: never (both papers)."""
    degradation: str = "ccsr"
    """Preset of the two-stage Real-ESRGAN degradation: 'ccsr' or 'consissr'."""
    enlarge: list[str] = field(default_factory=list)
    """Filters that bring LQ crops back to full size, one drawn per image; empty: the preset's. Use is 'bicubic'."""
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


@dataclass(kw_only=True)
class TrainConfig:
    """A whole training run: one YAML file plus key=value overrides."""

    stage: str = "nuts"
    """Which stage runs; the table of stages stands in scripts/train.py."""
    output_dir: str = "runs/default"
    """Folder of checkpoints, logs, validation images and the final model."""
    init: str = ""
    """Model folder, or earlier run's output_dir, whose weights the stage starts from; empty: the base's."""
    seed: int = 0
    """Seed of data order, degradation, noise and initial weights."""
    steps: int = 20000
    """Optimiser steps."""
    batch: int = 96
    """Global batch: images per optimiser step over all processes (96 for NUTS, 64 for DeFT: Sec. IV-A, CCSR)."""
    micro_batch: int = 4
    """Images per process and forward pass; accumulation = batch / (micro_batch * processes)."""
    processes: int = 0
    """Expected number of processes; another world size is an error. 0: take what was launched."""
    engine: str = "ddp"
    """Several processes: 'ddp' (each holds the optimisers' whole state) or 'zero1' (each holds a part of it, ZeRO stage
    1: 8 bytes per trained parameter are shared out). Alone, both are the same."""
    timeout: float = 10.0
    """Minutes after which a process that the others do not hear of ends the run."""
    skip_not_finite: bool = False
    """Leave out a step whose loss or gradient is not finite, and count it in the log, instead of ending the run."""
    precision: str = "auto"
    """Autocast: 'bf16', 'fp32' or 'auto' (bf16 where the device computes it fast, else fp32)."""
    frozen_precision: str = "auto"
    """Storage of frozen matrices where autocast is bf16, which rounds them anyway: 'bf16', 'fp32' or 'auto' (bf16 on
    GPUs). The results are the same."""
    export_precision: str = "fp32"
    """Storage of the exported result's weights: 'fp32' or 'fp16'. Checkpoints are always fp32."""
    ema: float = 0.0
    """Decay of an exponential moving average of the trained weights; 0: none."""
    gradient_checkpointing: bool = False
    """Trade time for memory in the UNet and the ControlNet."""
    compile: bool = False
    """torch.compile the stage's networks: minutes at the start, faster steps after; validation stays uncompiled."""
    workers: int = 0
    """Threads that read and prepare batches ahead of the step; 0: one per core of this process but one, 16 at most."""
    log_every: int = 50
    """Optimiser steps between log lines."""
    checkpoint_every: int = 1000
    """Optimiser steps between checkpoints."""
    checkpoint_limit: int = 2
    """Newest checkpoints kept."""
    validate_every: int = 1000
    """Optimiser steps between validations; 0: only at the end."""
    tracker: str = "tensorboard"
    """'tensorboard', 'wandb' or 'none'."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The generator's (or only) optimiser."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What is trained, and on which base."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Default sampler of the resulting model. Validation runs it, without guidance and colour transfer, in stage 'tala'
    and, where l_T is not trained, in 'nuts'; else 'nuts' and 'deft' show their one-step results."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation images."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Read by stage 'autoencoder'."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """Read by stage 'clip'."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """Read by stage 'prior'."""
    rclip: RclipConfig = field(default_factory=RclipConfig)
    """Read by stage 'rclip'."""
    tala: TalaConfig = field(default_factory=TalaConfig)
    """Read by stage 'tala'; `probability`, `gamma` and `shared_draw` also by stage 'nuts'."""
    nuts: NutsConfig = field(default_factory=NutsConfig)
    """Read by stage 'nuts'."""
    deft: DeftConfig = field(default_factory=DeftConfig)
    """Read by stage 'deft'."""

    def __post_init__(self) -> None:
        check_word(self.engine, ("ddp", "zero1"), "engine")
        check_word(self.precision, ("auto", "bf16", "fp32"), "precision")
        check_word(self.frozen_precision, ("auto", "bf16", "fp32"), "frozen_precision")
        check_word(self.export_precision, ("fp32", "fp16"), "export_precision")
        check_word(self.tracker, ("tensorboard", "wandb", "none"), "tracker")
        homes = [(self, "output_dir"), (self, "init"), (self.model, "base"), (self.model, "image_encoder")]
        homes += [(self.prior, "text"), *((self.deft, name) for name in ("weights", "dino", "dino_v2"))]
        for part, name in homes:
            setattr(part, name, os.path.expanduser(getattr(part, name)))  # only a leading ~ is a home folder
        if self.model.base.startswith("./"):  # in a model folder this means a base beside its other files
            self.model.base = os.path.abspath(self.model.base)
        if self.micro_batch < 1:
            raise UserError(f"micro_batch is {self.micro_batch}: use at least 1")
        if self.data.pair_pool % self.micro_batch:
            raise UserError(f"data.pair_pool is {self.data.pair_pool}: use 0 or a multiple of micro_batch")
