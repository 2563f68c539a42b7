"""How much memory a training run takes, estimated with networks on the meta device: weights, optimiser, activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from consissr.config.training import TrainConfig
from consissr.training.stage import Batch, Stage

GIB = 2**30


def memory(config: TrainConfig, stage: Stage) -> Iterator[str]:
    """Bytes by kind, for a GPU under bf16 autocast, or in float32 if the config says so."""
    low = config.precision != "fp32"
    trained = {id(p): p for phase in stage.phases for p in phase.parameters.values()}
    matrices = {id(p) for m in stage.networks.modules() if isinstance(m, nn.Linear | nn.Conv2d) for p in m.parameters()}
    halved = matrices if low and config.frozen_precision != "fp32" else set()
    frozen = {id(p): p for p in stage.networks.parameters() if id(p) not in trained}
    moments = sum(
        p.numel() * (2 if phase.optimizer.kind == "adamw8bit" else 8)
        for phase in stage.phases
        for p in phase.parameters.values()
    )
    if config.engine == "zero1" and config.processes:
        moments //= config.processes
    count = sum(p.numel() for p in trained.values())
    sizes = {
        "frozen weights" + (" (matrices in bf16)" if halved else ""): sum(
            p.numel() * (2 if key in halved else 4) for key, p in frozen.items()
        ),
        "trained weights, float32": 4 * count,
        "gradients, float32": 4 * count,
        "moments of the optimiser": moments,
    }
    if config.ema:
        sizes["averaged weights (EMA), float32"] = 4 * count
    yield f"{'memory per process, estimated':44s}{'GiB':>16s}"
    yield from (f"  {name:42s}{size / GIB:>16.2f}" for name, size in sizes.items())
    try:
        activation_bytes = activations(config, stage)
    except RuntimeError as error:  # an operation without a form on the meta device (NotImplementedError is one, too)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        yield f"  {'activations':42s}{'not estimated':>16s}  ({reason[:60]})"
        return
    total = sum(sizes.values()) + activation_bytes
    yield f"  {'activations':42s}{activation_bytes / GIB:>16.2f}"
    yield f"  {'sum':42s}{total / GIB:>16.2f}"
    rule = "all that autograd keeps of one micro-batch in the larger phase, in float32"
    yield f"  activations: {rule}{'; autocast to bf16 needs 0.65 to 0.85 of it' if low else ''}; buffers come on top"


class Attention(torch.autograd.Function):
    """Attention's shapes, and what its fused kernels keep: q, k, v and the result, never a matrix of all pairs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(..., L, D_v), without values."""
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """Gradients without values."""
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class FusedAttention(TorchFunctionMode):
    """Counts attention as GPUs compute it; the meta device would compute it in plain steps."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return Attention.apply(*args[:3])
        return function(*args, **(kwargs or {}))


def activations(config: TrainConfig, stage: Stage) -> int:
    """Bytes that autograd saves in the forward pass of one micro-batch on the meta device, of the larger phase."""
    side, count = config.data.crop, config.micro_batch
    image = torch.empty(count, 3, side, side, device="meta")
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    batch = Batch(image, [""] * count, generators, lq=image if stage.needs_lq else None)
    with torch.no_grad():
        stage.prepare(batch)
    own = {p.untyped_storage()._cdata for p in stage.networks.parameters()}
    largest = 0
    for phase in stage.phases:
        saved: dict[int, Tensor] = {}

        def keep(tensor: Tensor, saved: dict[int, Tensor] = saved) -> Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        for other in stage.phases:
            for parameter in other.parameters.values():
                parameter.requires_grad_(other is phase)
        with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            phase.loss(batch, config.steps)
        size = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
        largest = max(largest, size)
    return largest
