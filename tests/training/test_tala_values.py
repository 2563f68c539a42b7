"""Stage 'tala' against Algorithm 1 and Eq. 4 (ConsisSR), written out: its loss, gradients, inputs and restoration."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor

from consissr.errors import UserError
from consissr.models.denoiser import Condition, Denoiser
from consissr.models.image_prompt import ImagePrompt
from consissr.nano.config import run_config
from consissr.training.tala import Tala
from scripts.train import stage_builder
from tests.training import plain

WORDS = ["stage=tala", "data.crop=64", "model.image_prompt=hpa", "model.image_tokens=patches", "sampler.plan=ddpm"]
WORDS += ["model.hint=stack", "model.position_embedding=16", "model.transposed_attention=true", "sampler.start=noise"]
TIMES, DRAWS = torch.tensor([999, 985, 985, 300]), torch.tensor([0.999, 0.864, 0.9, 0.0005])
"""p(t) of the paper is 1, 0.868, 0.868 and 6e-6 there; the release's 0.990, 0.860, 0.860 and 6e-6."""
ADAPTED = {
    "": [1, 1, 0, 0],
    "tala.probability=as_released": [0, 0, 0, 0],
    "tala.probability=linear": [1, 1, 1, 0],  # 1, 0.965, 0.965, 0
    "tala.gamma=5": [1, 1, 1, 1],  # 0.932 at 985, 0.0025 at 300
    "tala.shared_draw=true": [1, 0, 0, 0],
    "tala.probability=off": [0, 0, 0, 0],  # not even where 0 is drawn
}
"""Which images start from z_lq."""


def built(base: Path, *words: str) -> tuple:
    """The stage, all its layers awake, and its parts by kind."""
    config = run_config(None, [f"model.base={base}", *WORDS, *words])
    torch.manual_seed(1)
    stage = stage_builder(config.stage)(config)
    plain.wake(stage)
    return stage, plain.only(stage.networks, Denoiser), plain.only(stage.networks, ImagePrompt), stage.phases[0]


def tala_loss(z_hq: Tensor, z_lq: Tensor, t: Tensor, eps: Tensor, adapted: Tensor, denoise) -> Tensor:
    """Algorithm 1: the noised latent of either image; the noise that leads from there to z_hq is asked for (Eq. 4)."""
    z_hq, z_lq, eps = z_hq.double(), z_lq.double(), eps.double()
    z_t = plain.noised(torch.where(adapted.view(-1, 1, 1, 1), z_lq, z_hq), eps, t)
    target = (z_t - plain.level(t).sqrt() * z_hq) / (1 - plain.level(t)).sqrt()
    return plain.mse(denoise(z_t.float(), t), target)


@pytest.mark.parametrize("words", list(ADAPTED))
def test_the_loss_is_that_of_algorithm_1(base: Path, words: str) -> None:
    stage, denoiser, prompt, phase = built(base, *words.split())
    batch = plain.recorded(4, integer=[TIMES], uniform=[0 * DRAWS if words.endswith("off") else DRAWS])
    found = plain.learnt(stage, phase, batch)

    z_hq, z_lq, (eps,) = plain.latent(base, batch.hq), plain.latent(base, batch.lq), batch.normals
    text = plain.text(base, 4)
    adapted = torch.tensor(ADAPTED[words], dtype=torch.bool)
    condition = Condition(text, z_lq, prompt.encode(batch.lq))
    wanted = tala_loss(z_hq, z_lq, TIMES, eps, adapted, lambda z, t: denoiser(z, t, condition))
    plain.close(found["loss"], wanted)
    plain.same_gradients(phase.parameters, wanted)
    assert batch.highs == [1000]


def test_a_posterior_sample_is_taken_of_both_images_and_the_mode_shown_to_the_controlnet(base: Path) -> None:
    """As released."""
    stage, denoiser, prompt, phase = built(base, "tala.posterior=sample")
    batch = plain.recorded(4, integer=[TIMES], uniform=[DRAWS])
    found = plain.learnt(stage, phase, batch)["loss"]
    of_hq, of_lq, eps = batch.normals
    text = plain.text(base, 4)
    condition = Condition(text, plain.latent(base, batch.lq), prompt.encode(batch.lq))
    z_hq, z_lq = plain.latent(base, batch.hq, of_hq), plain.latent(base, batch.lq, of_lq)
    adapted = torch.tensor(ADAPTED[""], dtype=torch.bool)
    plain.close(found, tala_loss(z_hq, z_lq, TIMES, eps, adapted, lambda z, t: denoiser(z, t, condition)))


