"""The cross-attention's fast form: what depends on the prompts alone is computed once, not in every step of sampling.

That is keys and values of the text, and of the image tokens. A single image token needs neither queries nor keys: its
attention is 1 at every position, so that what the branch adds is one vector, which is computed once, too. The results
are the plain form's (attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CachedAttention:
    """A cross-attention layer, called as (x, text, image), with what `fill` computed of its prompts."""

    def __init__(self, layer: nn.Module, context: dict[str, Any]) -> None:
        """context: the denoiser's "cache", and the name of the "network" that the layer belongs to."""
        key = f"{context['network']}.{layer.number}"
        self.layer = layer
        self.text: Tensor | None = context["cache"].get(f"text.{key}")
        self.image: Tensor | None = context["cache"].get(f"image.{key}")

    def __call__(self, x: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        """What the layer gives for tokens `x` (B, N, C), (B, N, C); `text` and `image` have been read before."""
        q = self.layer.queries(x)
        out = F.scaled_dot_product_attention(q, *self.text.unbind(1))
        if self.image is not None:
            out = out + self.image_branch(q, *self.image.unbind(1))
        return self.layer.output(out)

    def image_branch(self, q: Tensor, *tokens: Tensor) -> Tensor:
        """(B, heads, N or 1, d), from the image tokens' keys and values, or from what a single one adds."""
        if len(tokens) == 1:
            return tokens[0]
        return self.layer.image_output(F.scaled_dot_product_attention(q, *tokens))


def fill(cache: dict[str, Tensor], network: str, layers: list[nn.Module], text: Tensor, image: Tensor | None) -> None:
    """Add to `cache`, in place, what cross-attention `layers` of `network` compute of the prompts and it lacks.

    Entries "text.NETWORK.NUMBER" and "image.NETWORK.NUMBER" are keys and values (B, 2, heads, L, d), or what a single
    image token adds, (B, 1, heads, 1, d).
    """
    for layer in layers:
        key = f"{network}.{layer.number}"
        if f"text.{key}" not in cache:
            cache[f"text.{key}"] = torch.stack(layer.keys_values(text), 1)
        if layer.reads_image and f"image.{key}" not in cache:
            tokens = layer.image_keys_values(image)
            single = image.shape[1] == 1
            cache[f"image.{key}"] = torch.stack((layer.image_output(tokens[1]),) if single else tokens, 1)
