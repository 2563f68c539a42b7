"""Stage 'nuts' against Eq. 1 to 3 (CCSR), written out: its losses, gradients, inputs and restoration."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import Encoder
from safetensors.torch import load_file
from torch import Tensor

from ccsr.nuts import Nuts
from consissr.errors import UserError
from consissr.models.denoiser import Condition, Denoiser
from consissr.nano.config import run_config
from scripts.train import stage_builder
from tests.training import plain

LAST = 999


def built(base: Path, *words: str) -> tuple:
    """The stage, all its layers awake, and its noise prediction."""
    config = run_config(None, ["stage=nuts", f"model.base={base}", "data.crop=64", *words])
    torch.manual_seed(1)
    stage = stage_builder(config.stage)(config)
    plain.wake(stage)
    return stage, plain.only(stage.networks, Denoiser), stage.phases[0]


def nuts_losses(
    denoise: Callable[[Tensor, int | Tensor], Tensor],
    z_hq: Tensor,
    start: Tensor,
    t: Tensor,
    noises: list[Tensor],
    t_max: int,
    ordinary: tuple[Tensor, Tensor] | None = None,
    error: Callable[[Tensor, Tensor], Tensor] = plain.mse,
) -> dict[str, Tensor]:
    """Eq. 2 and 3: |eps - eps_hat|^2 at t, |x0_from_T - z_hq|^2, |x0_from_tmax - z_hq|^2; gradients through both."""
    z_hq, start, noises = z_hq.double(), start.double(), [noise.double() for noise in noises]
    z_t, eps = ordinary or (plain.noised(z_hq, noises[0], t), noises[0])
    z_T = plain.noised(start, noises[1], LAST)
    x0_T = plain.clean(z_T, denoise(z_T, LAST), LAST)
    z_tmax = plain.noised(x0_T, noises[2], t_max)
    x0_tmax = plain.clean(z_tmax, denoise(z_tmax, t_max), t_max)
    losses = {"l_diff": error(denoise(z_t, t), eps)}
    return losses | {"l_T": error(x0_T, z_hq), "l_tmax": error(x0_tmax, z_hq)}


def predictor(denoiser: Denoiser, condition: Condition) -> Callable[[Tensor, int | Tensor], Tensor]:
    """The networks' noise in float64, at one timestep for all or one each."""
    return lambda z, t: denoiser(z.float(), torch.as_tensor(t).expand(len(z)), condition).double()


ALL = ["l_diff", "l_T", "l_tmax"]
VARIANTS = {
    "": (ALL, 666, 0, 666),
    "nuts.t_max_step=667 nuts.start=hq": (ALL, 667, 0, 667),  # as released, stage 1
    "nuts.posterior=sample": (ALL, 666, 0, 666),
    "nuts.losses=[l_T]": (["l_T"], 666, 0, 666),
    "nuts.losses=[l_tmax]": (["l_tmax"], 666, 0, 1000),
    "nuts.losses=[l_diff]": (["l_diff"], 666, 0, 1000),
    "nuts.l_diff_t=all": (ALL, 666, 0, 1000),
    "nuts.l_diff_t=interval sampler.t_max=0.8333": (ALL, 832, 499, 833),  # [t_max, t_min], both included
    "nuts.l_diff_t=interval sampler.t_min=0": (ALL, 666, 0, 667),
    "nuts.l_diff_t=interval sampler.grid=leading nuts.t_max_step=499": (ALL, 499, 333, 500),
}
"""Words of the config: the losses that are summed, t_max, l_diff's first timestep and the one after its last."""


@pytest.mark.parametrize("words", list(VARIANTS))
def test_the_losses_are_those_of_the_paper(base: Path, words: str) -> None:
    names, t_max, first, end = VARIANTS[words]
    stage, denoiser, phase = built(base, *words.split())
    drawn = torch.tensor([137, 288])
    batch = plain.recorded(2, integer=[drawn])
    found = plain.learnt(stage, phase, batch)

    *posterior, n_t, n_T, n_tmax = batch.normals
    z_hq, z_lq = (
        plain.latent(base, x, noise) for x, noise in zip((batch.hq, batch.lq), posterior or (None, None), strict=True)
    )
    start = z_hq if "start=hq" in words else z_lq
    denoise = predictor(denoiser, Condition(plain.text(base, 2), z_lq))
    losses = nuts_losses(denoise, z_hq, start, first + drawn, [n_t, n_T, n_tmax], t_max)
    assert found.keys() == {"loss", *names} and len(posterior) == (2 if "posterior=sample" in words else 0)
    for name in names:
        plain.close(found[name], losses[name])
    total = sum(losses[name] for name in names)
    plain.close(found["loss"], total)
    plain.same_gradients(phase.parameters, total)
    assert batch.highs == [end - first]


