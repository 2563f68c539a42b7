"""Restorer with a small model of random weights: inputs, noise, tiles, mistakes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ccsr import nuts_plan
from consissr.diffusion.plans import ddpm_plan
from consissr.errors import UserError
from consissr.restorer import Restorer


@pytest.fixture(scope="module")
def restorer(tiny_model):
    return Restorer.load(str(tiny_model), device="cpu")


@pytest.fixture
def picture(rng):
    def make(width, height, mode="RGB"):
        return Image.fromarray(rng.integers(0, 256, (height, width, 4)).astype(np.uint8)).convert(mode)

    return make


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16"])
def test_the_same_kind_comes_back(restorer, picture, mode):
    image = picture(9, 14, "RGB" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.arange(126, dtype=np.uint16).reshape(14, 9) * 500)
    result = restorer(image, scale=2)
    assert result.size == (18, 28)
    assert result.mode == {"P": "RGB"}.get(mode, mode)


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (127, 40)])
@pytest.mark.parametrize("scale", [1, 1.3])
def test_sizes_are_exact(restorer, picture, size, scale):
    assert restorer(picture(*size), scale).size == tuple(int(scale * side + 0.5) for side in size)


def test_lists_and_tensors(restorer, picture):
    images = [picture(8, 8), picture(12, 8), picture(8, 8)]
    results = restorer(images, scale=2)
    assert [image.size for image in results] == [(16, 16), (24, 16), (16, 16)]
    x = torch.rand(2, 3, 8, 12) * 2 - 1
    assert restorer(x, scale=2).shape == (2, 3, 16, 24)
    assert restorer(x, longest=18).shape == (2, 3, 12, 18)


def test_noise_depends_on_seed_key_and_repeat_only(restorer):
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = restorer(x, 2, keys=["a", "b", "c"], batch_size=3)
    alone = restorer(x[1:2], 2, keys=["b"])
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    assert torch.equal(alone, restorer(x[1:2], 2, keys=["b"]))
    for changes in ({"keys": ["x"]}, {"seed": 1}, {"repeat": 1}):
        assert not torch.allclose(restorer(x[1:2], 2, **({"keys": ["b"]} | changes)), alone, atol=1e-3)
    numbered = restorer(x[1:2], 2, seed=3, keys=[7])
    assert torch.equal(restorer(x[1:2], 2, seed=np.int64(3), keys=np.array([7])), numbered), "a number is a number"


def test_fidelity(restorer, monkeypatch):
    """1, the default, changes nothing; 0 is the UNet without its ControlNet; colours follow unless told otherwise."""
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    usual = restorer(x, 2)
    assert torch.equal(restorer(x, 2, fidelity=1.0, color_strength=1.0), usual)
    free = restorer(x, 2, fidelity=0.0)
    assert torch.equal(free, restorer(x, 2, fidelity=0.0, color_strength=0.0))
    assert torch.equal(free, restorer(x, 2, fidelity=0.0, color_fix="none"))
    between = [(restorer(x, 2, fidelity=f, color_fix="none") - free).abs().mean() for f in (0.25, 0.5, 0.75)]
    assert 0 < between[0] < between[1] < between[2]
    said = restorer.denoiser.controlnet.forward

    def nothing(*args, **options):
        down, middle = said(*args, **options)
        return [torch.zeros_like(one) for one in down], torch.zeros_like(middle)

    with monkeypatch.context() as silent:
        silent.setattr(restorer.denoiser.controlnet, "forward", nothing)
        assert torch.equal(restorer(x, 2, color_fix="none"), free)
    for value in (1.5, -0.1, float("nan")):
        with pytest.raises(UserError, match="use 0 to 1"):
            restorer(x, 2, fidelity=value)


def test_plans_are_followed(restorer):
    x, seen = torch.zeros(1, 3, 8, 8), []

    def watch(index, step, eps, x0):
        seen.append(step.t)

    for plan in (None, nuts_plan(1), ddpm_plan(3)):
        restorer(x, 2, plan=plan, on_step=watch)
    restorer(x, 2, plan=None, on_step=watch, timesteps=[[800, -1, "x0"]])
    assert seen == [999, 666, 999, 999, 500, 0, 800]


def test_steps_alone_cannot_make_a_nuts_plan(restorer):
    with pytest.raises(UserError, match="nuts_plan"):
        restorer(torch.zeros(1, 3, 8, 8), steps=12)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"guidence": 2}, "guidance"),
        ({"color_fix": "adane"}, "adain"),
        ({"scale": 0}, "scale is 0"),
        ({"scale": "4"}, "scale is '4'"),
        ({"scale": float("inf")}, "scale is inf: use a finite number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"longest": 2.5}, "longest is 2.5"),
        ({"keys": ["a", "b"]}, "keys"),
        ({"keys": [Path("a")]}, "key .*Path.* use text or whole numbers"),
        ({"seed": 1.0}, "seed is 1.0: use a whole number"),
        ({"repeat": "0"}, "repeat is '0'"),
        ({"positive": "sharp"}, "sharp"),
        ({"tile": 1}, "tile 1"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"tile": 32, "tile_overlap": 40}, "overlap"),
    ],
)
def test_mistakes_are_named(restorer, settings, said):
    with pytest.raises(UserError, match=said):
        restorer(torch.zeros(1, 3, 8, 8), **settings)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["photo.png"], "restore a str: give"),
        (Image.new("RGB", (0, 5)), "a picture of 0x5 pixels"),
        ([Image.new("L", (5, 0))], "a picture of 5x0 pixels"),
        (torch.zeros(3, 8, 8), r"float32 \(3, 8, 8\): give floats"),
        (torch.zeros(1, 4, 8, 8), r"\(1, 4, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), r"\(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, 0, 8), r"\(1, 3, 0, 8\)"),
        (torch.full((1, 3, 8, 8), 255.0), "values up to 255: give floats in"),
        ((x for x in ()), "restore a generator: give"),
    ],
)
def test_what_is_not_an_image_is_named(restorer, wrong, said):
    with pytest.raises(UserError, match=said):
        restorer(wrong)


def test_unknown_model_and_precision_are_named(tiny_model):
    with pytest.raises(UserError, match="nano-ccsr"):
        Restorer.load("nano-ccrs")
    with pytest.raises(UserError, match="fp8"):
        Restorer.load(str(tiny_model), device="cpu", precision="fp8")


def test_bf16_on_the_cpu_where_its_instructions_are(monkeypatch):
    """Torch is asked; where it has no such questions, float32 is safe."""
    from consissr.weights import precision

    def chosen():
        return precision.choose_precision("auto", "cpu")

    amx, avx = precision.BF16_INSTRUCTIONS
    assert chosen() == "fp32"
    for name in (amx, avx):
        with monkeypatch.context() as context:
            context.setattr(torch.cpu, name, lambda: True)
            assert chosen() == "bf16" and precision.choose_precision("fp32", "cpu") == "fp32"
    monkeypatch.delattr(torch.cpu, avx)
    assert chosen() == "fp32"
    assert precision.choose_precision("auto", "mps") == "fp32"
    monkeypatch.undo()
    assert chosen() == "fp32"


def with_embeddings(restorer, **settings):
    """The same networks with two prompts' embeddings."""
    generator = torch.Generator().manual_seed(5)
    prompts = {name: torch.randn(1, 3, 8, generator=generator) for name in ("good", "bad")}
    sampler = restorer.sampler.__class__(**(vars(restorer.sampler) | settings))
    return Restorer(restorer.latents, restorer.denoiser, restorer.schedule, prompts, sampler=sampler)


