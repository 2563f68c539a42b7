"""The frozen UNet steered by the ControlNet: eps(z_t, t, condition), and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from consissr.errors import UserError
from consissr.models.attention import CrossAttention, has_blocks, takes_image
from consissr.models.controlnet import HintFeatures

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel


class SoftPrompt(Protocol):
    """Prompt tokens from an image by an encoder of one's own, such as SeeSR's DAPE (Table 3, ConsisSR).

    Its tokens are appended to the text's, and attention treats them alike. To train with one, subclass a stage (Tala,
    Nuts) and pass it on: `super().__init__(config, soft_prompt=encoder)`; an encoder that is an nn.Module moves to the
    device with the stage, frozen. A model folder does not store it: set `restorer.soft_prompt = encoder` in use.
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
    kept: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """What `Denoiser.prepare` computed from these for all steps, (B, ...); each name begins with its source's."""

    def parts(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        found = {"text": self.text, "hint": self.hint, "image": self.image}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """`change` applied to every tensor."""
        kept = {name: change(tensor) for name, tensor in self.kept.items()}
        return replace(self, **{name: change(tensor) for name, tensor in self.parts().items()}, kept=kept)

    def cat(self, other: Condition) -> Condition:
        """The rows of both, this one's first; ValueError if only one has image tokens."""
        mine, theirs = self.parts(), other.parts()
        if mine.keys() != theirs.keys():
            raise ValueError("only one of two conditions has image tokens: they cannot be joined")
        shared = self.kept.keys() & other.kept.keys()
        kept = {name: torch.cat([self.kept[name], other.kept[name]]) for name in shared}
        return Condition(**{name: torch.cat([mine[name], theirs[name]]) for name in mine}, kept=kept)

    def changed(self, **parts: Tensor) -> Condition:
        """With other `parts` (text, hint, image); what was kept of the old ones is dropped."""
        kept = {name: value for name, value in self.kept.items() if not name.startswith(tuple(parts))}
        return replace(self, **parts, kept=kept)

    def with_soft(self, tokens: Tensor | None) -> Condition:
        """With the tokens (B, N, D) of a soft prompt after the text's; the same where there are none."""
        return self if tokens is None else self.changed(text=torch.cat([self.text, tokens.to(self.text)], dim=1))

    def repeat(self, times: int) -> Condition:
        """All rows `times` over: row i becomes rows i, B + i, 2 B + i, ..."""
        return self.map(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def rows(self, index: slice | Tensor) -> Condition:
        """The given rows."""
        return self.map(lambda tensor: tensor[index])

    def to(self, *args: torch.device | torch.dtype | str) -> Condition:
        """Moved or cast like a tensor."""
        return self.map(lambda tensor: tensor.to(*args))


class Denoiser(nn.Module):
    """Predicted noise eps(z_t, t, condition).

    `prediction_type` is what the UNet puts out: "epsilon", or "v_prediction", converted by
    eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) z_t. Both networks have had `replace_blocks` applied, or neither.
    `encoder_gradients=False` trains as ConsisSR's release does: nothing in the UNet's encoder and middle, and nothing
    through them, receives a gradient. `residual` > 0 (for v only) reads the output as v of (z_hq - z_lq) / residual.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel | None,
        alpha_bar: Tensor,
        prediction_type: str = "epsilon",
        encoder_gradients: bool = True,
        residual: float = 0.0,
    ) -> None:
        super().__init__()
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction type '{prediction_type}' is not known: use epsilon or v_prediction")
        self.unet = unet
        self.controlnet = controlnet
        if residual and prediction_type != "v_prediction":
            raise UserError(f"model.residual is {residual}, which needs a base that predicts v: use 0 with this one")
        self.prediction_type = prediction_type
        self.residual = residual
        networks = [unet] if controlnet is None else [unet, controlnet]
        self.takes_image = any(takes_image(network) for network in networks)
        self.replaced = all(has_blocks(network) for network in networks)
        layers = [m for network in networks for m in network.modules() if isinstance(m, CrossAttention)]
        for place, layer in enumerate(layers):
            layer.place = place
        self.signal = alpha_bar.double().sqrt().float()
        self.noise = (1 - alpha_bar.double()).sqrt().float()
        if not encoder_gradients:
            for part in (unet.time_embedding, unet.conv_in, *unet.down_blocks, unet.mid_block):
                part.register_forward_hook(lambda module, args, output: detached(output))

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """eps (B, C, h, w) float32 for latents `z_t` (B, C, h, w) at integer timesteps `t` (B,)."""
        if self.takes_image != (condition.image is not None):
            raise ValueError("image tokens and an image branch: the condition and the model must have both or neither")
        dtype = self.unet.conv_in.weight.dtype
        z_lq = condition.hint  # as exact as it was given: the residual starts from it
        z, condition = z_t.to(dtype), condition.to(dtype)
        text, residuals, extra = condition.text, {}, None
        if self.replaced:
            extra = {"size": tuple(z_t.shape[-2:]), "image": condition.image, "kept": condition.kept}
        if self.controlnet is not None:
            hint = HintFeatures(condition.kept["hint"]) if "hint" in condition.kept else condition.hint
            down, middle = self.controlnet(
                z, t, text, controlnet_cond=hint, cross_attention_kwargs=extra, return_dict=False
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        out = self.unet(z, t, text, cross_attention_kwargs=extra, return_dict=False, **residuals)[0]
        return self.to_eps(out.float(), z_t, t, z_lq)

    def prepare(self, condition: Condition, like: Condition | None = None, hint: bool = True) -> Condition:
        """The condition with everything computed that doesn't depend on the step, for many calls.

        That is keys and values of text and image tokens, and the hint's features. `like`: a prepared condition; what
        it has from the same tensors is taken over. hint: False where the hint differs from call to call (tiles).
        """
        if not self.replaced:
            return condition
        same = [name for name, part in condition.parts().items() if like is not None and part is getattr(like, name)]
        if same:
            known = {name: value for name, value in like.kept.items() if name.startswith(tuple(same))}
            condition = replace(condition, kept=known | condition.kept)
        cast = condition.to(self.unet.conv_in.weight.dtype)
        kept = cast.kept
        for layer in (m for m in self.modules() if isinstance(m, CrossAttention)):
            if f"text{layer.place}" not in kept:
                kept[f"text{layer.place}"] = torch.stack(layer.text_parts(cast.text), 1)
            if layer.image_prompt in ("hpa", "ip_adapter") and f"image{layer.place}" not in kept:
                kept[f"image{layer.place}"] = torch.stack(layer.image_parts(cast.image), 1)
        if hint and self.controlnet is not None and "hint" not in kept:
            kept["hint"] = self.controlnet.controlnet_cond_embedding(cast.hint)
        return replace(condition, kept=kept)

    def to_eps(self, out: Tensor, z_t: Tensor, t: Tensor, z_lq: Tensor | None = None) -> Tensor:
        """The UNet's output (B, C, h, w) as predicted noise."""
        if self.prediction_type == "epsilon":
            return out
        if self.signal.device != t.device:
            self.signal, self.noise = self.signal.to(t.device), self.noise.to(t.device)
        signal, noise = self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)
        if not self.residual:
            return signal * out + noise * z_t
        # u_t = z_t - sqrt(alpha_bar_t) z_lq is the noised residual, `size` its standard deviation, and `out` the v of
        # u_t / size: where that is 0, the estimate of z_hq is z_lq plus the share of u_t that is signal.
        u_t = z_t - signal * z_lq.float()
        size = ((self.residual * signal) ** 2 + noise**2).sqrt()
        return (noise * u_t + self.residual * signal * size * out) / size**2


def detached(value: Any) -> Any:
    """A tensor, or a tuple of what this takes, cut off from its history."""
    return value.detach() if isinstance(value, Tensor) else tuple(detached(part) for part in value)


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
