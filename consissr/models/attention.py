"""Transformer blocks: diffusers' own sub-modules, plus what ConsisSR adds (Sec. 3.3, Fig. 5).

`replace_blocks` swaps every transformer block of a diffusers UNet or ControlNet for `TransformerBlock`, which keeps
the loaded layers and their names, and creates parameters only for features that are on:

    attn1.position_emb               learned absolute positions added to queries and keys of the self-attention
    normT, attnT                     transposed (channel-wise) self-attention
    attn2.to_out_ip, to_{k,v}_ip     image branch of the cross-attention
    attnI                            image cross-attention as a layer of its own ('hpa_separate')

Every addition starts as an exact no-op. The image tokens and the latent's size reach the blocks through diffusers'
`cross_attention_kwargs`, as {"image": (B, N, D) or None, "size": (h, w)}: beside the text, never concatenated to it.
What depends on text or image tokens alone can be computed before, once for all steps: `Denoiser.prepare` hands it over
as {"kept": {name: tensor}}, under names that begin with "text" or "image".
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consissr.config.model import ModelConfig
from consissr.errors import UserError


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d)."""
    return x.view(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def halved(size: tuple[int, int]) -> tuple[int, int]:
    """Size of a map after one stride-2 convolution with padding 1."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def map_size(latent: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Height and width of the map with `tokens` positions inside a network whose input is `latent` (h, w)."""
    size = latent
    while size[0] * size[1] > tokens:
        size = halved(size)
    if size[0] * size[1] != tokens:
        raise ValueError(f"no level of a {latent[0]}x{latent[1]} latent has {tokens} positions")
    return size


class SelfAttention(nn.Module):
    """Spatial self-attention; `side` > 0 adds learned positions, made for a side x side map and shared by all heads.

    softmax((q + p)(k + p)^T / sqrt(d)) v. Other map sizes get p by bicubic interpolation.
    """

    def __init__(self, source: nn.Module, side: int) -> None:
        super().__init__()
        self.heads: int = source.heads
        self.side = side
        self.to_q, self.to_k, self.to_v, self.to_out = source.to_q, source.to_k, source.to_v, source.to_out
        weight = source.to_q.weight
        zeros = weight.new_zeros(side * side, weight.shape[0] // self.heads)
        self.position_emb = nn.Parameter(zeros) if side else None

    def positions(self, size: tuple[int, int]) -> Tensor:
        """Position embedding of an h x w map, (h * w, d); the parameter itself at the size it was made for."""
        if size == (self.side, self.side):
            return self.position_emb
        grid = self.position_emb.T.reshape(1, -1, self.side, self.side)
        return F.interpolate(grid, size=size, mode="bicubic", align_corners=False).flatten(2)[0].T

    def forward(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Attend within tokens `x` (B, h * w, C) of a map of `size` (h, w); the size is unused without positions."""
        q = split_heads(self.to_q(x), self.heads)
        k = split_heads(self.to_k(x), self.heads)
        v = split_heads(self.to_v(x), self.heads)
        if self.position_emb is not None:
            p = self.positions(size).to(q.dtype)
            q, k = q + p, k + p
        return self.to_out[1](self.to_out[0](merge_heads(F.scaled_dot_product_attention(q, k, v))))


class TransposedAttention(nn.Module):
    """Attention between the channels of each head: softmax(q k^T / sqrt(h w)) v with q, k, v (d, h w).

    After Restormer, without its normalisation and temperature; the output layer starts at zero.
    """

    def __init__(self, dim: int, heads: int, like: Tensor) -> None:
        super().__init__()
        kind = {"device": like.device, "dtype": like.dtype}
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False, **kind)
        self.qkv_dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=False, **kind)
        self.to_out = nn.ModuleList([zeroed(nn.Linear(dim, dim, **kind))])

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens `x` (B, h * w, C) of a map of `size` (h, w) -> the same shape."""
        batch, tokens, dim = x.shape
        image = x.transpose(1, 2).reshape(batch, dim, *size)
        qkv = self.qkv_dwconv(self.to_qkv(image)).reshape(batch, 3, self.heads, dim // self.heads, tokens)
        q, k, v = qkv.unbind(1)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](out.reshape(batch, dim, tokens).transpose(1, 2))


class CrossAttention(nn.Module):
    """Cross-attention to text, with a decoupled image branch added per head before the heads merge.

    'hpa': text + to_out_ip(image), the image attended with the text's keys and values (`shared`) or with `separate`
    ones; to_out_ip is one d x d layer for all heads and starts at zero. 'ip_adapter': own keys and values without an
    output layer; the values start at zero.
    """

    def __init__(self, source: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.heads: int = source.heads
        self.place = 0  # among the layers of its kind; Denoiser numbers them
        self.to_q, self.to_k, self.to_v, self.to_out = source.to_q, source.to_k, source.to_v, source.to_out
        self.image_prompt = config.image_prompt
        adapter = config.image_prompt == "ip_adapter"
        self.separate = adapter or (config.image_prompt == "hpa" and config.image_kv == "separate")
        self.to_k_ip = self.to_v_ip = self.to_out_ip = None
        if self.separate and not (adapter and config.image_tokens == "pooled"):
            self.to_k_ip = deepcopy(self.to_k)
        if self.separate:
            self.to_v_ip = zeroed(deepcopy(self.to_v)) if adapter else deepcopy(self.to_v)
        if config.image_prompt == "hpa":
            weight = self.to_q.weight
            width = weight.shape[0] // self.heads
            self.to_out_ip = nn.ModuleList([zeroed(nn.Linear(width, width, device=weight.device, dtype=weight.dtype))])

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None, kept: dict[str, Tensor] | None = None) -> Tensor:
        """Tokens `x` (B, h * w, C), `text` (B, L, D), `image` (B, N, D) or None -> (B, h * w, C)."""
        kept = kept or {}
        q = None if self.is_constant(text, image) else split_heads(self.to_q(x), self.heads)
        known = kept.get(f"text{self.place}")
        k, out = self.text_parts(text) if known is None else known.unbind(1)
        if text.shape[1] > 1:
            out = F.scaled_dot_product_attention(q, k, out)
        if self.image_prompt in ("hpa", "ip_adapter"):
            known = kept.get(f"image{self.place}")
            parts = self.image_parts(image) if known is None else known.unbind(1)
            out = out + self.image_branch(q, parts)
        return self.to_out[1](self.to_out[0](merge_heads(out)))

    def is_constant(self, text: Tensor, image: Tensor | None) -> bool:
        """Whether the result is one vector (B, 1, C) for all positions, whatever is there: single tokens only."""
        return text.shape[1] == 1 and (self.image_prompt not in ("hpa", "ip_adapter") or image.shape[1] == 1)

    def text_parts(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `text` (B, L, D), each (B, heads, L, d)."""
        return split_heads(self.to_k(text), self.heads), split_heads(self.to_v(text), self.heads)

    def image_parts(self, image: Tensor) -> tuple[Tensor, ...]:
        """Of image tokens (B, N, D): keys and values (B, heads, N, d), or for one token what it adds, (B, heads, 1, d).

        The attention to a single token is 1 everywhere, so it needs neither queries nor keys: its value is the result.
        """
        to_k, to_v = (self.to_k_ip, self.to_v_ip) if self.separate else (self.to_k, self.to_v)
        v = split_heads(to_v(image), self.heads)
        if image.shape[1] > 1:
            return split_heads(to_k(image), self.heads), v
        return (v if self.to_out_ip is None else self.to_out_ip[0](v),)

    def image_branch(self, q: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor:
        """What the image tokens add, (B, heads, h * w or 1, d), from queries and `image_parts`."""
        if len(parts) == 1:
            return parts[0]
        out = F.scaled_dot_product_attention(q, *parts)
        return out if self.to_out_ip is None else self.to_out_ip[0](out)


class SeparateAttention(nn.Module):
    """Image cross-attention as a layer of its own ('hpa_separate', Table 3), output layer at zero.

    Own norm, queries copied from the text's layer, keys and values the text's own (`shared`, handed over at each call)
    or copies (`separate`). For a pooled token the layer is its value: no norm, queries or keys exist.
    """

    def __init__(self, source: nn.Module, norm: nn.LayerNorm, config: ModelConfig) -> None:
        super().__init__()
        self.heads: int = source.heads
        several = config.image_tokens == "patches"
        separate = config.image_kv == "separate"
        self.norm = fresh_norm(norm) if several else None
        self.to_q = deepcopy(source.to_q) if several else None
        self.to_k = deepcopy(source.to_k) if separate and several else None
        self.to_v = deepcopy(source.to_v) if separate else None
        self.to_out = nn.ModuleList([zeroed(deepcopy(source.to_out[0]))])

    def forward(self, x: Tensor, image: Tensor, text_layer: CrossAttention) -> Tensor:
        """What tokens `x` (B, h * w, C) get from `image` (B, N, D): (B, h * w or 1, C)."""
        layer = text_layer if self.to_v is None else self
        v = split_heads(layer.to_v(image), self.heads)
        if self.to_q is not None:
            q = split_heads(self.to_q(self.norm(x)), self.heads)
            v = F.scaled_dot_product_attention(q, split_heads(layer.to_k(image), self.heads), v)
        return self.to_out[0](merge_heads(v))


class TransformerBlock(nn.Module):
    """x += attn1(norm1 x); x += attnT(normT x); x += attn2(norm2 x); x += attnI(x); x += ff(norm3 x).

    Takes the place, the layers and the calling convention of a diffusers `BasicTransformerBlock`.
    """

    def __init__(self, source: nn.Module, config: ModelConfig, side: int) -> None:
        super().__init__()
        check_source(source)
        loaded = set(source.state_dict())
        self.norm1, self.norm2, self.norm3, self.ff = source.norm1, source.norm2, source.norm3, source.ff
        self.attn1 = SelfAttention(source.attn1, side)
        self.attn2 = CrossAttention(source.attn2, config)
        self.normT = self.attnT = self.attnI = None
        if config.transposed_attention:
            self.normT = fresh_norm(source.norm1)
            self.attnT = TransposedAttention(source.norm1.weight.numel(), self.attn1.heads, source.attn1.to_q.weight)
        if config.image_prompt == "hpa_separate":
            self.attnI = SeparateAttention(source.attn2, source.norm2, config)
        self.needs_size = bool(side) or config.transposed_attention
        self.needs_image = config.image_prompt != "none"
        self.one_token = config.image_tokens == "pooled"
        self.added = tuple(name for name in self.state_dict() if name not in loaded)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: None = None,
        timestep: None = None,
        cross_attention_kwargs: dict | None = None,
        class_labels: None = None,
    ) -> Tensor:
        """Tokens (B, h * w, C) with text (B, L, D) as `encoder_hidden_states` -> (B, h * w, C)."""
        if attention_mask is not None or encoder_attention_mask is not None:
            raise ValueError("attention masks are not supported")
        context = cross_attention_kwargs or {}
        x, image, size = hidden_states, context.get("image"), None
        if self.needs_image and image is None:
            raise ValueError("this network attends to image tokens: give them in the condition")
        if self.needs_image and self.one_token and image.shape[1] != 1:
            raise ValueError(f"this network was made for one pooled image token, not {image.shape[1]}")
        if self.needs_size:
            if "size" not in context:
                raise ValueError("this network needs the latent's size: call it through the denoiser")
            size = map_size(context["size"], x.shape[1])
        x = self.attn1(self.norm1(x), size) + x
        if self.attnT is not None:
            x = self.attnT(self.normT(x), size) + x
        y = x if self.attn2.is_constant(encoder_hidden_states, image) else self.norm2(x)
        x = self.attn2(y, encoder_hidden_states, image, context.get("kept")) + x
        if self.attnI is not None:
            x = self.attnI(x, image, self.attn2) + x
        return self.ff(self.norm3(x)) + x


def zeroed(module: nn.Module) -> nn.Module:
    """`module` with all parameters set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def fresh_norm(like: nn.LayerNorm) -> nn.LayerNorm:
    """A new LayerNorm of the same shape, device and type."""
    return nn.LayerNorm(like.normalized_shape, like.eps, device=like.weight.device, dtype=like.weight.dtype)


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


def replace_blocks(model: nn.Module, config: ModelConfig) -> list[str]:
    """Replace every transformer block of a diffusers UNet or ControlNet in place; returns `added_parameters(model)`."""
    for level, block in levels(model):
        side = (config.position_embedding, config.position_embedding)
        for _ in range(level):
            side = halved(side)
        for transformer in getattr(block, "attentions", None) or ():
            transformer.transformer_blocks = nn.ModuleList(
                TransformerBlock(source, config, side[0]) for source in transformer.transformer_blocks
            )
    return added_parameters(model)


def added_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that `replace_blocks` created in `model`."""
    blocks = ((name, m) for name, m in model.named_modules() if isinstance(m, TransformerBlock))
    return [f"{name}.{parameter}" for name, block in blocks for parameter in block.added]


def trainable_parameters(model: nn.Module) -> list[str]:
    """Those of `added_parameters` that training changes: not HPA's copies of the original keys and values."""
    frozen = {
        f"{name}.attn2.{layer}.weight"
        for name, block in model.named_modules()
        if isinstance(block, TransformerBlock) and block.attn2.image_prompt == "hpa"
        for layer in ("to_k_ip", "to_v_ip")
    }
    return [name for name in added_parameters(model) if name not in frozen]


COPIES = {"attn2.to_k_ip": "attn2.to_k", "attn2.to_v_ip": "attn2.to_v", "attnI.to_q": "attn2.to_q",
          "attnI.to_k": "attn2.to_k", "attnI.to_v": "attn2.to_v"}  # fmt: skip
"""Layers of a block that start as copies of the text's. (IP-Adapter's values start at zero.)"""


@torch.no_grad()
def renew_copies(model: nn.Module, fresh: set[str]) -> None:
    """Those of `added_parameters` in `fresh` that start as copies take what the text's layers hold now, in place."""
    for name, block in model.named_modules():
        if isinstance(block, TransformerBlock):
            zero = "attn2.to_v_ip" if block.attn2.image_prompt == "ip_adapter" else ""
            for copy, source in COPIES.items():
                if f"{name}.{copy}.weight" in fresh and copy != zero:
                    block.get_submodule(copy).load_state_dict(block.get_submodule(source).state_dict())


def has_blocks(model: nn.Module) -> bool:
    """Whether `replace_blocks` has been applied to `model`."""
    return any(isinstance(m, TransformerBlock) for m in model.modules())


def takes_image(model: nn.Module) -> bool:
    """Whether any block of `model` attends to image tokens."""
    return any(isinstance(m, TransformerBlock) and m.needs_image for m in model.modules())
