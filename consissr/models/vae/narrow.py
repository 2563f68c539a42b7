"""A narrower decoder for the same latents (ours, in neither paper): fewer operations, and a different model once tuned.

It begins with the full decoder's strongest channels. A channel is the same one in every layer of its width, because
layers add up to one stream; norms work in groups, so every group keeps its share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from consissr.errors import UserError


def narrow_widths(widths: list[int], factor: float, groups: int) -> dict[int, int]:
    """Channels by width times `factor`, whole groups. UserError for a factor outside (0, 1], or if two become one."""
    if not 0 < factor <= 1:
        raise UserError(f"a decoder's width factor is {factor:g}: use a number above 0, at most 1")
    narrow = {width: max(1, round(factor * width / groups)) * groups for width in widths}
    if len(set(narrow.values())) != len(narrow):
        raise UserError(
            f"widths {list(narrow)} narrowed by {factor:g} are {list(narrow.values())}: use a larger factor"
        )
    return narrow


def empty_decoder(config: Any, factor: float) -> nn.Module:
    """An untrained decoder of diffusers' class, `factor` times as wide as an autoencoder's `config` says."""
    from diffusers.models.autoencoders.vae import Decoder

    narrow = narrow_widths(config.block_out_channels, factor, config.norm_num_groups)
    names = ("up_block_types", "layers_per_block", "norm_num_groups", "act_fn", "mid_block_add_attention")
    return Decoder(
        in_channels=config.latent_channels,
        out_channels=config.out_channels,
        block_out_channels=[narrow[width] for width in config.block_out_channels],
        **{name: config[name] for name in names},
    )


@torch.no_grad()
def fill(narrow: nn.Module, full: nn.Module, widths: dict[int, int], groups: int) -> None:
    """Give `narrow` the weights of the full decoder's strongest channels; `widths`: full -> narrow."""
    kept = {width: strongest(full, width, count, groups) for width, count in widths.items()}
    weights = dict(full.named_parameters())
    for name, small in narrow.named_parameters():
        large = weights[name]
        for dim, (few, many) in enumerate(zip(small.shape, large.shape, strict=True)):
            if few != many:
                large = large.index_select(dim, kept[many])
        small.copy_(large)


def strongest(decoder: nn.Module, width: int, count: int, groups: int) -> Tensor:
    """`count` of `width` channels, equally many of every group: those whose weights in all layers are largest."""
    layers = [p.flatten(1) for p in decoder.parameters() if p.ndim > 1 and len(p) == width]
    strengths = sum(layer.norm(dim=1) / layer.norm() for layer in layers).view(groups, -1)
    best = strengths.topk(count // groups, dim=1).indices.sort(dim=1).values
    return (best + torch.arange(groups, device=best.device)[:, None] * strengths.shape[1]).flatten()
