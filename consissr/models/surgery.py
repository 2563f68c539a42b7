"""Our transformer blocks in a diffusers UNet or ControlNet: put in, named, and told apart from what was loaded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from consissr.config.model import ModelConfig
from consissr.errors import UserError
from consissr.models.ablations import IPAdapter, ReleasedAdapter, SeparateAttention
from consissr.models.attention import (
    CrossAttention,
    HybridPromptAdapter,
    SelfAttention,
    TransformerBlock,
    TransposedAttention,
    halved,
)


def replace_blocks(model: nn.Module, config: ModelConfig) -> list[str]:
    """Replace every transformer block of a diffusers UNet or ControlNet in place; returns `added_parameters(model)`."""
    number = 0
    for level, block in levels(model):
        side = (config.position_embedding, config.position_embedding)
        for _ in range(level):
            side = halved(side)
        for transformer in getattr(block, "attentions", None) or ():
            made = []
            for source in transformer.transformer_blocks:
                made.append(our_block(source, config, side[0], number))
                number += 1
            transformer.transformer_blocks = nn.ModuleList(made)
    return added_parameters(model)


def our_block(source: nn.Module, config: ModelConfig, side: int, number: int) -> TransformerBlock:
    """The block that `config` describes around the layers of diffusers' `source`, by its `number` in the network."""
    check_source(source)
    several = config.image_tokens == "patches"
    attn1, attn2 = SelfAttention(source.attn1, side), cross_attention(source.attn2, config, number)
    attnT = attnI = None
    if config.transposed_attention:
        attnT = TransposedAttention(source.norm1.weight.numel(), attn1.heads, source.attn1.to_q.weight)
    if config.image_prompt == "hpa_separate":
        attnI = SeparateAttention(source.attn2, source.norm2, several)
    return TransformerBlock(source, attn1, attn2, attnT, attnI, not several)


def cross_attention(source: nn.Module, config: ModelConfig, number: int) -> CrossAttention:
    """The cross-attention that `config` describes, around the layers of diffusers' `source`."""
    if config.image_prompt == "ip_adapter":
        return IPAdapter(source, number, config.image_tokens == "patches")
    if config.image_prompt != "hpa":
        return CrossAttention(source, number)
    return HybridPromptAdapter(source, number) if config.image_kv == "shared" else ReleasedAdapter(source, number)


def check_source(block: nn.Module) -> None:
    """Raise UserError for a transformer block that is not of Stable Diffusion's kind."""
    if getattr(block, "norm_type", None) != "layer_norm" or block.only_cross_attention or block.attn2 is None:
        raise UserError(
            "the base's transformer blocks are not Stable Diffusion's (self, cross, feed-forward): use SD2.1-base"
        )


def levels(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Every block of a diffusers UNet or ControlNet with its level (0 at the latent's size, +1 per halving)."""
    deepest = len(model.down_blocks) - 1
    yield from enumerate(model.down_blocks)
    yield deepest, model.mid_block
    for index, block in enumerate(getattr(model, "up_blocks", ())):
        yield deepest - index, block


def our_blocks(model: nn.Module) -> Iterator[tuple[str, TransformerBlock]]:
    """The blocks that `replace_blocks` put into `model`, with their names."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, TransformerBlock))


def takes_image(model: nn.Module) -> bool:
    """Whether any block of `model` attends to image tokens."""
    return any(block.needs_image for _, block in our_blocks(model))


def added_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that `replace_blocks` created in `model`."""
    return [f"{name}.{parameter}" for name, block in our_blocks(model) for parameter in block.added]


def trainable_parameters(model: nn.Module) -> list[str]:
    """Those of `added_parameters` that training changes: not the release's copies of the original keys and values."""
    frozen = {
        f"{name}.attn2.{layer}.weight"
        for name, block in our_blocks(model)
        if isinstance(block.attn2, ReleasedAdapter)
        for layer in ("to_k_ip", "to_v_ip")
    }
    return [name for name in added_parameters(model) if name not in frozen]


COPIES = {"attn2.to_k_ip": "attn2.to_k", "attn2.to_v_ip": "attn2.to_v", "attnI.to_q": "attn2.to_q"}
"""Layers of a block that start as copies of the text's. (IP-Adapter's values start at zero here.)"""


@torch.no_grad()
def renew_copies(model: nn.Module, fresh: set[str]) -> None:
    """Copies that no file held (names in `fresh`) take what the text's layers, which they copy, hold now; in place."""
    for name, block in our_blocks(model):
        zero = "attn2.to_v_ip" if isinstance(block.attn2, IPAdapter) else ""
        for copy, source in COPIES.items():
            if f"{name}.{copy}.weight" in fresh and copy != zero:
                block.get_submodule(copy).load_state_dict(block.get_submodule(source).state_dict())
