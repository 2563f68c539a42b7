"""The frozen UNet steered by the ControlNet: eps(z_t, t, condition), and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from consissr.errors import UserError
from consissr.models.attention import has_blocks, takes_image

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel


@dataclass
class Condition:
    """What the networks are told about the images to restore, one row per image."""

    text: Tensor
    """Prompt embeddings (B, L, D)."""
    hint: Tensor
    """Scaled latent of the low-quality image, z_lq (B, C, h, w)."""
    image: Tensor | None = None
    """Image tokens (B, N, D), where the model has an image branch."""

    def parts(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        found = {"text": self.text, "hint": self.hint, "image": self.image}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """`change` applied to every tensor."""
        return replace(self, **{name: change(tensor) for name, tensor in self.parts().items()})

    def cat(self, other: Condition) -> Condition:
        """The rows of both, this one's first; ValueError if only one has image tokens."""
        mine, theirs = self.parts(), other.parts()
        if mine.keys() != theirs.keys():
            raise ValueError("only one of two conditions has image tokens: they cannot be joined")
        return Condition(**{name: torch.cat([mine[name], theirs[name]]) for name in mine})

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
    through them, receives a gradient.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel | None,
        alpha_bar: Tensor,
        prediction_type: str = "epsilon",
        encoder_gradients: bool = True,
    ) -> None:
        super().__init__()
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction type '{prediction_type}' is not known: use epsilon or v_prediction")
        self.unet = unet
        self.controlnet = controlnet
        self.prediction_type = prediction_type
        networks = [unet] if controlnet is None else [unet, controlnet]
        self.takes_image = any(takes_image(network) for network in networks)
        self.replaced = all(has_blocks(network) for network in networks)
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
        z, condition = z_t.to(dtype), condition.to(dtype)
        text, residuals, extra = condition.text, {}, None
        if self.replaced:
            extra = {"size": tuple(z_t.shape[-2:]), "image": condition.image}
        if self.controlnet is not None:
            down, middle = self.controlnet(
                z, t, text, controlnet_cond=condition.hint, cross_attention_kwargs=extra, return_dict=False
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        out = self.unet(z, t, text, cross_attention_kwargs=extra, return_dict=False, **residuals)[0]
        return self.to_eps(out.float(), z_t, t)

    def to_eps(self, out: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The UNet's output (B, C, h, w) as predicted noise."""
        if self.prediction_type == "epsilon":
            return out
        if self.signal.device != t.device:
            self.signal, self.noise = self.signal.to(t.device), self.noise.to(t.device)
        signal, noise = self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)
        return signal * out + noise * z_t


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
    if guidance == 1.0:
        return lambda z_t, t: denoiser(z_t, t, positive)
    if negative is None:
        raise UserError(f"guidance is {guidance}, which needs a negative prompt: give one, or use guidance 1")
    both = negative.cat(positive)

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        eps_negative, eps_positive = denoiser(torch.cat([z_t, z_t]), torch.cat([t, t]), both).chunk(2)
        return eps_negative + guidance * (eps_positive - eps_negative)

    return predict
