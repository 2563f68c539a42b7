"""`config.yaml` of a model folder."""

from __future__ import annotations

from dataclasses import dataclass, field

from consissr.config.model import ModelConfig
from consissr.config.sampler import SamplerConfig


@dataclass(kw_only=True)
class FolderConfig:
    """`config.yaml` of a model folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What the weights need."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the model samples unless told otherwise."""
