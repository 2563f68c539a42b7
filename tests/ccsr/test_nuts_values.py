"""Stage 'nuts' against Eq. 1 to 3 (CCSR), written out: its losses, gradients, inputs and restoration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.models.autoencoders.vae import Encoder
from torch import Tensor

from consissr.errors import UserError
from consissr.models.denoiser import Condition, Denoiser
from consissr.nano.config import run_config
from consissr.weights.base import load_text
from scripts.train import stage_builder
from tests.training import plain

SCALE = 0.18215
LAST = 999


def built(base: Path, *words: str) -> tuple:
    """The stage, all its layers awake, and its noise prediction."""
    config = run_config(None, ["stage=nuts", f"model.base={base}", "data.crop=64", *words])
    torch.manual_seed(1)
    stage = stage_builder(config.stage)(config)
    plain.wake(stage)
    return stage, plain.only(stage.networks, Denoiser), stage.phases[0]


def latent(base: Path, x: Tensor, noise: Tensor | None = None) -> Tensor:
    """The scaled latent of the base's autoencoder: the mode, or the sample that `noise` makes."""
    posterior = AutoencoderKL.from_pretrained(base / "vae").encode(x).latent_dist
    return SCALE * (posterior.mean if noise is None else posterior.mean + posterior.std * noise).detach()


def text(base: Path, count: int) -> Tensor:
    """Embeddings of the empty prompt."""
    return load_text(base).encode([""]).expand(count, -1, -1)