@pytest.mark.parametrize("word", ["false", "true"])
def test_augmentation_acts_on_l_diff_alone(base: Path, word: str) -> None:
    """The hybrid: Algorithm 1 of ConsisSR under CCSR's losses, at every timestep; each network runs three times."""
    stage, denoiser, phase = built(base, "tala.probability=power", "nuts.l_diff_t=all", f"tala.shared_draw={word}")
    t = torch.tensor([985, 985])
    batch = plain.recorded(2, integer=[t], uniform=[torch.tensor([0.864, 0.9])])  # p(t) is 0.868
    with plain.watched(unet=denoiser.unet) as given:
        found = plain.learnt(stage, phase, batch)
    assert len(given["unet"]) == 3
    z_hq, z_lq, noises = plain.latent(base, batch.hq).double(), plain.latent(base, batch.lq).double(), batch.normals
    second = z_lq[1] if word == "true" else z_hq[1]  # by the first one's draw, or by its own
    z_t = plain.noised(torch.stack([z_lq[0], second]), noises[0].double(), t)
    target = (z_t - plain.level(t).sqrt() * z_hq) / (1 - plain.level(t)).sqrt()
    denoise = predictor(denoiser, Condition(plain.text(base, 2), z_lq.float()))
    losses = nuts_losses(denoise, z_hq, z_lq, t, noises, 666, (z_t, target))
    for name, loss in losses.items():
        plain.close(found[name], loss)
    plain.same_gradients(phase.parameters, sum(losses.values()))
    assert batch.highs == [1000]


def test_nanos_errors_count_by_channel(base: Path) -> None:
    stage, denoiser, phase = built(base, "stage=nano_nuts")
    stage.weights = torch.tensor([0.4, 1.6, 0.5, 1.5])
    t = torch.tensor([137, 288])
    batch = plain.recorded(2, integer=[t])
    found = plain.learnt(stage, phase, batch)
    z_hq, z_lq = plain.latent(base, batch.hq), plain.latent(base, batch.lq)
    denoise = predictor(denoiser, Condition(plain.text(base, 2), z_lq))

    def error(value: Tensor, wanted: Tensor) -> Tensor:
        return sum(w * plain.mse(value[:, i], wanted[:, i]) for i, w in enumerate(stage.weights)) / 4

    for name, loss in nuts_losses(denoise, z_hq, z_lq, t, batch.normals, 666, error=error).items():
        plain.close(found[name], loss)


def test_soft_tokens_follow_the_empty_prompt(base: Path) -> None:
    """From an encoder of one's own, which sees the LQ image."""
    first, *_ = built(base)
    soft = SimpleNamespace(encode=lambda x: x.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 2, 8))
    stage = Nuts(first.config, first.model, soft)
    assert stage.model is first.model
    batch = plain.recorded(2)
    with plain.watched(unet=stage.denoiser.unet) as given:
        plain.learnt(stage, stage.phases[0], batch)
    for call in given["unet"]:
        plain.close(call["encoder_hidden_states"], torch.cat([plain.text(base, 2), soft.encode(batch.lq)], 1))


