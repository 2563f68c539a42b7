"""The frozen UNet steered by the ControlNet: eps(z_t, t, condition), and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from consissr.errors import UserError
from consissr.models.attention import CrossAttention
from consissr.models.cached import fill
from consissr.models.controlnet import HintFeatures
from consissr.models.surgery import takes_image

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel


class SoftPrompt(Protocol):
    """Prompt tokens from an image by an encoder of one's own, such as SeeSR's DAPE (Table 3, ConsisSR).

    Its tokens are appended to the text's, and attention treats them alike (ours: the paper does not say how). To train
    with one, subclass a stage (Tala, Nuts) and pass it on: `super().__init__(config, soft_prompt=encoder)`; an encoder
    that is an nn.Module moves to the device with the stage, frozen. A model folder does not store it: set
    `restorer.soft_prompt = encoder` in use.
    """

    def encode(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D), D as wide as the text's, of low-quality images (B, 3, H, W) in [-1, 1]; no gradients."""


@dataclass
class Condition:
    """What the networks are told about the images to restore, one row per image."""

    text: Tensor
    """Prompt embeddings (B, L, D)."""
    hint: Tensor
    """Scaled latent of the low-quality image, z_lq (B, C, h, w)."""
    image: Tensor | None = None
    """Image tokens (B, N, D), where the model has an image branch."""
    cache: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """What `Denoiser.prepare` computed of these for all steps, (B, ...); names begin with "text", "image" or "hint"."""
    strength: float = 1.0
    """What the ControlNet's residuals are multiplied by."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        named = {"text": self.text, "hint": self.hint, "image": self.image}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """`change` applied to every tensor."""
        cache = {name: change(tensor) for name, tensor in self.cache.items()}
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()}, cache=cache)

    def cat(self, other: Condition) -> Condition:
        """The rows of both, this one's first; ValueError if only one has image tokens."""
        mine, theirs = self.tensors(), other.tensors()
        if mine.keys() != theirs.keys():
            raise ValueError("only one of two conditions has image tokens: they cannot be joined")
        shared = self.cache.keys() & other.cache.keys()
        cache = {name: torch.cat([self.cache[name], other.cache[name]]) for name in shared}
        joined = {name: torch.cat([mine[name], theirs[name]]) for name in mine}
        return Condition(**joined, strength=self.strength, cache=cache)

    def changed(self, **tensors: Tensor) -> Condition:
        """With other `tensors` (text, hint, image); what was computed of the old ones is dropped."""
        cache = {name: value for name, value in self.cache.items() if not name.startswith(tuple(tensors))}
        return replace(self, **tensors, cache=cache)

    def with_soft(self, tokens: Tensor | None) -> Condition:
        """With the tokens (B, N, D) of a soft prompt after the text's; the same where there are none."""
        return self if tokens is None else self.changed(text=torch.cat([self.text, tokens.to(self.text)], dim=1))

    def rows(self, index: slice | Tensor) -> Condition:
        """The given rows."""
        return self.map(lambda tensor: tensor[index])

    def to(self, *args: torch.device | torch.dtype | str) -> Condition:
        """Moved or cast like a tensor."""
        return self.map(lambda tensor: tensor.to(*args))


