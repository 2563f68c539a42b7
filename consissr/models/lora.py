"""Low-rank adapters (LoRA, Hu et al. 2022) of the UNet's attention layers: W + B A with A (r, in) and B (out, r).

`peft` puts them in for training; what is stored has diffusers' names, so that diffusers reads it, too, and is merged
into the weights where a model is only run.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from consissr.errors import UserError

LAYERS = r".*\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)"
"""Which layers have adapters: those of Stable Diffusion's self- and cross-attention, not those that a model adds."""
TRAINED = re.compile(r"(.*)\.lora_(A|B)\.default\.weight")
"""peft's names of the adapters' parameters."""


def add_lora(unet: nn.Module, rank: int, stored: dict[str, Tensor] | None = None) -> None:
    """Give `unet` adapters of `rank`, in place: `stored` ones (diffusers' format), or new ones, which change nothing.

    Raises UserError without peft, or where `stored` are of other layers or another rank.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"model.unet_lora={rank} needs peft: `pip install peft`, or set model.unet_lora=0") from error
    settings = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LAYERS)
    inject_adapter_in_model(settings, unet)
    if stored is None:
        return
    own = {name: value for name, value in unet.named_parameters() if TRAINED.fullmatch(name)}
    given = {diffusers_name(name): name for name in own}
    if given.keys() != stored.keys() or any(own[given[name]].shape != value.shape for name, value in stored.items()):
        raise UserError(f"the adapters that are stored are not those of model.unet_lora={rank} on this base")
    with torch.no_grad():
        for name, value in stored.items():
            own[given[name]].copy_(value)


def diffusers_name(name: str) -> str:
    """What diffusers calls a parameter of an adapter."""
    layer, which = TRAINED.fullmatch(name).groups()
    return f"unet.{layer}.lora.{'down' if which == 'A' else 'up'}.weight"


def lora_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in `unet`; {} where there are none."""
    return {name: p for name, p in unet.named_parameters() if TRAINED.fullmatch(name)}


def lora_state(unet: nn.Module) -> dict[str, Tensor]:
    """The adapters in diffusers' format."""
    return {diffusers_name(name): p.detach() for name, p in lora_parameters(unet).items()}


@torch.no_grad()
def merge_lora(unet: nn.Module, stored: dict[str, Tensor]) -> None:
    """Add B A to the weights of `unet`, in place. Raises UserError where a layer is missing or of another size."""
    for name, down in stored.items():
        if not name.endswith(".lora.down.weight"):
            continue
        layer = name.removeprefix("unet.").removesuffix(".lora.down.weight")
        up = stored.get(f"unet.{layer}.lora.up.weight")
        try:
            weight = unet.get_parameter(f"{layer}.weight")
            weight.copy_(weight.float() + up.float() @ down.float())
        except (AttributeError, RuntimeError) as error:
            raise UserError(f"the adapter of {layer} does not fit this base's UNet: is it another base?") from error