def test_guidance_and_the_first_prompt(restorer):
    x, results = torch.zeros(1, 3, 8, 8), {}
    for first in ("guided", "positive", "negative"):
        made = with_embeddings(restorer, positive="good", negative="bad", guidance=3.0, first_prompt=first)
        evaluated = []
        hook = made.denoiser.register_forward_hook(
            lambda module, inputs, out, kept=evaluated: kept.append((len(inputs[0]), inputs[2].text[0, 0, 0].item()))
        )
        results[first] = made(x, 2)
        hook.remove()
        good, bad = (made.prompts[name][0, 0, 0].item() for name in ("good", "bad"))
        assert [rows for rows, _ in evaluated] == ([2, 2] if first == "guided" else [1, 2])
        assert evaluated[0][1] == pytest.approx(good if first == "positive" else bad)
    assert not torch.equal(results["positive"], results["negative"])
    assert not torch.equal(results["positive"], results["guided"])


def test_posterior_samples(restorer):
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mode, sampled = restorer(x, 2), restorer(x, 2, posterior="sample")
    assert not torch.equal(mode, sampled)
    assert torch.equal(sampled, restorer(x, 2, posterior="sample"))


def test_tiles_change_little(restorer):
    x = torch.rand(1, 3, 48, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = restorer(x, 2, tile=0, vae_tile=0)
    exact = restorer(x, 2, tile=0, vae_tile=32)
    assert torch.allclose(exact, whole, atol=1e-3)
    tiled, other_seed = restorer(x, 2, tile=64, vae_tile=0), restorer(x, 2, seed=1, tile=0, vae_tile=0)
    assert 0 < (tiled - whole).abs().mean() < (other_seed - whole).abs().mean()


def test_progress_counts_every_tile(restorer):
    x, told = torch.zeros(1, 3, 48, 40), []
    restorer(x, 2, tile=64, tile_overlap=16, vae_tile=32, vae_tiling="sampled", on_tile=lambda *now: told.append(now))
    # 96 x 80 pixels: 2 x 2 windows in two evaluations, 3 x 3 autoencoder tiles both ways
    assert [done for done, *_ in told] == list(range(1, 27)) and {number for _, number, _ in told} == {26}
    shares = [share for *_, share in told]
    assert shares == sorted(shares) and shares[-1] == 1 and 0 < shares[0] < 0.1
    for tiling in ("exact", "as_released"):  # which tell of the whole, and nothing
        restorer(x, 2, tile=64, tile_overlap=16, vae_tile=32, vae_tiling=tiling, on_tile=lambda *now: told.append(now))
        assert told[-1] == (told[-1][1], told[-1][1], 1)


@pytest.mark.parametrize(
    "geometry", ["ccsr", *(pytest.param(g, marks=pytest.mark.slow) for g in ("ccsr_v1", "consissr"))]
)
def test_released_size_rules_run(restorer, picture, geometry):
    assert restorer(picture(20, 24), 2, plan=nuts_plan(1), geometry=geometry).size == (40, 48)


def test_intermediate_latents_decode(restorer):
    assert restorer.decode(torch.zeros(2, 4, 5, 6)).shape == (2, 3, 20, 24)


def test_timesteps_written_out_win_under_every_plan(restorer):
    """As in training's validation and under infer.py --config; other plan settings replace them."""
    config = replace(restorer.sampler, plan="ddpm", steps=50, timesteps=[[999, 499, "step"], [499, -1, "x0"]])
    assert [step.t for step in restorer.plan(config, None)] == [999, 499]
    assert len(restorer.plan(config, None, {"steps": 50})) == 50
    assert [step.t for step in restorer.plan(config, None, {"steps": 50, "timesteps": config.timesteps})] == [999, 499]


def test_tensors_of_other_types_and_devices_come_back_as_float32(restorer):
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = restorer(x.bfloat16(), 2)
    assert whole.dtype == torch.float32 and torch.equal(whole, restorer(x.bfloat16().float(), 2))


def test_settings_of_loading_are_followed():
    """The model's own plan, written out in its folder, does not win over them."""
    own, other = (Restorer.load("nano-ccsr", "cpu", "fp32", **words) for words in ({}, {"plan": "ddpm", "steps": 2}))
    x = torch.zeros(1, 3, 8, 8)
    assert not torch.equal(own(x, 2), other(x, 2))
    with pytest.raises(UserError, match="nuts_plan"):
        Restorer.load("nano-ccsr", "cpu", "fp32", steps=2)(x, 2)


def test_small_photographs_are_made_at_the_short_side(restorer):
    """SD2.1 below 512 pixels makes things up: `short_side` raises the input and brings the result back."""
    x = torch.zeros(1, 3, 8, 12)
    assert restorer.prepared(x, 2, restorer.sampler, None).shape == (16, 24)
    raised = restorer.prepared(x, 2, replace(restorer.sampler, short_side=64), None)
    assert min(raised.shape) == 64 and restorer(x, 2, short_side=64).shape == (1, 3, 16, 24)
