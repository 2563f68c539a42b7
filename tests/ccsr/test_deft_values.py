"""Stage 'deft' (Sec. III-C, CCSR) written out: both players' losses, gradients and inputs, and the restoration."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn
from torch.nn import functional as F

from ccsr.adversary import PatchGAN
from consissr.models.denoiser import Condition, Denoiser
from consissr.models.vae.latents import LinearPath, narrowed
from consissr.nano.config import run_config
from consissr.weights.latents import load_latents
from scripts.train import stage_builder
from tests.ccsr.test_nuts_values import LAST, built, predictor
from tests.training import plain

WORDS = ["stage=nano_deft", "data.crop=64", "deft.discriminator_width=8"]


@pytest.fixture(scope="module")
def model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stage 'nuts' leaves, all its layers awake."""
    stage, *_ = built(base)
    folder = tmp_path_factory.mktemp("model")
    stage.export(folder)
    return folder


def tuning(base: Path, model: Path, *words: str) -> tuple:
    """The stage, its first part's noise prediction, its decoder as (z -> image), and its discriminator."""
    config = run_config(None, [f"model.base={base}", f"init={model}", *WORDS, *words])
    torch.manual_seed(1)
    stage = stage_builder(config.stage)(config)
    vae = next(m for m in stage.networks.modules() if hasattr(m, "post_quant_conv") and hasattr(m, "decoder"))
    return stage, plain.only(stage.networks, Denoiser), vae, plain.only(stage.networks, PatchGAN)


def one_step(base: Path, denoiser: Denoiser, lq: Tensor, noise: Tensor) -> Tensor:
    """x0_from_T (B, C, h, w) of the frozen first stage."""
    z_lq = plain.latent(base, lq)
    z_T = plain.noised(z_lq.double(), noise.double(), LAST)
    with torch.no_grad():
        eps = predictor(denoiser, Condition(plain.text(base, len(lq)), z_lq))(z_T, LAST)
    return plain.clean(z_T, eps, LAST).float()


def feature_loss(judge: PatchGAN, image: Tensor, hq: Tensor) -> Tensor:
    """L1 between the discriminator's features of both, each layer relative to the photograph's mean size."""
    pairs = zip(judge(image)[1], judge(hq)[1], strict=True)
    return torch.stack([(a - b.detach()).abs().mean() / b.detach().abs().mean() for a, b in pairs]).mean()


def adaptive(reconstruction: Tensor, adversarial: Tensor, last: nn.Parameter) -> Tensor:
    """VQGAN's: the ratio of the gradients' norms at the decoder's last layer."""
    norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (reconstruction, adversarial)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


VARIANTS = {
    "": (1, True),
    "deft.adaptive=false deft.adversarial_weight=0.05": (1, True),
    "deft.adversarial_start=100": (100, False),  # up to and including this step there is no adversarial term
    "deft.adversarial_start=100 deft.perceptual_weight=3": (101, True),
    "deft.reconstruction=l2 deft.clamp=true deft.perceptual=none deft.adaptive=false": (101, True),  # as released
}
"""Words of the config: the step, and whether the adversarial term counts."""


@pytest.mark.parametrize("words", list(VARIANTS))
def test_the_decoders_loss(base: Path, model: Path, words: str) -> None:
    """Pixels, features and -mean D(image), the last at its weight times the adaptive one."""
    step, counts = VARIANTS[words]
    stage, denoiser, vae, judge = tuning(base, model, *words.split())
    batch, phase = plain.recorded(2), stage.phases[0]
    with torch.no_grad():
        stage.prepare(batch)
        for parameter in phase.parameters.values():
            parameter *= 1.5  # a decoder that puts out more than [-1, 1], and is not the base's
    plain.start(phase, stage.networks)
    found = phase.loss(batch, step)
    found["loss"].backward()

    (noise,) = batch.normals
    image = vae.decode(one_step(base, denoiser, batch.lq, noise) / plain.SCALE).sample
    assert image.abs().max() > 1, "the clamp is seen"
    if "clamp" in words:
        image = image.clamp(-1, 1)
    pixel = (image - batch.hq).square().mean() if "l2" in words else (image - batch.hq).abs().mean()
    reconstruction = pixel
    if "perceptual=none" not in words:
        reconstruction = pixel + (3 if "weight=3" in words else 1) * feature_loss(judge, image, batch.hq)
    adversarial = -judge(image)[0].mean()
    weight = (0.05 if "weight=0.05" in words else 0.5) * counts
    if "adaptive=false" not in words and counts:
        weight = weight * adaptive(reconstruction, adversarial, vae.decoder.conv_out.weight)
    plain.close(found["pixel"], pixel)
    plain.close(found["adversarial"], adversarial)
    loss = reconstruction + weight * adversarial
    plain.close(found["loss"], loss)
    plain.same_gradients(phase.parameters, loss)
    assert all(p.grad is None for p in judge.parameters()), "the discriminator does not learn from the decoder's loss"


def test_the_discriminators_loss(base: Path, model: Path) -> None:
    """(max(0, 1 - D(photograph)) + max(0, 1 + D(image))) / 2; the image is given."""
    stage, denoiser, vae, judge = tuning(base, model)
    batch = plain.recorded(2)
    with torch.no_grad():
        stage.prepare(batch)
        for parameter in judge.parameters():
            parameter *= 2  # logits on both sides of the hinge
    plain.start(stage.phases[0], stage.networks)
    stage.phases[0].loss(batch, 7)
    plain.start(stage.phases[1], stage.networks)
    found = stage.phases[1].loss(batch, 7)
    found["loss"].backward()

    (noise,) = batch.normals
    image = vae.decode(one_step(base, denoiser, batch.lq, noise) / plain.SCALE).sample.detach()
    real, fake = judge(batch.hq)[0], judge(image)[0]
    of_real, of_fake = (1 - real).clamp(min=0).mean(), (1 + fake).clamp(min=0).mean()
    loss = (of_real + of_fake) / 2
    assert found.keys() == {"loss", "loss_real", "loss_fake"}
    for name, value in (("loss", loss), ("loss_real", of_real), ("loss_fake", of_fake)):
        plain.close(found[name], value)
    plain.same_gradients(stage.phases[1].parameters, loss)
    assert all(p.grad is None for p in stage.phases[0].parameters.values())
    assert {id(p) for p in stage.phases[1].parameters.values()} == {id(p) for p in judge.parameters()}


