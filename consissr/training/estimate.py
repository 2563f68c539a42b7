"""How much memory a training run takes, estimated with networks on the meta device: weights, optimiser, activations."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from consissr.config.training import TrainConfig
from consissr.training.checks import launched
from consissr.training.precision import frozen_matrices
from consissr.training.stage import Batch, Stage, trained_ids

GIB = 2**30


def memory(config: TrainConfig, stage: Stage) -> Iterator[str]:
    """Bytes by kind, for a GPU under bf16 autocast, or in float32 if the config says so."""
    low = config.precision != "fp32"
    trained = trained_ids(stage)
    halved = halved_parameters(config, stage)
    frozen = {id(p): p for p in stage.networks.parameters() if id(p) not in trained}
    moments = sum(
        p.numel() * (2 if phase.optimizer.kind == "adamw8bit" else 8)
        for phase in stage.phases
        for p in phase.parameters.values()
    )
    if config.engine == "zero1":
        moments //= config.processes or launched()
    count = sum(p.numel() for phase in stage.phases for p in phase.parameters.values())
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
    rule = "all that autograd keeps of one micro-batch in the larger phase"
    yield f"  activations: {rule}, {'under autocast to bf16' if low else 'in float32'}; buffers come on top"


def halved_parameters(config: TrainConfig, stage: Stage) -> set[int]:
    """Frozen parameters that a GPU stores in bfloat16 (`precision.Frozen`), by their ids."""
    if config.precision == "fp32" or config.frozen_precision == "fp32":
        return set()
    return {id(p) for p in frozen_matrices(stage.networks, trained_ids(stage))}


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


BF16 = {F.linear, F.conv2d, F.conv_transpose2d, F.scaled_dot_product_attention, F.multi_head_attention_forward}
BF16 |= {torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm}
FP32 = {F.layer_norm, F.group_norm, F.softmax, F.normalize, F.mse_loss, F.l1_loss, torch.softmax, torch.exp, torch.sum}
FP32 |= {Tensor.softmax, Tensor.exp, Tensor.sum, Tensor.pow, Tensor.__pow__, Tensor.norm}
"""Operations that CUDA's autocast computes in bfloat16, and in float32, as far as networks and losses have them."""


class OnGpu(TorchFunctionMode):
    """Lets the meta device keep what a GPU would: of attention as above, and `low`: under autocast to bfloat16.

    halved: frozen parameters that are stored in bfloat16 already. (The meta device has no autocast of its own.)
    """

    def __init__(self, low: bool, halved: set[int]) -> None:
        super().__init__()
        self.low, self.halved = low, halved
        self.copies: dict[int, Tensor] = {}
        """Parameters in bfloat16, by their id; autocast makes such copies once."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        dtype = torch.bfloat16 if function in BF16 else torch.float32 if function in FP32 else None
        kwargs = kwargs or {}
        if self.low and dtype is not None:
            args = tuple(self.cast(value, dtype) for value in args)
            kwargs = {name: self.cast(value, dtype) for name, value in kwargs.items()}
        if function is F.scaled_dot_product_attention:
            return Attention.apply(*args[:3])
        return function(*args, **kwargs)

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """`value` as autocast hands it on."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(dtype)
        return self.copies.setdefault(id(value), value.to(dtype))

    def stored(self) -> set[int]:
        """Storages of copies that are the parameters themselves."""
        return {copy.untyped_storage()._cdata for key, copy in self.copies.items() if key in self.halved}


def activations(config: TrainConfig, stage: Stage) -> int:
    """Bytes that autograd saves in the forward pass of one micro-batch on the meta device, of the larger phase."""
    side, count = config.data.crop, config.micro_batch
    image = torch.empty(count, 3, side, side, device="meta")
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    batch = Batch(image, [""] * count, generators, lq=image if stage.needs_lq else None)
    gpu = OnGpu(config.precision != "fp32", halved_parameters(config, stage))
    with gpu, torch.no_grad():
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
        with gpu, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            phase.loss(batch, config.steps)
        size = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own | gpu.stored())
        largest = max(largest, size)
        gpu.copies.clear()
    return largest
