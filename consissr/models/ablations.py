"""Other image branches than HPA's: the release's own keys and values, and what Table 3, ConsisSR, compares it with."""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn

from consissr.models.attention import (
    CrossAttention,
    HybridPromptAdapter,
    attention,
    fresh_norm,
    merge_heads,
    split_heads,
    zeroed,
)


class ReleasedAdapter(HybridPromptAdapter):
    """HPA as released: the image's keys and values are layers of their own, which are not trained.

    They start as copies of the text's. (In the authors' own training they are random: a slip of their script.)
    """

    def __init__(self, source: nn.Module, number: int) -> None:
        super().__init__(source, number)
        self.to_k_ip, self.to_v_ip = deepcopy(self.to_k), deepcopy(self.to_v)

    def image_keys_values(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of image tokens (B, M, D), each (B, heads, M, d)."""
        return split_heads(self.to_k_ip(image), self.heads), split_heads(self.to_v_ip(image), self.heads)


class IPAdapter(CrossAttention):
    """IP-Adapter's branch ('ip_adapter', Table 3): trained keys and values of its own.

    The values start at zero (ours, so that it begins as a no-op; IP-Adapter copies the text's). Nothing stands between
    the image branch and the sum. With one image token attention is 1 everywhere, so there are no keys.
    """

    reads_image = True

    def __init__(self, source: nn.Module, number: int, several: bool) -> None:
        super().__init__(source, number)
        self.to_k_ip = deepcopy(self.to_k) if several else None
        self.to_v_ip = zeroed(deepcopy(self.to_v))

    def forward(self, x: Tensor, text: Tensor, image: Tensor) -> Tensor:
        """Tokens `x` (B, N, C), text (B, L, D) and image tokens (B, M, D) -> (B, N, C)."""
        q = self.queries(x)
        return self.output(attention(q, *self.keys_values(text)) + attention(q, *self.image_keys_values(image)))

    def image_keys_values(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of image tokens (B, M, D), each (B, heads, M, d); of one token the values are both:
        any keys give the same result."""
        v = split_heads(self.to_v_ip(image), self.heads)
        return (v if self.to_k_ip is None else split_heads(self.to_k_ip(image), self.heads)), v

    def image_output(self, x: Tensor) -> Tensor:
        """The image branch as it is added to the text branch: as it is."""
        return x


class SeparateAttention(nn.Module):
    """Image cross-attention as a layer of its own ('hpa_separate', Table 3), its output layer starting at zero.

    The paper says that it separates the layers, no more. Our reading: own norm, queries copied from the text's layer,
    keys and values the text's own (handed over at each call), after the text's layer. With one image token attention is
    1 everywhere, so there are no norm and no queries.
    """

    def __init__(self, source: nn.Module, norm: nn.LayerNorm, several: bool) -> None:
        super().__init__()
        self.heads: int = source.heads
        self.norm = fresh_norm(norm) if several else None
        self.to_q = deepcopy(source.to_q) if several else None
        self.to_out = nn.ModuleList([zeroed(deepcopy(source.to_out[0]))])

    def forward(self, x: Tensor, image: Tensor, text_layer: CrossAttention) -> Tensor:
        """What tokens `x` (B, N, C) get from `image` (B, M, D): (B, N or 1, C)."""
        out = split_heads(text_layer.to_v(image), self.heads)
        if self.to_q is not None:
            q = split_heads(self.to_q(self.norm(x)), self.heads)
            out = attention(q, split_heads(text_layer.to_k(image), self.heads), out)
        return self.to_out[0](merge_heads(out))
