"""An optimiser, and its learning rate over the steps."""

from dataclasses import dataclass, field

from consissr.config.loading import check_word


@dataclass(kw_only=True)
class OptimizerConfig:
    """One optimiser's settings; a stage with two players has two of them."""

    kind: str = "adamw"
    """'adamw' (fused) or 'adamw8bit': its two moments in 8 bits, which needs the package bitsandbytes."""
    lr: float = 5e-5
    """Learning rate after warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's decay rates."""
    weight_decay: float = 0.01
    """Decoupled weight decay (AdamW)."""
    warmup: int = 0
    """Optimiser steps of linear warm-up."""
    decay: str = "constant"
    """After warm-up: 'constant' or 'cosine' to `final` at the last step."""
    final: float = 0.01
    """Learning rate at the end of a cosine decay, and at the start of a warm-up, relative to `lr`."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        check_word(self.kind, ("adamw", "adamw8bit"), "optimizer.kind")
        check_word(self.decay, ("constant", "cosine"), "optimizer.decay")
