"""The plain reference: the released pipelines' way of doing the same mathematics, from stock diffusers components.

It runs on the weights of a `Restorer` and on the same noise, so that results can be compared. Each choice says which
release behaves so (CCSR v2: its diffusers pipeline; ConsisSR: its LDM code). Sizes and colours are left to the caller,
who treats both paths alike; files it writes with Pillow's own settings for PNG (both releases). Attention is diffusers'
default, torch's scaled_dot_product_attention (CCSR v2).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from consissr.bench.clock import Clock
from consissr.diffusion.plans import Step
from consissr.diffusion.sampler import Draw
from consissr.models.controlnet import LatentHint
from consissr.models.surgery import replace_blocks
from consissr.models.vae.latents import Latents, empty_latents
from consissr.restorer import Restorer


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in NCHW order, as both releases run (none uses channels-last); those that are so already, shared."""
    return {name: tensor.contiguous() for name, tensor in state.items()}


def stock(network: Any) -> Any:
    """A network of the same diffusers class and weights, without our blocks (where it has no additions) and layers."""
    with torch.device("meta"):
        made = type(network).from_config(network.config)
        hint = getattr(network, "controlnet_cond_embedding", None)
        if hint is not None:
            kind = "conv" if len(hint) == 1 else "stack"
            made.controlnet_cond_embedding = LatentHint(kind, hint[0].in_channels, hint[-1].out_channels)
    return made.eval().requires_grad_(False)


def assign(made: nn.Module, network: nn.Module) -> nn.Module:
    """`made` with the weights of `network`."""
    made.load_state_dict(contiguous(network.state_dict()), assign=True)
    return made


def stock_denoiser(restorer: Restorer, model: Any) -> tuple[nn.Module, nn.Module]:
    """UNet and ControlNet of stock classes; with our blocks, plain, where `model` (ModelConfig) adds to them."""
    made = []
    for network in (restorer.denoiser.unet, restorer.denoiser.controlnet):
        plain = stock(network)
        if adds(model):
            replace_blocks(plain, model)
        made.append(assign(plain, network))
    return made[0].eval(), made[1].eval()


def adds(model: Any) -> bool:
    """Whether a model (ModelConfig) has blocks that diffusers doesn't."""
    return bool(model.image_prompt != "none" or model.transposed_attention or model.position_embedding)


def stock_latents(latents: Latents) -> Latents:
    """The autoencoder; `Latents` folds pixels for models that need it, which SD2.1 does not."""
    with torch.device("meta"):
        made = empty_latents(dict(latents.vae.config))
    return assign(made, latents).eval().requires_grad_(False)


