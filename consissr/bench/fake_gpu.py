"""A GPU that need not be there: shapes, types and devices of every operation, no values.

Fake tensors say that they are on a GPU, and an operation on two devices raises, as it would there. What asks a value of
them has no answer; what draws by values is replaced. The mode has no public name: torch's documentation of fake tensors
imports it from `torch._subclasses`, too.
"""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import consissr.data.draws
import consissr.data.jpeg
import consissr.data.noise
import consissr.models.tiles


def moved(module: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
    """`module.to(...)`, which cannot exchange a real parameter for a fake one in place. Parameters become others."""
    device, dtype, _, order = torch._C._nn._parse_to(*arguments, **keywords)
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in ((n, v) for n, v in held.items() if v is not None):
                kind = dtype if dtype and value.is_floating_point() else value.dtype
                new = torch.empty(value.shape, dtype=kind, device=device or value.device)
                if order is not None and value.ndim == 4:
                    new = new.contiguous(memory_format=order)
                held[name] = nn.Parameter(new, value.requires_grad) if held is part._parameters else new
    return module


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """A mode for `with`, in which tensors may be on "cuda". What checks its values is built before."""
    constant, noise = torch.tensor, consissr.data.noise
    replaced = [
        (torch.cuda, "is_available", lambda: False),  # a real one has nothing to do with these tensors
        (nn.Module, "to", moved),
        (consissr.models.tiles, "total_memory", lambda device: 2**34),
        (consissr.data.draws.SeededDraws, "_generator", lambda draws, device: None),
        (noise, "powers_above", functools.cache(noise.powers_above.__wrapped__)),
        (consissr.data.jpeg, "_constants", functools.cache(consissr.data.jpeg._constants.__wrapped__)),
        (Tensor, "new_tensor", lambda x, data: constant(data, dtype=x.dtype).to(x.device)),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield FakeTensorMode(allow_non_fake_inputs=True)  # real ones, such as the noise schedule, are on the CPU


@contextmanager
def mixed() -> Iterator[None]:
    """`torch.autocast("cuda", torch.bfloat16)`, which turns itself off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if not torch.autocast_decrement_nesting():
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)
