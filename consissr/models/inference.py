"""What makes networks faster and smaller where no gradients are needed; results change by rounding only."""

from __future__ import annotations

import torch
from torch import nn

from consissr.models.latents import Latents
from consissr.models.winograd import use_winograd


def for_inference(network: nn.Module) -> None:
    """Prepare a network that only restores images, in place.

    3x3 convolutions may take Winograd's way; networks that have such, and all on accelerators, go into channels-last
    order. In the autoencoder activations overwrite their inputs, which are fresh results of norms; in the UNet they
    must not, because its blocks share the time embedding.
    """
    accelerated = any(parameter.device.type != "cpu" for parameter in network.parameters())
    if use_winograd(network) or accelerated:
        network.to(memory_format=torch.channels_last)
    if isinstance(network, Latents):
        for layer in network.modules():
            if isinstance(layer, nn.SiLU):
                layer.inplace = True