def test_what_each_network_is_given(base: Path, model: Path) -> None:
    """The first stage z_lq noised to T; the decoder x0_from_T; the discriminator its image, and the photograph."""
    stage, denoiser, vae, judge = tuning(base, model)
    kinds = {"unet": UNet2DConditionModel, "controlnet": ControlNetModel, "decoder": Decoder}
    modules = {name: plain.only(stage.networks, kind) for name, kind in kinds.items()}
    batch, first = plain.recorded(2), stage.phases[0]
    with plain.watched(**modules, judge=judge, encoder=vae.encoder) as given:
        with torch.no_grad():
            stage.prepare(batch)
        seen = len(given["judge"])
        first.loss(batch, 5)
        middle = len(given["judge"])
        stage.phases[1].loss(batch, 5)
    assert [phase.name for phase in stage.phases] == ["decoder", "discriminator"], "in this order"
    assert torch.equal(torch.cat([call["sample"] for call in given["encoder"]]), torch.cat([batch.hq, batch.lq]))
    (noise,), z_lq = batch.normals, plain.latent(base, batch.lq)
    for name in ("unet", "controlnet"):
        (call,) = given[name]
        plain.close(call["sample"], plain.noised(z_lq.double(), noise.double(), LAST))
        assert call["timestep"].tolist() == [LAST, LAST]
    plain.close(given["controlnet"][0]["controlnet_cond"], z_lq)
    x0 = one_step(base, denoiser, batch.lq, noise)
    plain.close(given["decoder"][0]["sample"], vae.post_quant_conv(x0 / plain.SCALE))
    image = vae.decode(x0 / plain.SCALE).sample
    of_decoder, of_judge = given["judge"][seen:middle], given["judge"][middle:]
    assert len(of_decoder) == len(of_judge) == 2
    for calls, order in ((of_decoder, (image, batch.hq)), (of_judge, (batch.hq, image))):
        for call, x in zip(calls, order, strict=True):
            plain.close(call["x"], x)
    assert of_decoder[0]["x"].requires_grad and not of_judge[1]["x"].requires_grad


def test_what_is_trained(base: Path, model: Path, tmp_path: Path) -> None:
    """The decoder and the discriminator, each by its optimiser's settings; a narrower decoder where one is asked."""
    stage, denoiser, vae, judge = tuning(base, model)
    assert {id(p) for p in stage.phases[0].parameters.values()} == {id(p) for p in vae.decoder.parameters()}
    config = stage.first.config
    assert [phase.optimizer for phase in stage.phases] == [config.optimizer, config.deft.optimizer]
    assert stage.compile_modules == [denoiser.unet, denoiser.controlnet, vae.encoder, vae.decoder, judge]
    stage.latents.linear = LinearPath(4, 8)
    assert stage.decoder_parameters()["synthesis"] is stage.latents.linear.synthesis.weight, (
        "the bundled models have one"
    )
    stage.latents.linear = None
    narrow, wanted = tuning(base, model, "deft.decoder_width=0.5")[0], narrowed(stage.latents, 0.5).vae.decoder
    for name, parameter in wanted.named_parameters():
        assert torch.equal(narrow.phases[0].parameters[name], parameter), name
    narrow.export(tmp_path)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain.close(
            load_latents(tmp_path / "vae").decode(z), narrow.latents.decode(z), 2e-3
        )  # stored in half precision


def test_the_tuned_decoder_restores_the_one_step_result(base: Path, model: Path) -> None:
    stage, denoiser, vae, _ = tuning(base, model)
    untouched = deepcopy(vae.encoder.state_dict())
    batch = plain.recorded(2)
    with torch.no_grad():
        for parameter in stage.phases[0].parameters.values():
            parameter += 0.01
        stage.prepare(batch)
        image = stage.restore(batch)
        (noise,) = batch.normals
        plain.close(image, vae.decode(one_step(base, denoiser, batch.lq, noise) / plain.SCALE).sample)
    assert all(torch.equal(value, vae.encoder.state_dict()[name]) for name, value in untouched.items())


def test_the_patch_discriminator_is_isolas(base: Path) -> None:
    """Convolutions of 4 x 4 with strides 2, 2, 2, 1, normalised but for the first, leaky; a last one to one channel."""
    judge, x = PatchGAN(8), plain.pictures(2)[0]
    logits, features = judge(x)
    for i, (conv, stride) in enumerate(zip(judge.convs, (2, 2, 2, 1), strict=True)):
        x = F.conv2d(x, conv.weight, conv.bias, stride=stride, padding=1)
        if i:
            x = F.group_norm(x, 8, judge.norms[i].weight, judge.norms[i].bias)
        x = torch.where(x > 0, x, 0.2 * x)
        plain.close(features[i], x)
    plain.close(logits, F.conv2d(x, judge.head.weight, judge.head.bias, padding=1))
    assert logits.shape == (2, 1, 6, 6) and [f.shape[1] for f in features] == [8, 16, 32, 64]
