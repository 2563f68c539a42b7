"""`config.yaml` of a model folder."""

from dataclasses import dataclass, field

from consissr.config.model import ModelConfig
from consissr.config.sampler import SamplerConfig
from consissr.errors import UserError


@dataclass(kw_only=True)
class StoredModelConfig(ModelConfig):
    """What weights need that may be a bundled model's, too."""

    residual: float = 0.0
    """0: the UNet's output is what the base's is (both papers). Above 0: it is v of (z_hq - z_lq) / residual, which is
    that difference's standard deviation: restoring then starts from z_lq (`nano`: a small network copies it badly)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual < 0:
            raise UserError(f"model.residual is {self.residual}: use a standard deviation, or 0 to turn it off")


@dataclass(kw_only=True)
class FolderConfig:
    """`config.yaml` of a model folder."""

    model: ModelConfig = field(default_factory=StoredModelConfig)
    """What the weights need."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the model samples unless told otherwise."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, StoredModelConfig):  # a paper's run knows no residual
            self.model = StoredModelConfig(**vars(self.model))