def test_what_each_network_is_given(base: Path) -> None:
    """The autoencoder both images, the tower and the ControlNet the LQ one, the UNet z_t, t and the empty prompt."""
    stage, _, prompt, phase = built(base)
    networks = {"unet": UNet2DConditionModel, "controlnet": ControlNetModel, "encoder": Encoder}
    networks = {name: plain.only(stage.networks, kind) for name, kind in networks.items()}
    batch = plain.recorded(4, integer=[TIMES], uniform=[DRAWS])
    with plain.watched(**networks, tower=prompt.tower.conv1, adapter=prompt.adapter) as given:
        with torch.no_grad():
            stage.prepare(batch)
        phase.loss(batch, 0)

    assert torch.equal(torch.cat([call["sample"] for call in given["encoder"]]), torch.cat([batch.hq, batch.lq]))
    (tower,) = given["tower"]
    plain.close(tower["input"], plain.seen_by_clip(batch.lq), 1e-6)

    z_hq, z_lq, (eps,) = plain.latent(base, batch.hq), plain.latent(base, batch.lq), batch.normals
    from_lq = torch.tensor([True, True, False, False]).view(-1, 1, 1, 1)
    z_t = plain.noised(torch.where(from_lq, z_lq, z_hq).double(), eps.double(), TIMES)
    text = plain.text(base, 4)
    for name in ("unet", "controlnet"):
        (call,) = given[name]
        plain.close(call["sample"], z_t)
        assert torch.equal(call["timestep"], TIMES)
        plain.close(call["encoder_hidden_states"], text)
        with torch.no_grad():
            plain.close(call["cross_attention_kwargs"]["image"], prompt.encode(batch.lq))
    plain.close(given["controlnet"][0]["controlnet_cond"], z_lq)


def test_a_hint_encoder_of_its_own_sees_the_low_quality_image(base: Path, tmp_path: Path) -> None:
    """Converted releases have a second autoencoder for the hint alone; its hint is z_lq on another scale."""
    vae = plain.with_hint_encoder(built(base)[0], base, tmp_path)
    stage, *_, phase = built(base, f"init={tmp_path}")
    batch = plain.recorded(2)
    with plain.watched(controlnet=plain.only(stage.networks, ControlNetModel)) as given:
        stage.prepare(batch)
        phase.loss(batch, 0)
    with torch.no_grad():
        other = plain.SCALE * vae.encode(batch.lq).latent_dist.mean
    assert (other - plain.latent(base, batch.lq)).norm() > 0.01 * other.norm()
    plain.close(given["controlnet"][0]["controlnet_cond"], other)


def test_what_is_trained(base: Path) -> None:
    """The ControlNet without its text attention, what was added to both networks, the adapter: nothing else."""
    stage, denoiser, prompt, phase = built(base)
    added = ("position_emb", "attnT.", "normT.", "to_out_ip")
    wanted = {id(p) for n, p in denoiser.unet.named_parameters() if any(word in n for word in added)}
    for name, parameter in denoiser.controlnet.named_parameters():
        text = ".attn2." in name or ".norm2." in name
        if not (text and "transformer_blocks" in name) or "to_out_ip" in name:
            wanted.add(id(parameter))
    wanted |= {id(p) for p in prompt.adapter.parameters()}
    assert {id(p) for p in phase.parameters.values()} == wanted
    assert phase.name == "controlnet" and phase.optimizer is stage.config.optimizer and stage.buffers == {}
    networks = [denoiser.unet, denoiser.controlnet, stage.latents.vae.encoder]
    assert stage.compile_modules == [*networks, *prompt.tower.transformer.resblocks]