def test_a_hybrid_of_few_noisy_steps_warns(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """p(t) is near 0 where l_diff is trained, unless it is trained everywhere; without augmentation nothing is said."""
    rare = "latent augmentation is rare at t < {}: nuts.l_diff_t=all draws every timestep"
    for words, end in (
        ("", 666),
        ("nuts.l_diff_t=interval", 667),
        ("nuts.l_diff_t=all", None),
        ("nuts.t_max_step=998", 998),
        ("nuts.t_max_step=998 nuts.l_diff_t=all", None),
    ):
        caplog.clear()
        built(base, "tala.probability=power", *words.split())
        assert [r.getMessage() for r in caplog.records if r.name == "ccsr.nuts"] == ([rare.format(end)] if end else [])
    caplog.clear()
    built(base)
    assert "augmentation" not in caplog.text


def test_what_is_sampled_is_trained(base: Path) -> None:
    """A plan copied from another model, whose steps these losses never see, would be stored in silence."""
    for words, never in (
        ("sampler.timesteps=[[999,666,renoise],[666,-1,x0]] sampler.t_max=0.5 nuts.losses=[l_T,l_tmax]", "666"),
        ("sampler.timesteps=[[999,700,renoise],[700,-1,x0]]", "700"),
        ("sampler.plan=ddpm sampler.steps=4 nuts.losses=[l_T,l_tmax]", "666, 333, 0"),
        (
            "nuts.l_diff_t=interval sampler.timesteps=[[999,666,renoise],[666,333,step],[333,-1,x0]]",
            "333",
        ),  # from 499 on
    ):
        with pytest.raises(
            UserError, match=f"^the sampler evaluates t={never}, which these losses never train"
        ) as said:
            built(base, *words.split())
        assert str(said.value).endswith(
            "nuts.l_diff_t=all, or give the timestep that l_tmax shall train, nuts.t_max_step"
        )
    for words in (
        "sampler.timesteps=[[999,700,renoise],[700,-1,x0]] nuts.l_diff_t=all",
        "sampler.timesteps=[[999,700,renoise],[700,-1,x0]] nuts.t_max_step=667",  # as released: another on purpose
        "sampler.t_min=0 sampler.plan=nuts",  # 999, 666, 499, ...: all below t_max are l_diff's
        "sampler.plan=ddpm nuts.losses=[l_diff]",
    ):
        built(base, *words.split())
    with pytest.raises(
        UserError, match="^tala.probability: latent augmentation acts on l_diff, which nuts.losses leaves out: add it$"
    ):
        built(base, "tala.probability=power", "nuts.losses=[l_T,l_tmax]")


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
    z_hq, z_lq = plain.latent(base, batch.hq), plain.latent(base, batch.lq)
    n_t, n_T, n_tmax = (noise.double() for noise in batch.normals)
    with torch.no_grad():
        z_T = plain.noised(z_lq.double(), n_T, LAST)
        x0_T = plain.clean(z_T, predictor(denoiser, Condition(plain.text(base, 2), z_lq))(z_T, LAST), LAST)
    latents = [plain.noised(z_hq.double(), n_t, t), z_T, plain.noised(x0_T, n_tmax, 666)]
    times = [t, torch.full((2,), LAST), torch.full((2,), 666)]
    for name in ("unet", "controlnet"):
        for call, z, at in zip(given[name], latents, times, strict=True):
            plain.close(call["sample"], z)
            assert torch.equal(call["timestep"], at)
            plain.close(call["encoder_hidden_states"], plain.text(base, 2))
    for call in given["controlnet"]:
        plain.close(call["controlnet_cond"], z_lq)


def test_a_hint_encoder_of_its_own_sees_the_low_quality_image(base: Path, tmp_path: Path) -> None:
    vae = plain.with_hint_encoder(built(base)[0], base, tmp_path)
    stage, _, phase = built(base, f"init={tmp_path}")
    batch = plain.recorded(2)
    with plain.watched(controlnet=plain.only(stage.networks, ControlNetModel)) as given:
        with torch.no_grad():
            stage.prepare(batch)
        phase.loss(batch, 0)
    with torch.no_grad():
        other = plain.SCALE * vae.encode(batch.lq).latent_dist.mean
    assert (other - plain.latent(base, batch.lq)).norm() > 0.01 * other.norm()
    for call in given["controlnet"]:
        plain.close(call["controlnet_cond"], other)


def test_what_is_trained(base: Path) -> None:
    """The whole ControlNet, and of the UNet what the config names."""
    stage, denoiser, phase = built(base, "model.unet_trained=[conv_out]")
    wanted = [*denoiser.controlnet.parameters(), *denoiser.unet.conv_out.parameters()]
    assert {id(p) for p in phase.parameters.values()} == {id(p) for p in wanted}


@pytest.mark.parametrize("start", ["lq", "noise"])
def test_one_step_is_restored_where_it_is_trained(base: Path, start: str) -> None:
    """x0_from_T, decoded, from where sampling starts: the noised LQ latent, or pure noise (the paper and CCSR v1)."""
    stage, denoiser, _ = built(base, f"sampler.start={start}")
    batch = plain.recorded(2)
    with torch.no_grad():
        stage.prepare(batch)
        image = stage.restore(batch)
        z_lq, (noise,) = plain.latent(base, batch.lq), batch.normals
        z_T = plain.noised(z_lq.double(), noise.double(), LAST) if start == "lq" else noise.double()
        x0 = plain.clean(z_T, predictor(denoiser, Condition(plain.text(base, 2), z_lq))(z_T, LAST), LAST)
    plain.close(image, plain.decoded(base, x0))


def test_the_sampler_restores_where_one_step_is_not_trained(base: Path) -> None:
    """x0_from_T, noised again to t_max, whose x0 is the result: (6, 2/3, 1/2) is 999 and 666."""
    stage, denoiser, _ = built(base, "nuts.losses=[l_diff]")
    batch = plain.recorded(2)
    with torch.no_grad():
        stage.prepare(batch)
        image = stage.restore(batch)
        z_lq, (n_T, n_tmax) = plain.latent(base, batch.lq), (noise.double() for noise in batch.normals)
        denoise = predictor(denoiser, Condition(plain.text(base, 2), z_lq))
        z_T = plain.noised(z_lq.double(), n_T, LAST)
        z_tmax = plain.noised(plain.clean(z_T, denoise(z_T, LAST), LAST), n_tmax, 666)
        x0 = plain.clean(z_tmax, denoise(z_tmax, 666), 666)
    plain.close(image, plain.decoded(base, x0))


def test_a_t_max_out_of_range_is_named(base: Path) -> None:
    for step in (-1, 1000):
        with pytest.raises(UserError, match=rf"^nuts.t_max_step is {step}: use a timestep from 1 to 999, or 0$"):
            built(base, f"nuts.t_max_step={step}")
    with pytest.raises(UserError, match="^nuts.t_max_step is 0: "):  # v1's grid begins there
        built(base, "sampler.grid=linspace", "sampler.t_max=0.1667", "sampler.t_min=0")
    for step in (1, 999):
        built(base, f"nuts.t_max_step={step}")


def test_the_result_holds_its_plan(base: Path, tmp_path: Path) -> None:
    """Sampling then needs no knowledge of NUTS: (6, 2/3, 1/2) is 999, re-noised to 666, whose x0 is the result."""
    stage, *_ = built(base, "export_precision=fp16")
    stage.export(tmp_path)
    stored = load_file(tmp_path / "controlnet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["sampler"]["timesteps"] == [[999, 666, "renoise"], [666, -1, "x0"]]
    assert config["model"]["base"] == str(base)


def test_a_schedule_of_another_length_is_heeded(base: Path, tmp_path: Path) -> None:
    """Of 100 timesteps the last is 99, and two thirds are 66."""
    shutil.copytree(base, tmp_path / "base")
    DDPMScheduler(100, beta_schedule="scaled_linear").save_pretrained(tmp_path / "base/scheduler")
    stage, denoiser, phase = built(tmp_path / "base", "tala.probability=power", "nuts.l_diff_t=all", "tala.gamma=1")
    batch = plain.recorded(2, integer=[torch.tensor([49, 49])], uniform=[torch.tensor([0.49, 0.51])])
    with plain.watched(unet=denoiser.unet) as given:
        plain.learnt(stage, phase, batch)
    assert [call["timestep"][0].item() for call in given["unet"]] == [99, 66, 49] and batch.highs == [100]
    z_hq, z_lq = plain.latent(base, batch.hq)[1], plain.latent(base, batch.lq)[0]
    a = stage.model.alpha_bar[49]
    for z_t, z, eps in zip(given["unet"][2]["sample"], (z_lq, z_hq), batch.normals[0], strict=True):
        plain.close(z_t, a.sqrt() * z + (1 - a).sqrt() * eps)  # p(49) is 0.5
    assert [tuple(step) for step in stage.plan] == [(99, 66, "renoise"), (66, -1, "x0")]
    assert stage.folder_config().sampler.timesteps == [[99, 66, "renoise"], [66, -1, "x0"]]
    between, *_ = built(tmp_path / "base", "nuts.l_diff_t=interval")
    assert (between.t_first, between.t_end) == (49, 67), "t_min is one half"
