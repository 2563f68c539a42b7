"""CCSR v2's networks: ControlNet, UNet and autoencoder of a `ccsr_*` folder."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from fixtures import IMAGE, NETWORK, Check, Fixture, Lack, compare, to_image
from torch import Tensor

from consissr.models.denoiser import Condition

NETWORKS = "networks.safetensors"


@torch.no_grad()
def cases(fixture: Fixture) -> Iterator[Check | Lack]:
    """Every network quantity of the folder."""
    if fixture.kind != "ccsr":
        return
    yield from networks(fixture)
    runs = sorted(path.name for path in fixture.folder.glob("run_*.safetensors"))
    if not runs:
        yield Lack("run_*.safetensors")
    for run in runs:
        yield from autoencoder(fixture, run)


def networks(fixture: Fixture) -> Iterator[Check | Lack]:
    """ControlNet residuals, predicted noise with and without them, at every recorded timestep."""
    stored, inputs = fixture.tensors(NETWORKS), fixture.tensors("inputs.safetensors")
    if not stored or not inputs:
        yield Lack(NETWORKS if inputs else "inputs.safetensors")
        return
    text = torch.cat([inputs["negative_prompt_embeds"], inputs["prompt_embeds"]])
    condition = Condition(text, stored["cond_latent"])
    z, model = stored["x"], fixture.model
    for time in sorted({int(m[1]) for key in stored if (m := re.match(r"t(\d+)_", key))}, reverse=True):
        t = torch.full((len(z),), time)
        down, middle = model.controlnet(z, t, text, condition.hint, return_dict=False)
        for index, residual in enumerate(down):
            yield from compare(NETWORKS, stored, f"t{time}_down{index}", residual)
        yield from compare(NETWORKS, stored, f"t{time}_mid", middle)
        yield from compare(NETWORKS, stored, f"t{time}_eps", fixture.denoiser(z, t, condition))
        yield from compare(NETWORKS, stored, f"t{time}_eps_nocontrol", model.unet(z, t, text, return_dict=False)[0])


def autoencoder(fixture: Fixture, run: str) -> Iterator[Check | Lack]:
    """The low-quality image's latent and the decoding of the final latent in one recorded run."""
    stored = fixture.tensors(run)
    inputs = fixture.tensors("tile_inputs.safetensors" if run.startswith("run_tile") else "inputs.safetensors")
    latents = fixture.model.latents
    if "cond_latent" in stored:
        rows = len(stored["cond_latent"])
        lq = to_image(inputs["lq_image_uint8"]).expand(rows, -1, -1, -1)
        got = latents.encode(lq, "sample", inputs["posterior_noise"][:rows])
        yield Check(f"{run}:cond_latent", got, stored["cond_latent"], NETWORK)
        if "posterior_mean" in stored:
            mean, logvar = latents.moments(lq)
            yield Check(f"{run}:posterior_mean", mean, stored["posterior_mean"], NETWORK)
            yield Check(f"{run}:posterior_std", torch.exp(0.5 * logvar), stored["posterior_std"], NETWORK)
    if "decoded_raw" in stored:
        decoded: Tensor = latents.decode(stored["final_latent"])
        yield Check(f"{run}:decoded_raw", decoded, stored["decoded_raw"], IMAGE, "absolute")