class Denoiser(nn.Module):
    """Predicted noise eps(z_t, t, condition), the papers' epsilon_phi and epsilon_theta.

    `prediction_type` is what the UNet puts out: "epsilon", or "v_prediction", converted by
    eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) z_t. Both networks have had `surgery.replace_blocks` applied.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel,
        alpha_bar: Tensor,
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__()
        self.unet = unet
        self.controlnet = controlnet
        self.prediction_type = prediction_type
        self.alpha_bar = alpha_bar.double()
        self.signal_noise: tuple[Tensor, Tensor] | None = None
        self.takes_image = takes_image(unet) or takes_image(controlnet)

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """eps (B, C, h, w) float32 for latents `z_t` (B, C, h, w) at integer timesteps `t` (B,)."""
        if self.takes_image != (condition.image is not None):
            raise ValueError("image tokens and an image branch: the condition and the model must have both or neither")
        dtype, size = self.unet.conv_in.weight.dtype, tuple(z_t.shape[-2:])
        z_lq = condition.hint  # as exact as it was given
        z, condition = z_t.to(dtype), condition.to(dtype)
        hint = HintFeatures(condition.cache["hint"]) if "hint" in condition.cache else condition.hint
        read = self.blocks_read("controlnet", condition, size) | {"conditioning_scale": condition.strength}
        down, middle = self.controlnet(z, t, condition.text, hint, return_dict=False, **read)
        read = self.blocks_read("unet", condition, size)
        read |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        out = self.unet(z, t, condition.text, return_dict=False, **read)[0]
        return self.to_eps(out.float(), z_t, t, z_lq)

    def blocks_read(self, network: str, condition: Condition, size: tuple[int, ...]) -> dict[str, Any]:
        """The argument by which diffusers hands over to the blocks of `network` what they read beside the text."""
        read = {"image": condition.image, "size": size, "network": network, "cache": condition.cache}
        return {"cross_attention_kwargs": read}

    def to_eps(self, out: Tensor, z_t: Tensor, t: Tensor, z_lq: Tensor) -> Tensor:
        """The UNet's output (B, C, h, w) for `z_t` at `t` (B,), as predicted noise."""
        if self.prediction_type == "epsilon":
            return out
        signal, noise = self.coefficients(t)
        return signal * out + noise * z_t

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each (B, 1, 1, 1) float32 on the device of `t`.

        Not a Schedule's, because models know nothing of diffusion/: what a network puts out is turned into noise here.
        """
        if self.signal_noise is None or self.signal_noise[0].device != t.device:
            a = self.alpha_bar
            self.signal_noise = a.sqrt().float().to(t.device), (1 - a).sqrt().float().to(t.device)
        signal, noise = self.signal_noise
        return signal[t].view(-1, 1, 1, 1), noise[t].view(-1, 1, 1, 1)

    def prepare(self, condition: Condition, like: Condition | None = None, hint: bool = True) -> Condition:
        """The condition with everything computed that doesn't depend on the step, for many calls (cached.py).

        That is keys and values of text and image tokens, and the hint's features. like: a prepared condition; where
        text, hint or image is the same tensor, what was computed of it is taken over. hint: False where the hint
        differs from call to call (tiles).
        """
        same = tuple(n for n, x in condition.tensors().items() if like is not None and x is getattr(like, n))
        known = {name: value for name, value in like.cache.items() if name.startswith(same)} if same else {}
        cast = replace(condition, cache=known | condition.cache).to(self.unet.conv_in.weight.dtype)
        cache = cast.cache
        for name, network in self.named_children():
            layers = [m for m in network.modules() if isinstance(m, CrossAttention)]
            fill(cache, name, layers, cast.text, cast.image)
        if hint and "hint" not in cache:
            cache["hint"] = self.controlnet.controlnet_cond_embedding(cast.hint)
        return replace(condition, cache=cache)


def guided(
    denoiser: Callable[[Tensor, Tensor, Condition], Tensor],
    positive: Condition,
    negative: Condition | None = None,
    guidance: float = 1.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """eps(z_t, t) under classifier-free guidance: eps_neg + guidance (eps_pos - eps_neg).

    Both halves run in one batch [negative, positive]. With guidance 1 only the positive condition is evaluated.
    """
    prepare = getattr(denoiser, "prepare", lambda condition, like=None: condition)
    if guidance != 1.0 and negative is None:
        raise UserError(f"guidance is {guidance}, which needs a negative prompt: give one, or use guidance 1")
    positive = prepare(positive)
    if guidance == 1.0:
        return lambda z_t, t: denoiser(z_t, t, positive)
    both = prepare(negative, positive).cat(positive)

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        eps_negative, eps_positive = denoiser(torch.cat([z_t, z_t]), torch.cat([t, t]), both).chunk(2)
        return eps_negative + guidance * (eps_positive - eps_negative)

    return predict
