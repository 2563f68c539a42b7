"""CCSR v1's stage-2 checkpoint, as the authors' class writes it and as it was redistributed."""

import json

import pytest
import torch
from safetensors.torch import save_file

from consissr.errors import UserError
from consissr.weights.files import read_weights
from consissr.weights.released_ccsr import read_v1
from tests.weights.standin import v1_state


@pytest.fixture(scope="module")
def state(shared):
    return v1_state(json.loads((shared / "reference" / "ccsr_v1_stage2_keys.json").read_text()))


def same(one, two) -> bool:
    """Whether two networks hold the same values."""
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_key_is_accounted_for(state):
    found = read_v1(state)
    used = sum(found.report.used.values()) + sum(len(keys) for keys in found.report.ignored.values())
    assert len(state) == 825 == used - 2, "one convolution over latent and hint becomes two: a weight and a bias more"
    assert found.kind == "CCSR v1"
    assert found.hint_latents is None and found.unet.config.attention_head_dim == (1, 2, 2)
    assert torch.equal(found.controlnet.conv_in.weight, state["control_model.input_blocks.0.0.weight"][:, :4])


def test_what_only_training_needs_may_be_missing_or_more(state):
    """Every subset that was redistributed gives the same networks; an encoder that differs is kept."""
    whole = read_v1(state)
    training = ("decoder_loss.", "betas", "alphas", "sqrt_", "log_one", "posterior_", "logvar")
    for drop in (training, ("cond_encoder.",), ("cond_stage_model.model.logit_scale", *training)):
        found = read_v1({name: value for name, value in state.items() if not name.startswith(drop)})
        for network in ("unet", "controlnet", "latents"):
            assert same(getattr(found, network), getattr(whole, network)), (drop, network)
        assert found.hint_latents is None and same(found.text, whole.text)
    lpips = {"decoder_loss.perceptual_loss.net.slice1.0.weight": torch.zeros(64, 3, 3, 3)}
    more = read_v1(state | lpips | {"model_ema.decay": torch.zeros(()), "model_ema.num_updates": torch.zeros(())})
    assert same(more.unet, whole.unet)
    other = read_v1(state | {"cond_encoder.encoder.conv_in.bias": state["cond_encoder.encoder.conv_in.bias"] + 1})
    assert other.hint_latents is not None and same(other.latents, whole.latents)


def test_half_precision_with_its_rounded_schedule(state, tmp_path):
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file({f"module.{name}": value.clone() for name, value in half.items()}, tmp_path / "half.safetensors")
    found = read_v1(read_weights(tmp_path / "half.safetensors"))
    weight = "control_model.input_blocks.0.0.weight"
    assert torch.equal(found.controlnet.conv_in.weight, state[weight][:, :4].half().float())
    assert found.hint_latents is None


def test_weights_are_strict(state):
    some = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    for wrong, said in (
        ({some: state[some][:1]}, "another shape"),
        ({some: state[some].to(torch.int8)}, "no floating-point numbers"),
        ({"control_model.extra.weight": state[some]}, "unknown"),
        ({"alphas_cumprod": torch.linspace(0.99, 0.01, 1000)}, "noise schedule"),
    ):
        with pytest.raises(UserError, match=said):
            read_v1(state | wrong)
    with pytest.raises(UserError, match="lacks"):
        read_v1({name: value for name, value in state.items() if name != some})
