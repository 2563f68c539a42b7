"""The transformer block of ConsisSR (Sec. 3.3, Fig. 5), layer by layer; what the paper leaves open is the release's.

A class that stands for a module of diffusers (`source`) takes over its layers, under their names. What is added:

    attn1.position_emb     learned absolute positions, added to queries and keys of the self-attention
    normT, attnT           transposed (channel-wise) self-attention
    attn2.to_out_ip        the hybrid prompt adapter's zero-initialised linear layer
    attnI                  image cross-attention as a layer of its own (an ablation: ablations.py)

Every addition starts as an exact no-op. `surgery.py` puts these blocks into a UNet or ControlNet; `cached.py` has the
cross-attention's fast form, for many calls with the same prompts.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from consissr.models.cached import CachedAttention


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d)."""
    return x.view(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head: q (B, heads, N, d), k and v (B, heads, L, d) -> (B, heads, N, d)."""
    return F.scaled_dot_product_attention(q, k, v)


class CrossAttention(nn.Module):
    """Stable Diffusion's cross-attention: the latent's tokens attend to the text prompt.

    number: the layer's place in its network, by which `cached.py` keeps its keys and values.
    """

    reads_image = False

    def __init__(self, source: nn.Module, number: int) -> None:
        super().__init__()
        self.heads: int = source.heads
        self.number = number
        self.to_q, self.to_k, self.to_v, self.to_out = source.to_q, source.to_k, source.to_v, source.to_out

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        """Tokens `x` (B, N, C) and prompt embeddings `text` (B, L, D) -> (B, N, C)."""
        return self.output(attention(self.queries(x), *self.keys_values(text)))

    def queries(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, d)."""
        return split_heads(self.to_q(x), self.heads)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of prompt tokens (B, L, D), each (B, heads, L, d)."""
        return split_heads(self.to_k(tokens), self.heads), split_heads(self.to_v(tokens), self.heads)

    def output(self, x: Tensor) -> Tensor:
        """(B, heads, N, d) -> (B, N, C)."""
        return self.to_out[1](self.to_out[0](merge_heads(x)))


class HybridPromptAdapter(CrossAttention):
    """HPA (Sec. 3.3, ConsisSR): the same queries attend to the text and to the low-quality image, decoupled.

    Paper: both prompts pass "the original linear layers" for keys and values, which stay fixed; the image branch is
    added to the text branch "after passing through a trainable zero-initialized linear layer", `to_out_ip`.
    Release: that layer is d x d, one per block, applied to each head before the heads merge; there is one image token,
    attention to which is 1 whatever the query, so that the branch adds one vector everywhere.
    Ours: any number of image tokens.
    """

    reads_image = True

    def __init__(self, source: nn.Module, number: int) -> None:
        super().__init__(source, number)
        weight = self.to_q.weight
        d = weight.shape[0] // self.heads
        self.to_out_ip = nn.ModuleList([zeroed(nn.Linear(d, d, device=weight.device, dtype=weight.dtype))])

    def forward(self, x: Tensor, text: Tensor, image: Tensor) -> Tensor:
        """Tokens `x` (B, N, C), text (B, L, D) and image tokens (B, M, D) -> (B, N, C)."""
        q = self.queries(x)
        text_branch = attention(q, *self.keys_values(text))
        image_branch = attention(q, *self.image_keys_values(image))
        return self.output(text_branch + self.image_output(image_branch))

    def image_keys_values(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of image tokens (B, M, D): from the text's own layers."""
        return self.keys_values(image)

    def image_output(self, x: Tensor) -> Tensor:
        """The image branch as it is added to the text branch, (B, heads, N, d)."""
        return self.to_out_ip[0](x)


class SelfAttention(nn.Module):
    """Spatial self-attention with "learned absolute positional embeddings" (Sec. 3.3, ConsisSR).

    softmax((q + p)(k + p)^T / sqrt(d)) v, with p made for a map of `side` x `side`, added behind the projections and
    shared by all heads (as released); other map sizes get p by bicubic interpolation (ours). `side` 0: no positions,
    Stable Diffusion's layer.
    """

    def __init__(self, source: nn.Module, side: int) -> None:
        super().__init__()
        self.heads: int = source.heads
        self.side = side
        self.to_q, self.to_k, self.to_v, self.to_out = source.to_q, source.to_k, source.to_v, source.to_out
        weight = source.to_q.weight
        zeros = weight.new_zeros(side * side, weight.shape[0] // self.heads)
        self.position_emb = nn.Parameter(zeros) if side else None

    def forward(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Tokens `x` (B, h * w, C) of a map of `size` (h, w), in rows -> the same shape."""
        q, k, v = (split_heads(part, self.heads) for part in self.queries_keys_values(x))
        if self.position_emb is not None:
            p = self.positions(size).to(q.dtype)
            q, k = q + p, k + p
        return self.to_out[1](self.to_out[0](merge_heads(attention(q, k, v))))

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """Three times (B, N, C)."""
        return self.to_q(x), self.to_k(x), self.to_v(x)

    def positions(self, size: tuple[int, int]) -> Tensor:
        """p of an h x w map, (h * w, d); the parameter itself at the size it was made for."""
        if size == (self.side, self.side):
            return self.position_emb
        grid = self.position_emb.T.reshape(1, -1, self.side, self.side)
        return F.interpolate(grid, size=size, mode="bicubic", align_corners=False).flatten(2)[0].T


class TransposedAttention(nn.Module):
    """Self-attention between the channels of each head: softmax(q k^T / sqrt(h w)) v with q, k, v of shape (d, h w).

    "Inspired by" Restormer (Sec. 3.3, ConsisSR). As in the release it has neither Restormer's normalisation of q and k
    nor its temperature, and its output layer starts at zero.
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
        out = attention(*qkv.unbind(1))
        return self.to_out[0](out.reshape(batch, dim, tokens).transpose(1, 2))


class TransformerBlock(nn.Module):
    """The block of Fig. 5, ConsisSR, in the place and with the calling convention of diffusers' BasicTransformerBlock.

    Beside the text, which diffusers hands over, `cross_attention_kwargs` holds "image" (B, M, D), the image tokens;
    "size" (h, w), the latent's; and, for `cached.py`, "cache" and "network".
    """

    def __init__(
        self,
        source: nn.Module,
        attn1: SelfAttention,
        attn2: CrossAttention,
        attnT: TransposedAttention | None,
        attnI: nn.Module | None,
        one_token: bool,
    ) -> None:
        """one_token: the model was made for one pooled image token (ablations lack keys for more): refuse others."""
        super().__init__()
        loaded = set(source.state_dict())
        self.norm1, self.norm2, self.norm3, self.ff = source.norm1, source.norm2, source.norm3, source.ff
        self.attn1, self.attn2 = attn1, attn2
        self.normT = None if attnT is None else fresh_norm(source.norm1)
        self.attnT, self.attnI = attnT, attnI
        self.needs_size = attn1.position_emb is not None or attnT is not None
        self.needs_image = attn2.reads_image or attnI is not None
        self.one_token = one_token
        self.added = tuple(name for name in self.state_dict() if name not in loaded)

    def layers(self, x: Tensor, text: Tensor, image: Tensor | None, size: tuple[int, int] | None, attn2) -> Tensor:
        """Tokens `x` (B, h * w, C) of a map of `size` (h, w) -> the same shape. `attn2`: own, or its fast form."""
        x = self.attn1(self.norm1(x), size) + x
        if self.attnT is not None:
            x = self.attnT(self.normT(x), size) + x
        x = attn2(self.norm2(x), text, image) + x
        if self.attnI is not None:
            x = self.attnI(x, image, self.attn2) + x
        return self.ff(self.norm3(x)) + x

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
        """What diffusers calls: tokens (B, h * w, C) and the text (B, L, D) as `encoder_hidden_states`."""
        if attention_mask is not None or encoder_attention_mask is not None:
            raise ValueError("attention masks are not supported")
        context = cross_attention_kwargs or {}
        image, size = context.get("image"), None
        if self.needs_image and image is None:
            raise ValueError("this network attends to image tokens: give them in the condition")
        if self.needs_image and self.one_token and image.shape[1] != 1:
            raise ValueError(f"this network was made for one pooled image token, not {image.shape[1]}")
        if self.needs_size:
            if "size" not in context:
                raise ValueError("this network needs the latent's size: call it through the denoiser")
            size = map_size(context["size"], hidden_states.shape[1])
        attn2 = CachedAttention(self.attn2, context) if context.get("cache") else self.attn2
        return self.layers(hidden_states, encoder_hidden_states, image, size, attn2)


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


def zeroed(module: nn.Module) -> nn.Module:
    """`module` with all parameters set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def fresh_norm(like: nn.LayerNorm) -> nn.LayerNorm:
    """A new LayerNorm of the same shape, device and type."""
    return nn.LayerNorm(like.normalized_shape, like.eps, device=like.weight.device, dtype=like.weight.dtype)
