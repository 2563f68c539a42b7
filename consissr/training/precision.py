"""What is computed in bfloat16, and which weights are stored in it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def stores_bf16(frozen_precision: str, device: torch.device, autocast: bool) -> bool:
    """Whether frozen matrices are stored in bfloat16: unasked only on GPUs, and never without autocast."""
    return autocast and (frozen_precision == "bf16" or (frozen_precision == "auto" and device.type == "cuda"))


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context that computes in the tensors' own precision. (The meta device has no autocast to turn off.)"""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def frozen_matrices(networks: nn.Module, trained: set[int]) -> list[nn.Parameter]:
    """Parameters of linear layers and convolutions that are not `trained` (ids), which autocast rounds at every use."""
    layers = [m for m in networks.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return [p for layer in layers for p in layer.parameters(recurse=False) if id(p) not in trained]


class Frozen:
    """Networks' parameters that are not trained: without gradients and, if `low`, matrices stored in bfloat16.

    Rounded once, they give the same results bit for bit and take half the memory. `restore` brings the originals, kept
    on the CPU if `keep`, back for the export.
    """

    def __init__(self, networks: nn.Module, trained: set[int], low: bool, keep: bool) -> None:
        self.originals: list[tuple[nn.Parameter, Tensor]] = []
        for parameter in networks.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        for parameter in frozen_matrices(networks, trained) if low else []:
            if parameter.dtype == torch.float32:
                if keep:
                    self.originals.append((parameter, parameter.data))
                parameter.data = parameter.data.to(torch.bfloat16)

    def restore(self) -> None:
        """Give the parameters their original values."""
        for parameter, original in self.originals:
            parameter.data = original.to(parameter.device)
