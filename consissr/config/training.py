"""Configuration of training runs: their data, and what all stages share. Each stage has a file of its own."""

import os
from dataclasses import dataclass, field

from consissr.config.data import DataConfig
from consissr.config.deft import DeftConfig
from consissr.config.loading import check_word
from consissr.config.model import ModelConfig
from consissr.config.nuts import NutsConfig
from consissr.config.optimizer import OptimizerConfig
from consissr.config.rclip import RclipConfig
from consissr.config.sampler import SamplerConfig
from consissr.config.tala import TalaConfig
from consissr.errors import UserError


@dataclass(kw_only=True)
class TrainConfig:
    """A whole training run: one YAML file plus key=value overrides."""

    stage: str = "nuts"
    """Which stage runs: 'rclip', 'tala', 'nuts' or 'deft' (those of `nano`: consissr/nano/config.py)."""
    output_dir: str = "runs/default"
    """Folder of checkpoints, logs, validation images and the final model."""
    init: str = ""
    """Model folder, or earlier run's output_dir, whose weights the stage starts from; empty: the base's."""
    keep_decoder: bool = True
    """Stages 'tala' and 'nuts': keep the decoder that `init` was given by stage 'deft'; false: take the base's."""
    seed: int = 0
    """Seed of data order, degradation, noise and initial weights."""
    steps: int = 20000
    """Optimiser steps."""
    batch: int = 96
    """Global batch: images per optimiser step over all processes (96 for NUTS, 64 for DeFT: Sec. IV-A, CCSR)."""
    micro_batch: int = 4
    """Images per process and forward pass, with several processes as many as divide each one's share of the batch;
    accumulation = batch / (micro_batch * processes)."""
    processes: int = 0
    """Expected number of processes; another world size is an error. 0: take what was launched."""
    engine: str = "ddp"
    """Several processes: 'ddp' (each holds the optimisers' whole state) or 'zero1' (each holds a part of it, ZeRO stage
    1: 8 bytes per trained parameter are shared out). Alone, both are the same."""
    timeout: float = 10.0
    """Minutes of silence from one process after which the others end the run."""
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
    """Decay per step of an exponential average of the trained weights, at first (1 + step) / (10 + step); 0: none."""
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
        homes += [(self.deft, name) for name in ("weights", "dino", "dino_v2")]
        for part, name in homes:
            setattr(part, name, os.path.expanduser(getattr(part, name)))  # only a leading ~ is a home folder
        if self.model.base.startswith("./"):  # in a model folder this means a base beside its other files
            self.model.base = os.path.abspath(self.model.base)
        if self.micro_batch < 1:
            raise UserError(f"micro_batch is {self.micro_batch}: use at least 1")
        if self.data.pair_pool % self.micro_batch:
            raise UserError(f"data.pair_pool is {self.data.pair_pool}: use 0 or a multiple of micro_batch")
