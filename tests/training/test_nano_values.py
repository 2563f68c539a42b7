"""The base stages of `nano` written out: the autoencoder's, the encoder pair's and the prior's losses and gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from consissr.nano.captions import caption
from consissr.nano.config import run_config
from consissr.weights.latents import load_latents
from scripts.train import stage_builder
from tests.training import plain
from tests.training.tiny import words


def built(stage: str, photos: Path, runs: Path, *more: str) -> tuple:
    """The stage of the tiny configuration, and its phase."""
    _, path, *overrides = words(stage, photos, runs, *more)
    config = run_config(path, overrides)
    torch.manual_seed(1)
    made = stage_builder(config.stage)(config)
    (phase,) = made.phases
    return made, phase


def test_the_autoencoders_loss(photos: Path, tmp_path: Path) -> None:
    """L1 of pixels, of their differences, and the Kullback-Leibler term, from a posterior sample."""
    weights = ["autoencoder.kl_weight=0.3", "autoencoder.gradient_weight=2"]
    stage, phase = built("autoencoder", photos, tmp_path, *weights)
    with torch.no_grad():
        for parameter in phase.parameters.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    batch = plain.recorded(2)
    found = plain.learnt(stage, phase, batch)

    (noise,), latents = batch.normals, stage.networks
    mean, logvar = latents.moments(batch.hq)
    difference = latents.decode(mean + (logvar / 2).exp() * noise) - batch.hq
    across = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    down = (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    kl = ((mean**2 + logvar.exp() - 1 - logvar) / 2).mean()
    loss = difference.abs().mean() + 2 * (across + down) / 2 + 0.3 * kl
    plain.close(found["loss"], loss)
    plain.same_gradients(phase.parameters, loss)
    assert {id(p) for p in phase.parameters.values()} == {id(p) for p in latents.parameters()}
    with torch.no_grad():
        plain.close(stage.restore(batch), latents.decode(mean))


def test_the_encoder_pairs_loss(photos: Path, tmp_path: Path) -> None:
    """Cross-entropy of scaled cosines in both directions; images with equal captions share the target."""
    stage, phase = built("clip", photos, tmp_path)
    batch = plain.recorded(4)
    stage.prepare(batch)
    images, tokens = batch.cache["images"], batch.cache["tokens"]
    assert torch.equal(tokens, stage.tokens([caption(image) for image in images]))
    tokens[3] = tokens[1]
    plain.start(phase, stage.networks)
    found = phase.loss(batch, 0)
    found["loss"].backward()

    mean, std = torch.tensor((0.48145466, 0.4578275, 0.40821073)), torch.tensor((0.26862954, 0.26130258, 0.27577711))
    image = stage.tower(((images + 1) / 2 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    text = stage.contrast.projection(stage.text(tokens).pooler_output)
    image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
    logits = stage.contrast.log_scale.exp() * image @ text.T
    target = torch.eye(4)
    target[1, 3] = target[3, 1] = target[1, 1] = target[3, 3] = 0.5
    rows, columns = (-(target * x.log_softmax(1)).sum(1).mean() for x in (logits, logits.T))
    plain.close(found["loss"], (rows + columns) / 2)
    plain.same_gradients(phase.parameters, (rows + columns) / 2)
    assert stage.contrast.log_scale.exp().item() == pytest.approx(1 / 0.07)


def test_the_priors_loss(photos: Path, runs: Path) -> None:
    """v = sqrt(a) eps - sqrt(1 - a) z_0 at z_t, t uniform; latents by the autoencoder's mode and its own scale."""
    stage, phase = built("prior", photos, runs)
    t = torch.tensor([20, 900])
    batch = plain.recorded(2, integer=[t])
    unet = plain.only(stage.networks, UNet2DConditionModel)
    with plain.watched(unet=unet) as given:
        found = plain.learnt(stage, phase, batch)
    latents = load_latents(runs / "autoencoder/vae")
    assert latents.scale == json.loads((runs / "autoencoder/vae/config.json").read_text())["scaling_factor"] != 1
    z, (eps,) = (latents.moments(batch.hq)[0] * latents.scale).detach().double(), batch.normals
    z_t = plain.noised(z, eps.double(), t)
    v = plain.level(t).sqrt() * eps.double() - (1 - plain.level(t)).sqrt() * z
    (call,) = given["unet"]
    plain.close(call["sample"], z_t)
    loss = plain.mse(unet(z_t.float(), t, call["encoder_hidden_states"]).sample, v)
    plain.close(found["loss"], loss)
    plain.same_gradients(phase.parameters, loss)
    assert batch.highs == [1000] and stage.restore(batch) is None
