"""A narrower decoder for the same latents: faster, and after training (stage 'deft') a different model.

Its weights begin as those of the full decoder's strongest channels. Normalisation works in groups of channels, so as
many are kept in every group: `factor` of each, at least one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from consissr.errors import UserError
from consissr.models.vae.latents import Latents

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

WIDTH = "decoder_width"
"""Entry of vae/config.json: the factor of a narrow decoder; absent or 1 for a full one."""


def narrow_widths(widths: list[int], factor: float, groups: int) -> list[int]:
    """Channels per resolution times `factor`, rounded to whole groups. UserError if two widths become one."""
    if not 0 < factor <= 1:
        raise UserError(f"a decoder's width factor is {factor:g}: use a number above 0, at most 1")
    narrow = [max(1, round(factor * width / groups)) * groups for width in widths]
    if len(set(narrow)) != len(set(widths)):
        raise UserError(f"a decoder of widths {widths} narrowed by {factor:g} has {narrow}: use a larger factor")
    return narrow


def build_decoder(vae: AutoencoderKL, factor: float) -> nn.Module:
    """An untrained decoder of diffusers' class, `factor` times as wide as the one that `vae`'s configuration names."""
    from diffusers.models.autoencoders.vae import Decoder

    c = vae.config
    return Decoder(
        in_channels=c.latent_channels,
        out_channels=c.out_channels,
        up_block_types=c.up_block_types,
        block_out_channels=narrow_widths(list(c.block_out_channels), factor, c.norm_num_groups),
        layers_per_block=c.layers_per_block,
        norm_num_groups=c.norm_num_groups,
        act_fn=c.act_fn,
        mid_block_add_attention=c.mid_block_add_attention,
    )


def with_decoder(vae: AutoencoderKL, factor: float) -> AutoencoderKL:
    """`vae` with an untrained narrow decoder, said so in its configuration; in place."""
    if factor != 1:
        vae.decoder = build_decoder(vae, factor)
        vae.register_to_config(**{WIDTH: factor})
    return vae


def empty_latents(settings: dict[str, Any]) -> Latents:
    """An untrained autoencoder of the sizes in a `vae/config.json`."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_config({n: value for n, value in settings.items() if n not in ("linear_path", WIDTH)})
    vae.register_to_config(linear_path=settings.get("linear_path", False))
    return Latents(with_decoder(vae, settings.get(WIDTH, 1)))


def narrow_decoder(latents: Latents, factor: float) -> Latents:
    """The same autoencoder with a narrow decoder that starts from the full one's strongest channels.

    The encoder is shared with `latents`, which stay as they are. UserError for a factor outside (0, 1], or if the
    decoder is narrow already.
    """
    given: dict[str, Any] = dict(latents.vae.config)
    if given.get(WIDTH, 1) != 1:
        raise UserError(f"this decoder is narrow already (factor {given[WIDTH]:g}): start from the full one")
    like = latents.vae.decoder.conv_in.weight
    with like.device:
        made = empty_latents(given | {WIDTH: factor})
    for name in ("encoder", "quant_conv", "post_quant_conv"):
        setattr(made.vae, name, getattr(latents.vae, name))
    made.linear = latents.linear
    if factor == 1:
        made.vae.decoder.load_state_dict(latents.vae.decoder.state_dict())
    else:
        Selection(latents.vae.config.norm_num_groups).decoder(made.vae.decoder, latents.vae.decoder)
    made.vae.decoder.to(like.device, like.dtype).train(latents.vae.decoder.training)
    return made


class Selection:
    """Copies the strongest channels of a decoder's layers to a narrower decoder's.

    A method takes (narrow layer, full layer, channels kept of its input) and gives the channels kept of its output.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def strongest(self, layer: nn.Module, count: int) -> Tensor:
        """The `count` output channels of largest weight norm, equally many of every group, in order."""
        norms = layer.weight.detach().flatten(1).norm(dim=1).view(self.groups, -1)
        best = norms.topk(count // self.groups, dim=1).indices.sort(dim=1).values
        first = torch.arange(self.groups, device=best.device)[:, None] * norms.shape[1]
        return (first + best).flatten()

    @torch.no_grad()
    def decoder(self, narrow: nn.Module, full: nn.Module) -> None:
        """All layers, from the latent to the image."""
        kept = self.strongest(full.conv_in, narrow.conv_in.out_channels)
        copy(narrow.conv_in, full.conv_in, kept, slice(None))
        kept = self.block(narrow.mid_block, full.mid_block, kept)
        for small, large in zip(narrow.up_blocks, full.up_blocks, strict=True):
            kept = self.block(small, large, kept)
        copy(narrow.conv_norm_out, full.conv_norm_out, kept)
        copy(narrow.conv_out, full.conv_out, slice(None), kept)

    def block(self, narrow: nn.Module, full: nn.Module, kept: Tensor) -> Tensor:
        """A middle or upward block: residual blocks, with attention between them, then a larger map."""
        attentions = getattr(full, "attentions", None) or []
        for i, (small, large) in enumerate(zip(narrow.resnets, full.resnets, strict=True)):
            kept = self.residual(small, large, kept)
            if i < len(attentions) and attentions[i] is not None:
                self.attention(narrow.attentions[i], attentions[i], kept)
        for small, large in zip(
            getattr(narrow, "upsamplers", None) or [], getattr(full, "upsamplers", None) or [], strict=True
        ):
            following = self.strongest(large.conv, small.conv.out_channels)
            copy(small.conv, large.conv, following, kept)
            kept = following
        return kept

    def residual(self, narrow: nn.Module, full: nn.Module, kept: Tensor) -> Tensor:
        """Without a shortcut layer the output's channels are the input's."""
        inner, following = self.strongest(full.conv1, narrow.conv1.out_channels), kept
        if full.conv_shortcut is not None:
            following = self.strongest(full.conv2, narrow.conv2.out_channels)
            copy(narrow.conv_shortcut, full.conv_shortcut, following, kept)
        copy(narrow.norm1, full.norm1, kept)
        copy(narrow.conv1, full.conv1, inner, kept)
        copy(narrow.norm2, full.norm2, inner)
        copy(narrow.conv2, full.conv2, following, inner)
        return following

    def attention(self, narrow: nn.Module, full: nn.Module, kept: Tensor) -> None:
        """Channels stay what they are."""
        copy(narrow.group_norm, full.group_norm, kept)
        for name in ("to_q", "to_k", "to_v"):
            copy(getattr(narrow, name), getattr(full, name), kept, kept)
        copy(narrow.to_out[0], full.to_out[0], kept, kept)


def copy(narrow: nn.Module, full: nn.Module, rows: Tensor | slice, columns: Tensor | slice | None = None) -> None:
    """Weights and biases of the given output and input channels."""
    weight = full.weight[rows]
    narrow.weight.copy_(weight if columns is None else weight[:, columns])
    if full.bias is not None:
        narrow.bias.copy_(full.bias[rows])
