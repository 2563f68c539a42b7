"""Prompt embeddings from open_clip's text tower, as Stable Diffusion 2 uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from open_clip import CLIP


class OpenClipText(nn.Module):
    """Prompts -> (B, L, D): all but the last transformer block ("penultimate"), then the final norm; not pooled."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.blocks = clip.transformer.resblocks[:-1]
        self.ln_final = clip.ln_final
        self.length: int = clip.positional_embedding.shape[0]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Embeddings (B, L, D) of `prompts`."""
        from open_clip import tokenizer

        return self.encode_tokens(tokenizer.tokenize(prompts, self.length))

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, L, D) of token numbers (B, L), causally masked."""
        weight = self.positional_embedding
        x = self.token_embedding(tokens.to(weight.device)) + weight
        mask = torch.full((self.length, self.length), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        return self.ln_final(x)
