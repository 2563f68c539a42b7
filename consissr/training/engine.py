"""What turns a phase's loss into a step of its weights: gradients over all processes, clipping, optimiser, averages.

Every phase's loss is the forward pass of one module, which `accelerate` makes a DistributedDataParallel of: gradients
are parts of its buckets, and a bucket is averaged over the processes while the backward pass still computes the next
one, in the last micro-batch of a step only.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from consissr.training.optimisers import build_optimizer
from consissr.training.stage import Batch, Phase


class PhaseLoss(nn.Module):
    """A phase's loss as a module that holds what the phase trains, and nothing else."""

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.trained = nn.ParameterList(phase.parameters.values())
        self.loss = phase.loss

    def forward(self, batch: Batch | None, step: int) -> dict[str, Tensor]:
        """The loss's parts; without a batch a 0 whose gradient reaches every parameter."""
        if batch is None:
            return {"loss": sum(parameter.flatten()[0] * 0 for parameter in self.trained)}
        return self.loss(batch, step)


class Player:
    """One phase in training: its loss, whose gradients are averaged over processes, and its optimiser.

    A GAN's two players have one each; while one is trained the other's parameters require no gradient.
    """

    def __init__(self, phase: Phase, accelerator: Accelerator, sharded: bool) -> None:
        self.phase, self.name = phase, phase.name
        self.parameters = list(phase.parameters.values())
        self.world, self.first = accelerator.num_processes, accelerator.is_main_process
        self.requires_grad(True)
        self.module = accelerator.prepare_model(PhaseLoss(phase), device_placement=False)
        self.optimizer = build_optimizer(phase, sharded=sharded and self.world > 1)
        # Gradients are made here, once, as parts of the buckets: a first micro-batch whose gradients nobody averages
        # would make them apart, and double their memory.
        self.module(None, 0)["loss"].backward()

    def requires_grad(self, wanted: bool) -> None:
        """Whether backward passes reach this phase's parameters."""
        for parameter in self.parameters:
            parameter.requires_grad_(wanted)

    def averaging(self, wanted: bool) -> AbstractContextManager[None]:
        """A context whose backward pass averages the gradients over processes, or adds to this one's alone."""
        return nullcontext() if wanted or self.world == 1 else self.module.no_sync()

    def step(self, rate: float) -> Tensor:
        """Clip and step at learning rate `rate`, unless the gradient is not finite; its norm before clipping, a scalar.

        Nothing waits for the device, except with 8-bit moments, whose kernels have no such condition.
        """
        self.requires_grad(True)  # a sharded optimiser would take parameters that don't for changed ones
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.phase.optimizer.clip or math.inf)
        inner = getattr(self.optimizer, "optim", self.optimizer)  # what a sharded optimiser steps
        for group in [*self.optimizer.param_groups, *inner.param_groups]:
            group["lr"] = rate
        if self.phase.optimizer.kind == "adamw":
            inner.found_inf = (~torch.isfinite(norm)).float()
            self.optimizer.step()
        elif torch.isfinite(norm):
            self.optimizer.step()
        torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])
        return norm

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's whole state in the first process, whose form does not depend on the engine; {} in others."""
        if self.optimizer is not getattr(self.optimizer, "optim", self.optimizer):
            self.optimizer.consolidate_state_dict(to=0)
        return self.optimizer.state_dict() if self.first else {}

    def free(self) -> None:
        """Give up gradients, buckets and moments; nothing is trained after this."""
        del self.module, self.optimizer
        for parameter in self.parameters:
            parameter.grad = None


class Average:
    """Exponential moving averages of the trained weights, or none (`decay` 0).

    The decay grows to its value: a short run's average would hold its starting weights otherwise. So does LDM's, whose
    count of steps is one ahead.
    """

    def __init__(self, weights: dict[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.weights = list(weights.values())
        self.values = {name: value.detach().clone() for name, value in weights.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move every average towards its weight, after `step` steps before this one."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.values:
            torch._foreach_lerp_(list(self.values.values()), self.weights, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The stage holds the averages within, if there are any, and the trained weights again afterwards."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and weights in place."""
        for weight, value in zip(self.weights, self.values.values(), strict=bool(self.values)):
            trained = weight.clone()
            weight.copy_(value)
            value.copy_(trained)