class Reference:
    """Restores one prepared image at a time: both releases' samplers know batches of one."""

    def __init__(self, restorer: Restorer, model: Any, text: Callable[[list[str]], Tensor], sequential: bool) -> None:
        """`sequential`: guidance by two passes one after the other (ConsisSR) instead of a batch of two (CCSR v2)."""
        self.unet, self.controlnet = stock_denoiser(restorer, model)
        self.latents = stock_latents(restorer.latents)
        self.image_prompt, self.text, self.sequential = restorer.image_prompt, text, sequential
        self.alpha_bar = restorer.schedule.alpha_bar.to(restorer.device)
        self.to_eps = restorer.denoiser.to_eps  # v, and what the bundled models predict, as noise
        self.extra = adds(model)
        self.device = restorer.device

    @torch.no_grad()
    def restore(self, x: Tensor, draw: Draw, config: Any, plan: Sequence[Step], clock: Clock) -> Tensor:
        """Prepared image (1,3,H,W) -> decoded (1,3,H,W). `config`: SamplerConfig."""
        guided = config.guidance != 1
        with clock.part("prompt"):  # both releases encode the prompts again for every image
            texts = [self.text([p]).to(x) for p in ([config.negative] if guided else []) + [config.positive]]
        with clock.part("encode"):
            z, hints, tokens = self.encode(x, draw, config, guided)
        noise = draw("init", z.shape).to(z)
        x_t = noise if config.start == "noise" else self.noised(z, noise, len(self.alpha_bar) - 1)
        for i, step in enumerate(plan):
            with clock.part("step"):
                if guided and i == 0 and config.first_prompt == "negative":  # CCSR v2: the first step without guidance
                    eps = self.eps(x_t, step.t, texts[0], hints[:1], tokens)
                elif guided:
                    eps = self.guided(x_t, step.t, texts, hints, tokens, config.guidance)
                else:
                    eps = self.eps(x_t, step.t, texts[-1], hints[-1:], tokens)
                x0 = (x_t - (1 - self.alpha_bar[step.t]).sqrt() * eps) / self.alpha_bar[step.t].sqrt()
                if step.kind == "renoise":
                    x_t = self.noised(x0, draw("tmax", z.shape).to(z), step.t_next)
                elif step.kind == "step":
                    x_t = self.stepped(x_t, x0, step, draw(f"step[{i}]", z.shape).to(z))
                x_t, x0 = x_t.float(), x0.float()
        with clock.part("decode"):
            return self.latents.decode(x0.to(x.dtype)).float().cpu()

    def encode(self, x: Tensor, draw: Draw, config: Any, guided: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """z_lq, the hints of both halves, the image token.

        CCSR v2 repeats the image before it is encoded under guidance. ConsisSR encodes once for both passes.
        """
        rows = 2 if guided and not self.sequential else 1
        mean, logvar = (part.float() for part in self.latents.moments(x.repeat(rows, 1, 1, 1)))
        if config.posterior == "sample":
            names = ("posterior", "posterior_positive")[:rows]
            noise = torch.cat([draw(name, (1, *mean.shape[1:])) for name in names]).to(mean)
            mean = mean + torch.exp(0.5 * logvar) * noise
        z = mean * self.latents.scale
        tokens = None if self.image_prompt is None else self.image_prompt.encode(x)
        return z[:1], z, tokens

    def guided(self, x_t: Tensor, t: int, texts: list, hints: Tensor, tokens: Tensor | None, scale: float) -> Tensor:
        """eps_negative + scale (eps_positive - eps_negative)."""
        if self.sequential:  # ConsisSR: the ControlNet and the UNet run for each prompt
            negative, positive = (self.eps(x_t, t, text, hints, tokens) for text in texts)
        else:  # CCSR v2: one batch of two
            hints = hints if len(hints) == 2 else hints.repeat(2, 1, 1, 1)
            negative, positive = self.eps(x_t.repeat(2, 1, 1, 1), t, torch.cat(texts), hints, tokens).chunk(2)
        return negative + scale * (positive - negative)

    def eps(self, x_t: Tensor, t: int, text: Tensor, hint: Tensor, tokens: Tensor | None) -> Tensor:
        """Predicted noise. Hint features and projections of all tokens are computed at every call (both releases)."""
        dtype = self.unet.conv_in.weight.dtype
        times = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        extra = {"size": tuple(x_t.shape[-2:]), "image": tokens} if self.extra else None
        down, middle = self.controlnet(
            x_t.to(dtype), times, text, hint.to(dtype), cross_attention_kwargs=extra, return_dict=False
        )
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        out = self.unet(x_t.to(dtype), times, text, cross_attention_kwargs=extra, return_dict=False, **residuals)[0]
        return self.to_eps(out.float(), x_t, times, hint)

    def noised(self, z: Tensor, noise: Tensor, t: int) -> Tensor:
        """z at the noise level of timestep t."""
        return (self.alpha_bar[t].sqrt() * z + (1 - self.alpha_bar[t]).sqrt() * noise).float()

    def stepped(self, x_t: Tensor, x0: Tensor, step: Step, noise: Tensor) -> Tensor:
        """A step of spaced DDPM: the posterior of x_(t_next) given x_t and x0, with the small variance."""
        now, following = self.alpha_bar[step.t], self.alpha_bar[step.t_next]
        beta = 1 - now / following
        mean = beta * following.sqrt() / (1 - now) * x0 + (1 - following) * (1 - beta).sqrt() / (1 - now) * x_t
        return mean + (beta * (1 - following) / (1 - now)).clamp(min=1e-20).sqrt() * noise
