"""CCSR v2's networks: ControlNet, UNet and autoencoder of a `ccsr_*` folder."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from fixtures import IMAGE, NETWORK, Check, Fixture, Lack, compare, lacking, to_image
from torch import Tensor

from consissr.models.denoiser import Condition
from consissr.models.vae.latents import posterior_sample

NETWORKS = "networks.safetensors"


@torch.no_grad()
def cases(fixture: Fixture) -> Iterator[Check | Lack]:
    """Every network quantity of the folder."""
    if "ccsr" not in fixture.kinds:
        return
    for network in (residuals, predictions):
        yield from network(fixture)
    runs = sorted(path.name for path in fixture.folder.glob("run_*.safetensors"))
    if not runs:
        yield Lack("run_*.safetensors")
    for run in runs:
        yield from encoded(fixture, run)
        yield from decoded(fixture, run)


def evaluations(fixture: Fixture) -> tuple[dict[str, Tensor], Condition, list[int]]:
    """What is recorded of the networks, their condition (negative prompt, positive prompt), and the timesteps."""
    stored, inputs = fixture.tensors(NETWORKS), fixture.tensors("inputs.safetensors")
    text = torch.cat([inputs["negative_prompt_embeds"], inputs["prompt_embeds"]])
    times = {int(m[1]) for key in stored if (m := re.match(r"t(\d+)_", key))}
    return stored, Condition(text, stored["cond_latent"]), sorted(times, reverse=True)


@lacking
def residuals(fixture: Fixture) -> Iterator[Check | Lack]:
    """The ControlNet's outputs at every recorded timestep."""
    stored, condition, times = evaluations(fixture)
    z, controlnet = stored["x"], fixture.model.controlnet
    for time in times:
        t = torch.full((len(z),), time)
        down, middle = controlnet(z, t, condition.text, condition.hint, return_dict=False)
        for index, residual in enumerate(down):
            yield from compare(NETWORKS, stored, f"t{time}_down{index}", residual)
        yield from compare(NETWORKS, stored, f"t{time}_mid", middle)


@lacking
def predictions(fixture: Fixture) -> Iterator[Check | Lack]:
    """Predicted noise with and without the ControlNet at every recorded timestep."""
    stored, condition, times = evaluations(fixture)
    z, unet = stored["x"], fixture.unet
    for time in times:
        t = torch.full((len(z),), time)
        yield from compare(NETWORKS, stored, f"t{time}_eps", fixture.denoiser(z, t, condition))
        yield from compare(NETWORKS, stored, f"t{time}_eps_nocontrol", unet(z, t, condition.text, return_dict=False)[0])


@lacking
def encoded(fixture: Fixture, run: str) -> Iterator[Check | Lack]:
    """The low-quality image's latent in one recorded run, and its posterior."""
    stored = fixture.tensors(run)
    if "cond_latent" not in stored:
        return
    inputs = fixture.tensors("tile_inputs.safetensors" if run.startswith("run_tile") else "inputs.safetensors")
    rows, latents = len(stored["cond_latent"]), fixture.latents
    lq = to_image(inputs["lq_image_uint8"]).expand(rows, -1, -1, -1)
    got = posterior_sample(*latents.moments(lq), inputs["posterior_noise"][:rows]) * latents.scale
    yield Check(f"{run}:cond_latent", got, stored["cond_latent"], NETWORK)
    if "posterior_mean" in stored:
        mean, logvar = latents.moments(lq)
        yield Check(f"{run}:posterior_mean", mean, stored["posterior_mean"], NETWORK)
        yield from compare(run, stored, "posterior_std", torch.exp(0.5 * logvar))


@lacking
def decoded(fixture: Fixture, run: str) -> Iterator[Check | Lack]:
    """The decoding of one recorded run's final latent."""
    stored = fixture.tensors(run)
    if "decoded_raw" in stored:
        got: Tensor = fixture.latents.decode(stored["final_latent"])
        yield Check(f"{run}:decoded_raw", got, stored["decoded_raw"], IMAGE, "absolute")
