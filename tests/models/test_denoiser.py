"""The denoiser: conditions, output types, guidance."""

from __future__ import annotations

import pytest
import torch

from consissr.config.model import ModelConfig
from consissr.errors import UserError
from consissr.models.controlnet import build_controlnet
from consissr.models.denoiser import Condition, Denoiser, guided
from consissr.models.residual import ResidualDenoiser
from consissr.models.surgery import replace_blocks

ALPHA_BAR = torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_conditions_join_and_repeat():
    a, b = (Condition(draw(2, 7, 24) + i, draw(2, 4, 8, 8) + i, draw(2, 1, 24) + i) for i in (0, 1))
    both = a.cat(b)
    assert torch.equal(both.text, torch.cat([a.text, b.text]))
    assert torch.equal(both.hint, torch.cat([a.hint, b.hint]))
    assert torch.equal(both.image, torch.cat([a.image, b.image]))
    assert torch.equal(a.repeat(2).image, torch.cat([a.image, a.image]))
    assert torch.equal(both.rows(slice(2, 4)).hint, b.hint)
    assert a.to(torch.bfloat16).text.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="only one"):
        a.cat(Condition(b.text, b.hint))


@torch.no_grad()
def test_v_prediction_becomes_eps_in_float32(make_unet):
    """A UNet that puts out the exact v of a known z_0 and eps must give that eps, even moved to bfloat16."""
    z0, eps, t = draw(3, 4, 8, 8), draw(3, 4, 8, 8).flip(0), torch.tensor([0, 500, 999])
    a = ALPHA_BAR[t].float().view(-1, 1, 1, 1)
    z_t, v = a.sqrt() * z0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * z0
    denoiser = Denoiser(make_unet(), None, ALPHA_BAR, "v_prediction").to(torch.bfloat16)
    assert torch.allclose(denoiser.to_eps(v, z_t, t, z0), eps, atol=1e-5)
    unet = make_unet()
    given = Condition(draw(3, 7, 24), draw(3, 4, 8, 8))
    raw = unet(z_t, t, given.text).sample
    got = Denoiser(unet, None, ALPHA_BAR, "v_prediction")(z_t, t, given)
    assert torch.allclose(got, a.sqrt() * raw + (1 - a).sqrt() * z_t, atol=1e-5)
    assert torch.equal(Denoiser(unet, None, ALPHA_BAR)(z_t, t, given), raw)


def test_output_as_v_of_the_residual():
    """The exact v of (z_hq - z_lq) / s gives the noise of z_hq; an output of 0 at T gives z_lq and hardly any noise."""
    s, t = 0.5, torch.tensor([0, 500, 999])
    z_lq, residual, eps = draw(3, 4, 8, 8), 0.5 * draw(3, 4, 8, 8).flip(1), draw(3, 4, 8, 8).flip(0)
    a = ALPHA_BAR[t].float().view(-1, 1, 1, 1)
    z_t = a.sqrt() * (z_lq + residual) + (1 - a).sqrt() * eps
    size = (s**2 * a + 1 - a).sqrt()
    v = (s * a.sqrt() * eps - (1 - a).sqrt() * residual / s) / size
    denoiser = ResidualDenoiser(torch.nn.Identity(), None, ALPHA_BAR, "v_prediction", residual=s)
    assert torch.allclose(denoiser.to_eps(v, z_t, t, z_lq), eps, atol=1e-4)
    eps_T = denoiser.to_eps(torch.zeros_like(v), z_t, t, z_lq)[2]
    x0 = (z_t[2] - (1 - a[2]).sqrt() * eps_T) / a[2].sqrt()
    assert (x0 - z_lq[2]).std() < 0.1 * eps.std()
    with pytest.raises(UserError, match="predicts v"):
        ResidualDenoiser(torch.nn.Identity(), None, ALPHA_BAR, residual=s)


@torch.no_grad()
def test_guidance_is_one_batched_pass_of_the_formula(make_unet, fill):
    unet, calls = make_unet(), []
    controlnet = build_controlnet(unet, ModelConfig())
    fill(controlnet)
    replace_blocks(unet, ModelConfig())
    denoiser = Denoiser(unet, controlnet, ALPHA_BAR)
    denoiser.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    positive, negative = (Condition(draw(2, 7, 24) + i, draw(2, 4, 8, 8)) for i in (0, 1))
    z, t = draw(2, 4, 8, 8), torch.tensor([5, 900])
    eps = guided(denoiser, positive, negative, 4.5)(z, t)
    assert calls == [4]
    pos, neg = denoiser(z, t, positive), denoiser(z, t, negative)
    assert torch.allclose(eps, neg + 4.5 * (pos - neg), atol=1e-4)
    assert (pos - neg).abs().max() > 1e-3
    assert torch.equal(guided(denoiser, positive, negative, 1.0)(z, t), pos)
    with pytest.raises(UserError, match="negative prompt"):
        guided(denoiser, positive, None, 4.5)


@torch.no_grad()
def test_float32_latents_run_through_bfloat16_networks(make_unet, fill):
    unet = make_unet()
    controlnet = build_controlnet(unet, ModelConfig())
    fill(controlnet)
    replace_blocks(unet, ModelConfig())
    denoiser = Denoiser(unet, controlnet, ALPHA_BAR)
    z, t, given = draw(2, 4, 8, 8), torch.tensor([5, 900]), Condition(draw(2, 7, 24), draw(2, 4, 8, 8))
    exact = denoiser(z, t, given)
    rounded = denoiser.to(torch.bfloat16)(z, t, given)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05


def test_condition_and_model_must_agree_on_the_image(make_unet):
    z, t, text, image = draw(1, 4, 8, 8), torch.tensor([5]), draw(1, 7, 24), draw(1, 1, 24)
    without, having = make_unet(), make_unet()
    replace_blocks(having, ModelConfig(image_prompt="hpa"))
    for unet, given in ((without, image), (having, None)):
        with pytest.raises(ValueError, match="both or neither"):
            Denoiser(unet, None, ALPHA_BAR)(z, t, Condition(text, z, given))
    with pytest.raises(UserError, match="sample"):
        Denoiser(without, None, ALPHA_BAR, "sample")
