"""What is measured: a model of this machine, or the networks of SD2.1's size with randomly drawn weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from consissr.config.model import ModelConfig
from consissr.config.sampler import SamplerConfig
from consissr.diffusion.plans import Step
from consissr.diffusion.schedule import Schedule, alpha_bar
from consissr.evaluation import complexity
from consissr.models.denoiser import Denoiser
from consissr.models.fast import for_inference
from consissr.models.image_prompt import ImagePrompt
from consissr.models.vae.latents import Latents
from consissr.restorer import Restorer
from consissr.weights.find import find_model
from consissr.weights.folder import load_model
from consissr.weights.precision import PRECISIONS

SD21 = "sd21"
"""The name of the full size, beside names and folders of models."""


@dataclass
class SamplingMethod:
    """A way of sampling: which networks (a key of `complexity.MODELS`), settings, timesteps."""

    name: str
    networks: str
    plan: list[Step]
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of SamplerConfig."""
    sequential: bool = False
    """Whether the release runs guidance's two passes one after the other."""


@dataclass
class Networks:
    """The networks that both paths run."""

    latents: Latents
    denoiser: Denoiser
    image_prompt: nn.Module | None
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype
    model: ModelConfig
    text: Callable[[list[str]], Tensor]
    """Prompts -> embeddings (B, L, D)."""

    def restorer(self, config: SamplerConfig) -> Restorer:
        """Our path, with the embeddings of the prompts."""
        precision = next(name for name, dtype in PRECISIONS.items() if dtype == self.dtype)
        prompts = {prompt: self.text([prompt]).float().cpu() for prompt in {config.positive, config.negative}}
        for network in (self.latents, self.denoiser, self.image_prompt):
            if network is not None:
                for_inference(network, self.device)
        return Restorer(
            self.latents, self.denoiser, self.schedule, prompts, self.image_prompt, config,
            device=self.device, precision=precision,
        )  # fmt: skip


class RandomText:
    """SD2.1's text encoder with random weights; a prompt's letters stand for its tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """(B, 77, 1024)."""
        device = next(self.model.parameters()).device
        rows = [[1 + ord(letter) % 40000 for letter in prompt[:77]] for prompt in prompts]
        tokens = torch.tensor([row + [0] * (77 - len(row)) for row in rows], device=device)
        return self.model(tokens)[0]


@torch.no_grad()
def drawn(network: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """A network of the meta device, in memory once, with weights N(0, 1 / inputs), gains 1 and biases 0."""
    network = (network if dtype == torch.float32 else network.to(dtype)).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in network.named_parameters():
        if tensor.ndim > 1:
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
        else:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    for name, tensor in network.named_buffers():
        if name.endswith("position_ids"):
            tensor.copy_(torch.arange(tensor.numel(), device=device).view(tensor.shape))
        elif name.endswith((".mean", ".std")):  # of images in [0, 1]
            tensor.fill_(0.5)
        else:
            raise ValueError(f"{name} is no weight: what it holds is not known here")
    return network.eval().requires_grad_(False)


def from_dict(known: dict[str, Tensor], device: torch.device) -> Callable[[list[str]], Tensor]:
    """Prompts -> embeddings (B, L, D) that are known."""
    return lambda prompts: torch.cat([known[prompt] for prompt in prompts]).to(device)


def full_size(networks: str, prompts: list[str] | None, device: torch.device, dtype: torch.dtype) -> Networks:
    """The networks of 'ccsr' or 'consissr' at SD2.1's size, one after the other, nothing copied.

    The text encoder comes first. It encodes `prompts` and goes, as at `Restorer.load`, or with None it stays, as in the
    releases.
    """
    config = complexity.MODELS[networks]
    empty = complexity.build(config)
    seeds = {name: seed for seed, name in enumerate(empty)}
    text: Callable = RandomText(drawn(empty.pop("text encoder"), device, dtype, seeds["text encoder"]))
    if prompts is not None:
        text = from_dict({prompt: text([prompt]) for prompt in prompts}, device)
    made = {name: drawn(part, device, dtype, seeds[name]) for name, part in empty.items()}
    table = alpha_bar()
    prompt = None
    if "image encoder" in made:
        prompt = ImagePrompt(made["image encoder"], made["image adapter"], config.image_tokens)
    return Networks(
        latents=Latents(made["vae"]),
        denoiser=Denoiser(made["unet"], made["controlnet"], table).eval(),
        image_prompt=prompt,
        schedule=Schedule(table),
        device=device,
        dtype=dtype,
        model=config,
        text=text,
    )


def from_folder(
    name: str, settings: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[Networks, SamplerConfig]:
    """The networks of a model folder or bundled model, and its own settings changed by `settings`."""
    model = load_model(find_model(name), dtype=dtype, **settings)
    networks = [model.latents, model.denoiser(), model.image_prompt]
    for network in networks:
        if network is not None:
            network.eval().requires_grad_(False).to(device, dtype)
    text = from_dict(model.prompts, device)
    made = Networks(*networks, Schedule(model.alpha_bar), device, dtype, model.config.model, text)
    return made, model.config.sampler


def build(
    size: str, method: SamplingMethod, device: torch.device, dtype: torch.dtype, keep_text: bool = True
) -> tuple[Networks, SamplerConfig]:
    """The networks, and the settings of a method: at full size those given, else the model's own changed by them.

    keep_text: whether the text encoder of the full size stays in memory.
    """
    settings = method.settings | {"tile": 0, "vae_tile": 0}
    if size != SD21:
        return from_folder(size, settings, device, dtype)
    config = SamplerConfig(**settings)
    prompts = None if keep_text else list(dict.fromkeys([config.positive, config.negative]))
    return full_size(method.networks, prompts, device, dtype), config