def test_a_schedule_of_another_length_is_heeded(base: Path, tmp_path: Path) -> None:
    """Of 100 timesteps the last is 99, and p(49) is 0.5 to the power of gamma."""
    shutil.copytree(base, tmp_path / "base")
    DDPMScheduler(100, beta_schedule="scaled_linear").save_pretrained(tmp_path / "base/scheduler")
    stage, denoiser, _, phase = built(tmp_path / "base", "tala.gamma=1", "sampler.steps=3")
    batch = plain.recorded(2, integer=[torch.tensor([49, 49])], uniform=[torch.tensor([0.49, 0.51])])
    with plain.watched(unet=denoiser.unet) as given:
        plain.learnt(stage, phase, batch)
    z_hq, z_lq, a = plain.latent(base, batch.hq)[1], plain.latent(base, batch.lq)[0], stage.model.alpha_bar[49]
    for z_t, z, eps in zip(given["unet"][0]["sample"], (z_lq, z_hq), batch.normals[0], strict=True):
        plain.close(z_t, a.sqrt() * z + (1 - a).sqrt() * eps)
    assert batch.highs == [100] and [step.t for step in stage.plan] == [99, 50, 0]
    with pytest.raises(UserError, match="100"):
        built(tmp_path / "base", "sampler.timesteps=[[100,-1,x0]]")


def test_the_soft_prompt_and_a_model_of_ones_own_are_taken(base: Path) -> None:
    """The soft tokens, of the LQ image, follow the empty prompt's."""
    first, *_ = built(base)
    soft = SimpleNamespace(encode=lambda x: x.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 2, 8))
    stage = Tala(first.config, first.model, soft)
    assert stage.model is first.model
    batch = plain.recorded(2)
    with plain.watched(unet=stage.denoiser.unet) as given:
        plain.learnt(stage, stage.phases[0], batch)
    (call,) = given["unet"]
    plain.close(call["encoder_hidden_states"], torch.cat([plain.text(base, 2), soft.encode(batch.lq)], 1))


def test_restoring_is_spaced_ddpm(base: Path) -> None:
    """999, 500 (rounded half to even), 0, from pure noise; decoded by the base's decoder."""
    stage, denoiser, prompt, _ = built(base, "sampler.steps=3")
    batch = plain.recorded(2)
    with torch.no_grad(), plain.watched(decoder=plain.only(stage.networks, Decoder)) as given:
        stage.prepare(batch)
        image = stage.restore(batch)
    z_lq, noises = plain.latent(base, batch.lq), [noise.double() for noise in batch.normals]
    text = plain.text(base, 2)
    with torch.no_grad():
        condition = Condition(text, z_lq, prompt.encode(batch.lq))
        z = noises[0]
        for t, t_next, noise in ((999, 500, noises[1]), (500, 0, noises[2]), (0, -1, None)):
            eps = denoiser(z.float(), torch.full((2,), t), condition).double()
            x0 = plain.clean(z, eps, t)
            z = x0 if noise is None else plain.ddpm(z, x0, t, t_next, noise)
    assert len(noises) == 3 and len(given["decoder"]) == 1
    plain.close(image, plain.decoded(base, z))


def test_a_plan_that_is_not_trained_is_refused(base: Path) -> None:
    with pytest.raises(UserError, match=r"^stage 'tala' trains for sampler.plan=ddpm .*, not nuts$"):
        built(base, "sampler.plan=nuts")
    stage, *_ = built(base, "sampler.plan=nuts", "sampler.timesteps=[[999,666,step],[666,-1,x0]]")
    assert [tuple(step) for step in stage.plan] == [(999, 666, "step"), (666, -1, "x0")]


def test_as_released_no_gradient_passes_the_encoder(base: Path) -> None:
    """The UNet's encoder and middle, and the ControlNet's way through them, learn nothing; the decoder does."""
    words = ("tala.encoder_gradients=false", "model.unet_trained=[time_embedding,conv_in,mid_block,conv_out]")
    stage, _, _, phase = built(base, *words)
    unet = plain.only(stage.networks, UNet2DConditionModel)
    cut = {
        id(p)
        for part in (unet.time_embedding, unet.conv_in, unet.down_blocks, unet.mid_block)
        for p in part.parameters()
    }
    assert not cut & {id(p) for p in phase.parameters.values()} and "unet.conv_out.weight" in phase.parameters
    batch = plain.recorded(2)
    with torch.no_grad():
        stage.prepare(batch)
    unet.requires_grad_(True)
    phase.loss(batch, 0)["loss"].backward()
    for name, parameter in unet.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in cut), name