def nuts_losses(
    denoise: Callable[[Tensor, int | Tensor], Tensor],
    z_hq: Tensor,
    start: Tensor,
    t: Tensor,
    noises: list[Tensor],
    t_max: int,
    ordinary: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Eq. 2 and 3: |eps - eps_hat|^2 at t, |x0_from_T - z_hq|^2, |x0_from_tmax - z_hq|^2; gradients through both."""
    z_hq, start, noises = z_hq.double(), start.double(), [noise.double() for noise in noises]
    z_t, eps = ordinary or (plain.noised(z_hq, noises[0], t), noises[0])
    z_T = plain.noised(start, noises[1], LAST)
    x0_T = plain.clean(z_T, denoise(z_T, LAST), LAST)
    z_tmax = plain.noised(x0_T, noises[2], t_max)
    x0_tmax = plain.clean(z_tmax, denoise(z_tmax, t_max), t_max)
    losses = {"l_diff": plain.mse(denoise(z_t, t), eps)}
    return losses | {"l_T": plain.mse(x0_T, z_hq), "l_tmax": plain.mse(x0_tmax, z_hq)}


def predictor(denoiser: Denoiser, condition: Condition) -> Callable[[Tensor, int | Tensor], Tensor]:
    """The networks' noise in float64, at one timestep for all or one each."""
    return lambda z, t: denoiser(z.float(), torch.as_tensor(t).expand(len(z)), condition).double()


VARIANTS = {
    "": (["l_diff", "l_T", "l_tmax"], 666, 666),
    "nuts.t_max_step=667 nuts.start=hq": (["l_diff", "l_T", "l_tmax"], 667, 667),  # as released, stage 1
    "nuts.posterior=sample": (["l_diff", "l_T", "l_tmax"], 666, 666),
    "nuts.losses=[l_T]": (["l_T"], 666, 666),
    "nuts.losses=[l_tmax]": (["l_tmax"], 666, 1000),
    "nuts.losses=[l_diff]": (["l_diff"], 666, 1000),
    "sampler.t_max=0.8333": (["l_diff", "l_T", "l_tmax"], 832, 832),
}
"""Words of the config: the losses that are summed, t_max, and how many timesteps l_diff is drawn from."""


@pytest.mark.parametrize("words", list(VARIANTS))
def test_the_losses_are_those_of_the_paper(base: Path, words: str) -> None:
    names, t_max, high = VARIANTS[words]
    stage, denoiser, phase = built(base, *words.split())
    batch = plain.recorded(2, integer=[torch.tensor([137, 588])])
    with torch.no_grad():
        stage.prepare(batch)
    plain.start(phase, stage.networks)
    found = phase.loss(batch, 0)
    found["loss"].backward()

    *posterior, n_t, n_T, n_tmax = batch.normals
    z_hq, z_lq = (
        latent(base, x, noise) for x, noise in zip((batch.hq, batch.lq), posterior or (None, None), strict=True)
    )
    start = z_hq if "start=hq" in words else z_lq
    denoise = predictor(denoiser, Condition(text(base, 2), z_lq))
    losses = nuts_losses(denoise, z_hq, start, torch.tensor([137, 588]), [n_t, n_T, n_tmax], t_max)
    assert found.keys() == {"loss", *names} and len(posterior) == (2 if "posterior=sample" in words else 0)
    for name in names:
        plain.close(found[name], losses[name])
    total = sum(losses[name] for name in names)
    plain.close(found["loss"], total)
    plain.same_gradients(phase.parameters, total)
    assert batch.highs == [high]


def test_augmentation_acts_on_l_diff_alone(base: Path) -> None:
    """The hybrid: Algorithm 1 of ConsisSR under CCSR's losses, at every timestep."""
    stage, denoiser, phase = built(base, "tala.probability=power", "nuts.l_diff_t=all")
    t = torch.tensor([985, 985])
    batch = plain.recorded(2, integer=[t], uniform=[torch.tensor([0.864, 0.9])])  # p(t) is 0.868
    with torch.no_grad():
        stage.prepare(batch)
    plain.start(phase, stage.networks)
    found = phase.loss(batch, 0)
    found["loss"].backward()
    z_hq, z_lq, noises = latent(base, batch.hq).double(), latent(base, batch.lq).double(), batch.normals
    z_t = plain.noised(torch.stack([z_lq[0], z_hq[1]]), noises[0].double(), t)
    target = (z_t - plain.level(t).sqrt() * z_hq) / (1 - plain.level(t)).sqrt()
    denoise = predictor(denoiser, Condition(text(base, 2), z_lq.float()))
    losses = nuts_losses(denoise, z_hq, z_lq, t, noises, 666, (z_t, target))
    for name, loss in losses.items():
        plain.close(found[name], loss)
    plain.same_gradients(phase.parameters, sum(losses.values()))
    assert batch.highs == [1000]


def test_what_each_network_is_given(base: Path) -> None:
    """The autoencoder both images; both networks the same three latents, the empty prompt, and z_lq as the hint."""
    stage, denoiser, phase = built(base)
    kinds = {"unet": UNet2DConditionModel, "controlnet": ControlNetModel, "encoder": Encoder}
    t = torch.tensor([137, 588])
    batch = plain.recorded(2, integer=[t])
    with plain.watched(**{name: plain.only(stage.networks, kind) for name, kind in kinds.items()}) as given:
        with torch.no_grad():
            stage.prepare(batch)
        phase.loss(batch, 0)
    assert torch.equal(torch.cat([call["sample"] for call in given["encoder"]]), torch.cat([batch.hq, batch.lq]))
    z_hq, z_lq = latent(base, batch.hq), latent(base, batch.lq)
    n_t, n_T, n_tmax = (noise.double() for noise in batch.normals)
    with torch.no_grad():
        z_T = plain.noised(z_lq.double(), n_T, LAST)
        x0_T = plain.clean(z_T, predictor(denoiser, Condition(text(base, 2), z_lq))(z_T, LAST), LAST)
    latents = [plain.noised(z_hq.double(), n_t, t), z_T, plain.noised(x0_T, n_tmax, 666)]
    times = [t, torch.full((2,), LAST), torch.full((2,), 666)]
    for name in ("unet", "controlnet"):
        for call, z, at in zip(given[name], latents, times, strict=True):
            plain.close(call["sample"], z)
            assert torch.equal(call["timestep"], at)
            plain.close(call["encoder_hidden_states"], text(base, 2))
    for call in given["controlnet"]:
        plain.close(call["controlnet_cond"], z_lq)


def test_a_hint_encoder_of_its_own_sees_the_low_quality_image(base: Path, tmp_path: Path) -> None:
    first, *_ = built(base)
    first.export(tmp_path)
    vae = AutoencoderKL.from_pretrained(base / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.bias.add_(1.0)
    vae.save_pretrained(tmp_path / "hint_vae")
    stage, _, phase = built(base, f"init={tmp_path}")
    batch = plain.recorded(2)
    with plain.watched(controlnet=plain.only(stage.networks, ControlNetModel)) as given:
        with torch.no_grad():
            stage.prepare(batch)
        phase.loss(batch, 0)
    with torch.no_grad():
        other = 0.18215 * vae.encode(batch.lq).latent_dist.mean
    assert (other - latent(base, batch.lq)).norm() > 0.01 * other.norm()
    for call in given["controlnet"]:
        plain.close(call["controlnet_cond"], other)


def test_what_is_trained(base: Path) -> None:
    """The whole ControlNet, and of the UNet what the config names."""
    stage, denoiser, phase = built(base, "model.unet_trained=[conv_out]")
    wanted = [*denoiser.controlnet.parameters(), *denoiser.unet.conv_out.parameters()]
    assert {id(p) for p in phase.parameters.values()} == {id(p) for p in wanted}


def test_one_step_is_restored_where_it_is_trained(base: Path) -> None:
    """x0_from_T from the noised LQ latent, decoded."""
    stage, denoiser, _ = built(base)
    batch = plain.recorded(2)
    with torch.no_grad():
        stage.prepare(batch)
        image = stage.restore(batch)
        z_lq, (noise,) = latent(base, batch.lq), batch.normals
        z_T = plain.noised(z_lq.double(), noise.double(), LAST)
        x0 = plain.clean(z_T, predictor(denoiser, Condition(text(base, 2), z_lq))(z_T, LAST), LAST)
        plain.close(image, AutoencoderKL.from_pretrained(base / "vae").decode((x0 / SCALE).float()).sample)


def test_the_sampler_restores_where_one_step_is_not_trained(base: Path) -> None:
    """x0_from_T, noised again to t_max, whose x0 is the result: (6, 2/3, 1/2) is 999 and 666."""
    stage, denoiser, _ = built(base, "nuts.losses=[l_diff]")
    batch = plain.recorded(2)
    with torch.no_grad():
        stage.prepare(batch)
        image = stage.restore(batch)
        z_lq, (n_T, n_tmax) = latent(base, batch.lq), (noise.double() for noise in batch.normals)
        denoise = predictor(denoiser, Condition(text(base, 2), z_lq))
        z_T = plain.noised(z_lq.double(), n_T, LAST)
        z_tmax = plain.noised(plain.clean(z_T, denoise(z_T, LAST), LAST), n_tmax, 666)
        x0 = plain.clean(z_tmax, denoise(z_tmax, 666), 666)
        plain.close(image, AutoencoderKL.from_pretrained(base / "vae").decode((x0 / SCALE).float()).sample)


def test_a_t_max_out_of_range_is_named(base: Path) -> None:
    for step in (-1, 1000):
        with pytest.raises(UserError, match=rf"^nuts.t_max_step is {step}: use a timestep from 1 to 999, or 0$"):
            built(base, f"nuts.t_max_step={step}")
    for step in (1, 999):
        built(base, f"nuts.t_max_step={step}")


def test_the_result_holds_its_plan(base: Path, tmp_path: Path) -> None:
    """Sampling then needs no knowledge of NUTS: (6, 2/3, 1/2) is 999, re-noised to 666, whose x0 is the result."""
    stage, *_ = built(base)
    stage.export(tmp_path)
    sampler = yaml.safe_load((tmp_path / "config.yaml").read_text())["sampler"]
    assert sampler["timesteps"] == [[999, 666, "renoise"], [666, -1, "x0"]]
