"""Learning rates and optimisers."""

import math
from typing import Any

import torch

from consissr.config.optimizer import OptimizerConfig
from consissr.training.stage import Phase


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based) of `steps`: linear warm-up, then constant or cosine."""
    if step < config.warmup:
        return config.lr * (config.final + (1 - config.final) * step / config.warmup)
    if config.decay == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def build_optimizer(phase: Phase, sharded: bool = False) -> torch.optim.Optimizer:
    """AdamW over a phase's fp32 parameters: fused, or with its two moments in 8 bits.

    sharded: each process holds the moments of a part of the parameters and sends what it updated to the others (ZeRO,
    stage 1; Rajbhandari et al. 2020).
    """
    c = phase.optimizer
    settings = {"lr": c.lr, "betas": tuple(c.betas), "weight_decay": c.weight_decay}
    parameters = list(phase.parameters.values())
    if c.kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    if sharded:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, fused=True, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], phase: Phase) -> None:
    """The moments of a checkpoint, under the betas and the weight decay of this run."""
    optimizer.load_state_dict(state)
    inner = getattr(optimizer, "optim", optimizer)
    for group in [*optimizer.param_groups, *inner.param_groups]:
        group |= {"betas": tuple(phase.optimizer.betas), "weight_decay": phase.optimizer.weight_decay}
