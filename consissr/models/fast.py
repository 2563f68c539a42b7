"""What makes networks faster and smaller where no gradients are needed; results change by rounding only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from consissr.models.vae.latents import Latents
from consissr.models.vae.strips import use_strips
from consissr.models.vae.winograd import use_winograd


def for_inference(network: nn.Module, device: str | torch.device) -> None:
    """Prepare a network that will only restore images on `device`, in place.

    On accelerators all go into channels-last order. On the CPU 3x3 convolutions may take Winograd's way, and
    autoencoders that have such go into that order and work in strips; SD2.1's UNet would be slower so (many channels on
    small maps), and in small networks torch's norms lose digits in it. In the autoencoder activations overwrite their
    inputs, which are fresh results of norms; in the UNet they must not, because its blocks share the time embedding.
    """
    winograd = use_winograd(network)
    if torch.device(device).type != "cpu" or (winograd and isinstance(network, Latents)):
        network.to(memory_format=torch.channels_last)
    if isinstance(network, Latents):
        use_strips(network)
        for layer in network.modules():
            if isinstance(layer, nn.SiLU):
                layer.inplace = True


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

    On the CPU the weights become part of the code ("freezing"), so that convolutions find them packed as they need
    them. The setting must stand while the code is made, which is at the first call with inputs of a new shape.
    """
    from torch._inductor import config

    compiled = torch.compile(network.forward, dynamic=None if one_size else True)
    on_cpu = all(parameter.device.type == "cpu" for parameter in network.parameters())
    network.forward = config.patch(freezing=True)(compiled) if on_cpu else compiled
