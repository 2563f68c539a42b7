"""The denoiser: conditions, output types, guidance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from consissr.config.model import ModelConfig
from consissr.errors import UserError
from consissr.models.controlnet import build_controlnet
from consissr.models.denoiser import Condition, Denoiser, guided
from consissr.models.residual import ResidualDenoiser
from consissr.models.surgery import replace_blocks

ALPHA_BAR = torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)
NOT_ASKED = torch.nn.Identity()
"""In the place of a network that a test does not come to."""


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_conditions_join():
    a, b = (Condition(draw(2, 7, 24) + i, draw(2, 4, 8, 8) + i, draw(2, 1, 24) + i) for i in (0, 1))
    both = a.cat(b)
    assert torch.equal(both.text, torch.cat([a.text, b.text]))
    assert torch.equal(both.hint, torch.cat([a.hint, b.hint]))
    assert torch.equal(both.image, torch.cat([a.image, b.image]))
    assert torch.equal(both.rows(slice(2, 4)).hint, b.hint)
    assert a.to(torch.bfloat16).text.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="^only one of two conditions has image tokens"):
        a.cat(Condition(b.text, b.hint))


def test_what_was_computed_of_a_prompt_goes_with_it():
    """Cached tensors are mapped and joined like their sources, and dropped with them."""
    text, hint, image = draw(2, 7, 24), draw(2, 4, 8, 8), draw(2, 1, 24)
    a = Condition(text, hint, image, {"text.0": draw(2, 3), "image.0": draw(2, 5), "hint": draw(2, 6)})
    b = Condition(text, hint, image, {"text.0": draw(2, 3) + 1, "hint": draw(2, 6)})
    assert set(a.changed(text=text + 1).cache) == {"image.0", "hint"}
    assert set(a.changed(hint=hint + 1, image=image).cache) == {"text.0"}
    assert torch.equal(a.changed(hint=hint + 1).hint, hint + 1) and a.changed(hint=hint).text is text
    both = a.cat(b)
    assert set(both.cache) == {"text.0", "hint"}, "only what both have"
    assert torch.equal(both.cache["text.0"], torch.cat([a.cache["text.0"], b.cache["text.0"]]))
    assert torch.equal(a.rows(slice(1, 2)).cache["image.0"], a.cache["image.0"][1:])
    assert set(a.tensors()) == {"text", "hint", "image"} and set(Condition(text, hint).tensors()) == {"text", "hint"}
    assert Condition(text, hint).to(torch.bfloat16).image is None
    soft = a.with_soft(draw(2, 3, 24).double())
    assert torch.equal(soft.text, torch.cat([text, draw(2, 3, 24)], dim=1)) and set(soft.cache) == {"image.0", "hint"}
    assert soft.text.dtype == torch.float32 and a.with_soft(None) is a


@torch.no_grad()
def test_what_each_network_is_given(make_unet, fill):
    """Both see z_t, t and the prompts; the ControlNet alone the hint; its outputs go into the UNet."""
    unet, seen = make_unet(), {}
    replace_blocks(unet, ModelConfig(image_prompt="hpa"))
    controlnet = build_controlnet(unet, ModelConfig(image_prompt="hpa"))
    fill(controlnet)
    for name, network in (("unet", unet), ("controlnet", controlnet)):
        network.register_forward_hook(
            lambda _, args, kwargs, out, name=name: seen.update({name: (args, kwargs, out)}), with_kwargs=True
        )
    hints = []
    controlnet.controlnet_cond_embedding.register_forward_hook(lambda _, args, out: hints.append(args[0]))
    z, t, given = (
        draw(2, 4, 8, 12),
        torch.tensor([5, 900]),
        Condition(*(draw(2, *n) for n in ((7, 24), (4, 8, 12), (1, 24)))),
    )
    Denoiser(unet, controlnet, ALPHA_BAR)(z, t, given)
    for args, kwargs, _ in seen.values():
        assert all(map(torch.equal, args[:3], (z, t, given.text)))
        read = kwargs["cross_attention_kwargs"]
        assert torch.equal(read["image"], given.image) and read["size"] == (8, 12)
    assert torch.equal(hints[0], given.hint)
    down, middle = seen["controlnet"][2]
    assert all(map(torch.equal, seen["unet"][1]["down_block_additional_residuals"], down)) and len(down) > 3
    assert torch.equal(seen["unet"][1]["mid_block_additional_residual"], middle)
    Denoiser(unet, controlnet, ALPHA_BAR)(z, t, replace(given, strength=0.25).cat(given).rows(slice(0, 2)))
    weaker = [*seen["unet"][1]["down_block_additional_residuals"], seen["unet"][1]["mid_block_additional_residual"]]
    assert all(torch.equal(now, 0.25 * before) for now, before in zip(weaker, [*down, middle], strict=True))


@torch.no_grad()
def test_preparing_computes_what_a_prepared_condition_lacks(make_unet):
    """Positive and negative prompt share image tokens and hint: those are computed once."""
    unet, given = make_unet(), Condition(draw(2, 7, 24), draw(2, 4, 8, 8))
    replace_blocks(unet, ModelConfig(image_prompt="hpa"))
    denoiser = Denoiser(unet, build_controlnet(unet, ModelConfig(image_prompt="hpa")), ALPHA_BAR)
    first = denoiser.prepare(Condition(given.text, given.hint, draw(2, 1, 24)))
    names = {name.partition(".")[0] for name in first.cache}
    assert names == {"text", "image", "hint"} and len(first.cache) == 2 * (7 + 3) + 1
    other = denoiser.prepare(Condition(given.text + 1, given.hint, first.image), like=first)
    assert other.cache.keys() == first.cache.keys()
    for name, value in other.cache.items():
        assert (value is first.cache[name]) == (not name.startswith("text")), name
    assert "hint" not in denoiser.prepare(Condition(given.text, given.hint, first.image), hint=False).cache
    again = denoiser.prepare(first)
    assert all(again.cache[name] is value for name, value in first.cache.items())
    unlike = denoiser.prepare(Condition(given.text, given.hint + 1, first.image + 1), like=first)
    assert {name for name, value in unlike.cache.items() if value is first.cache[name]} == {
        name for name in first.cache if name.startswith("text")
    }


def test_guidance_by_hand():
    """Negative 1 and positive 3 at a guidance of 5: 1 + 5 (3 - 1) = 11; guidance 1 asks for the positive alone."""
    calls = []

    def denoiser(z, t, condition):
        calls.append((len(z), t.tolist(), condition.text.flatten().tolist()))
        return z + condition.text.view(-1, 1, 1, 1)

    positive, negative = (Condition(torch.full((1, 1, 1), v), torch.zeros(1, 1, 1, 1)) for v in (3.0, 1.0))
    z, t = torch.zeros(1, 1, 1, 1), torch.tensor([7])
    assert guided(denoiser, positive, negative, 5.0)(z, t).item() == 11
    assert guided(denoiser, positive, negative)(z, t).item() == guided(denoiser, positive)(z, t).item() == 3
    assert calls == [(2, [7, 7], [1, 3]), (1, [7], [3]), (1, [7], [3])]


def test_guidance_prepares_both_prompts_once():
    """The negative one like the positive, whose image tokens and hint it shares; three images make six rows."""

    class Prepares:
        calls = []

        def prepare(self, condition, like=None):
            self.calls.append((condition, like))
            return Condition(condition.text + 10, condition.hint)

        def __call__(self, z, t, condition):
            return z + condition.text.view(-1, 1, 1, 1)

    positive, negative = (Condition(torch.full((3, 1, 1), v), torch.zeros(3, 1, 1, 1)) for v in (3.0, 1.0))
    denoiser, z, t = Prepares(), torch.zeros(3, 1, 1, 1), torch.tensor([7, 8, 9])
    predict = guided(denoiser, positive, negative, 5.0)
    assert predict(z, t).flatten().tolist() == predict(z, t).flatten().tolist() == [21, 21, 21]  # 11 + 5 (13 - 11)
    (first, nothing), (second, like) = denoiser.calls
    assert first is positive and nothing is None and second is negative and torch.equal(like.text, positive.text + 10)


def test_coefficients_go_where_the_timesteps_are(make_unet):
    """("meta" stands for any device.)"""
    denoiser, t = Denoiser(make_unet(), NOT_ASKED, ALPHA_BAR, "v_prediction"), torch.tensor([3, 900])
    z = torch.zeros(2, 4, 8, 8)
    assert denoiser.to_eps(z.to("meta"), z.to("meta"), t.to("meta"), z.to("meta")).is_meta
    signal, noise = denoiser.coefficients(t)
    assert not signal.is_meta and signal.dtype == noise.dtype == torch.float32
    assert torch.equal(signal.flatten(), ALPHA_BAR[t].sqrt().float())
    assert torch.equal(noise.flatten(), (1 - ALPHA_BAR[t]).sqrt().float())


@torch.no_grad()
def test_v_prediction_becomes_eps_in_float32(make_unet):
    """A UNet that puts out the exact v of a known z_0 and eps must give that eps, even moved to bfloat16."""
    z0, eps, t = draw(3, 4, 8, 8), draw(3, 4, 8, 8).flip(0), torch.tensor([0, 500, 999])
    a = ALPHA_BAR[t].float().view(-1, 1, 1, 1)
    z_t, v = a.sqrt() * z0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * z0
    denoiser = Denoiser(make_unet(), NOT_ASKED, ALPHA_BAR, "v_prediction").to(torch.bfloat16)
    assert torch.allclose(denoiser.to_eps(v, z_t, t, z0), eps, atol=1e-5)
    unet = make_unet()
    given = Condition(draw(3, 7, 24), draw(3, 4, 8, 8))
    raw = unet(z_t, t, given.text).sample
    replace_blocks(unet, ModelConfig())
    networks = unet, build_controlnet(unet, ModelConfig())  # which adds zeros
    got = Denoiser(*networks, ALPHA_BAR, "v_prediction")(z_t, t, given)
    assert torch.allclose(got, a.sqrt() * raw + (1 - a).sqrt() * z_t, atol=1e-5)
    assert torch.equal(Denoiser(*networks, ALPHA_BAR)(z_t, t, given), raw)
    of_residual = ResidualDenoiser(*networks, ALPHA_BAR, "v_prediction", residual=0.5)
    assert torch.equal(of_residual(z_t, t, given), of_residual.to_eps(raw, z_t, t, given.hint))


def test_output_as_v_of_the_residual():
    """The exact v of (z_hq - z_lq) / s gives the noise of z_hq; an output of 0 at T gives z_lq and hardly any noise."""
    s, t = 0.5, torch.tensor([0, 500, 999])
    z_lq, residual, eps = draw(3, 4, 8, 8), 0.5 * draw(3, 4, 8, 8).flip(1), draw(3, 4, 8, 8).flip(0)
    a = ALPHA_BAR[t].float().view(-1, 1, 1, 1)
    z_t = a.sqrt() * (z_lq + residual) + (1 - a).sqrt() * eps
    size = (s**2 * a + 1 - a).sqrt()
    v = (s * a.sqrt() * eps - (1 - a).sqrt() * residual / s) / size
    denoiser = ResidualDenoiser(NOT_ASKED, NOT_ASKED, ALPHA_BAR, "v_prediction", residual=s)
    assert torch.allclose(denoiser.to_eps(v, z_t, t, z_lq), eps, atol=1e-4)
    eps_T = denoiser.to_eps(torch.zeros_like(v), z_t, t, z_lq)[2]
    x0 = (z_t[2] - (1 - a[2]).sqrt() * eps_T) / a[2].sqrt()
    assert (x0 - z_lq[2]).std() < 0.1 * eps.std()
    with pytest.raises(UserError, match="predicts v"):
        ResidualDenoiser(NOT_ASKED, NOT_ASKED, ALPHA_BAR, residual=s)


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
    with pytest.raises(UserError, match="^guidance is 4.5, which needs a negative prompt"):
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
    prepared = denoiser.prepare(given)
    assert {tensor.dtype for tensor in prepared.cache.values()} == {torch.bfloat16}
    assert prepared.text.dtype == torch.float32, "what was given stays as exact as it was"
    assert torch.allclose(denoiser(z, t, prepared), rounded, atol=0.02)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05


def test_condition_and_model_must_agree_on_the_image(make_unet):
    z, t, text, image = draw(1, 4, 8, 8), torch.tensor([5]), draw(1, 7, 24), draw(1, 1, 24)
    without, having = make_unet(), make_unet()
    replace_blocks(having, ModelConfig(image_prompt="hpa"))
    for unet, given in ((without, image), (having, None)):
        with pytest.raises(ValueError, match="^image tokens and an image branch: .* both or neither$"):
            Denoiser(unet, NOT_ASKED, ALPHA_BAR)(z, t, Condition(text, z, given))
