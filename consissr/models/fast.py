"""What makes networks faster and smaller where no gradients are needed; results change by rounding only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from consissr.models.attention import SelfAttention
from consissr.models.vae.latents import Latents
from consissr.models.vae.strips import use_strips
from consissr.models.vae.winograd import use_winograd


def for_inference(network: nn.Module, device: str | torch.device) -> None:
    """Prepare a network that will only restore images on `device`, in place.

    On accelerators all go into channels-last order, and self-attention makes queries, keys and values in one product.
    On the CPU 3x3 convolutions may take Winograd's way, and autoencoders that have such go into that order and work in
    strips; SD2.1's UNet would be slower so (many channels on small maps), and in small networks torch's norms lose
    digits in it. In the autoencoder activations overwrite their inputs, which are fresh results of norms; in the UNet
    they must not, because its blocks share the time embedding.
    """
    on_cpu = torch.device(device).type == "cpu"
    winograd = on_cpu and use_winograd(network)
    if not on_cpu or (winograd and isinstance(network, Latents)):
        network.to(memory_format=torch.channels_last)
    if not on_cpu:
        fuse_projections(network)
    if isinstance(network, Latents):
        use_strips(network)
        for layer in network.modules():
            if isinstance(layer, nn.SiLU):
                layer.inplace = True


class FusedSelfAttention(SelfAttention):
    """Self-attention with one layer `to_qkv` in place of three; `fuse_projections` makes one of the plain form."""

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """Three times (B, N, C)."""
        return self.to_qkv(x).chunk(3, dim=-1)


@torch.no_grad()
def fuse_projections(network: nn.Module) -> int:
    """Give self-attention layers of `network` one product in place of three; how many they are."""
    found = [m for m in network.modules() if type(m) is SelfAttention and type(m.to_q) is nn.Linear]
    for layer in found:
        parts = [layer.to_q, layer.to_k, layer.to_v]
        weight, bias = torch.cat([part.weight for part in parts]), parts[0].bias is not None
        layer.to_qkv = nn.Linear(weight.shape[1], weight.shape[0], bias, device="meta")
        layer.to_qkv.weight = nn.Parameter(weight, requires_grad=False)
        if bias:
            layer.to_qkv.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
        del layer.to_q, layer.to_k, layer.to_v
        layer.__class__ = FusedSelfAttention
    return len(found)


def set_kernels(one_size: bool) -> None:
    """How GPUs compute, for the whole process: for scripts, never for libraries.

    Float32 means float32 (TF32 keeps 10 bits, too few for JPEG's coefficients); what may be coarser runs in bfloat16.
    one_size: whether shapes recur, so that it pays to try cuDNN's kernels for each.
    """
    torch.backends.cudnn.benchmark = one_size
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def compile_all(networks: Iterable[nn.Module], one_size: bool) -> None:
    """torch.compile what calling the networks computes, in place; an autoencoder's encoder and decoder one by one."""
    for network in networks:
        for part in (network.vae.encoder, network.vae.decoder) if isinstance(network, Latents) else (network,):
            compile_forward(part, one_size)


def compile_forward(network: nn.Module, one_size: bool) -> None:
    """Compile what calling `network` computes, in place, under `torch.no_grad`.

    Without `one_size` the code is made for all sizes at once. On a GPU what it launches is recorded for each size that
    is met, and replayed as a whole (CUDA graphs); a replay overwrites the last one's result, so that is copied.

    On the CPU the weights become part of the code ("freezing"), so that convolutions find them packed as they need
    them. The setting must stand while the code is made, which is at the first call with inputs of a new shape.
    """
    from torch._inductor import config
    from torch.fx.experimental import _config as shapes

    on_gpu = any(parameter.device.type == "cuda" for parameter in network.parameters())
    mode = "reduce-overhead" if on_gpu else "default"
    compiled = torch.compile(network.forward, mode=mode, dynamic=None if one_size else True)

    def replayed(*arguments: Any, **keywords: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*arguments, **keywords).clone()

    made = replayed if on_gpu else config.patch(freezing=True)(compiled)
    network.forward = made if one_size else shapes.patch(use_duck_shape=False)(made)  # a square first does not bind
