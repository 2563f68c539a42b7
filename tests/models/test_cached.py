"""The cross-attention's fast form: the plain form's results, from prompts that were read once."""

from __future__ import annotations

from dataclasses import replace

import torch

from consissr.config.model import ModelConfig
from consissr.models.controlnet import build_controlnet
from consissr.models.denoiser import Condition, Denoiser
from consissr.models.surgery import added_parameters, replace_blocks

ALPHA_BAR = torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)
FORMS = [ModelConfig()] + [
    ModelConfig(image_prompt=prompt, image_kv=kv, image_tokens=tokens)
    for prompt, kv in (("hpa", "shared"), ("hpa", "separate"), ("hpa_separate", "shared"), ("ip_adapter", "shared"))
    for tokens in ("pooled", "patches")
]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def test_prepared_prompts_give_the_plain_forms_results(make_unet, fill):
    """In UNet and ControlNet, with additions that act; the prompts themselves are not read again."""
    z, t = draw(2, 4, 16, 16), torch.tensor([5, 900])
    for config in FORMS:
        image = None
        if config.image_prompt != "none":
            image = draw(2, 1 if config.image_tokens == "pooled" else 5, 24)
        given = Condition(draw(2, 7, 24), draw(2, 4, 16, 16), image)
        unet = make_unet()
        replace_blocks(unet, config)
        controlnet = build_controlnet(unet, config)
        fill(controlnet)
        generator = torch.Generator().manual_seed(7)
        for network in (unet, controlnet):
            for name in added_parameters(network):
                network.get_parameter(name).data.normal_(std=0.3, generator=generator)
        denoiser = Denoiser(unet, controlnet, ALPHA_BAR)
        plain, prepared = denoiser(z, t, given), denoiser.prepare(given)
        assert torch.allclose(denoiser(z, t, prepared), plain, atol=2e-5), config
        kept = {value.shape[1] for name, value in prepared.cache.items() if name.startswith("image")}
        assert kept <= {1 if config.image_tokens == "pooled" else 2}, "a single token adds one vector"
        unread = replace(prepared, text=torch.zeros_like(given.text), hint=torch.zeros_like(given.hint))
        if config.image_prompt in ("hpa", "ip_adapter"):
            unread.image = torch.zeros_like(image)
        assert torch.equal(denoiser(z, t, unread), denoiser(z, t, prepared)), config
        assert (denoiser(z, t, replace(unread, cache={})) - plain).abs().max() > 1e-3, "the prompts must matter"
        half = prepared.rows(slice(1, 2))
        assert torch.allclose(denoiser(z[1:], t[1:], half), plain[1:], atol=2e-5), config
