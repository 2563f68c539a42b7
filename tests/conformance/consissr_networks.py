"""ConsisSR's networks: text, image prompt, autoencoder, ControlNet, UNet of a `consissr_*` folder."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from fixtures import IMAGE, Check, Fixture, Lack, compare, lacking, to_image
from torch import Tensor

from consissr.models.denoiser import Condition
from consissr.models.image_prompt import clip_input, tower_features
from consissr.models.vae.latents import posterior_sample

PROMPTS = {"cond": "positive", "uncond": "negative"}
OUTPUTS = "outputs.safetensors"


@torch.no_grad()
def cases(fixture: Fixture) -> Iterator[Check | Lack]:
    """Every network quantity of the folder."""
    if "consissr" not in fixture.kinds:
        return
    inputs, outputs = fixture.tensors("inputs.safetensors"), fixture.tensors(OUTPUTS)
    text = {}
    for word in ("positive", "negative", "empty"):
        if f"tokens_{word}" in inputs:
            text[word] = fixture.model.text.encode_tokens(inputs[f"tokens_{word}"])
            yield from compare(OUTPUTS, outputs, f"text_{word}", text[word])
        else:
            yield Lack(f"inputs.safetensors:tokens_{word}")
    yield from prompts(fixture, text)
    if "lq_u8" not in inputs:
        yield Lack("inputs.safetensors:lq_u8")
        return
    lq = to_image(inputs["lq_u8"])
    yield from image_prompt(fixture, outputs, lq, text)
    yield from autoencoder(fixture, inputs, outputs, lq)
    hint, image = fixture.hint_latents.encode(lq), fixture.model.image_prompt.encode(lq)
    conditions = {name: Condition(text[word], hint, image) for name, word in PROMPTS.items() if word in text}
    yield from networks(fixture, inputs, outputs, conditions)


@lacking
def prompts(fixture: Fixture, text: dict[str, Tensor]) -> Iterator[Check]:
    """Prompt words through the tokenizer give the same embeddings as the stored tokens."""
    config = fixture.json("config.json")
    for word in ("positive", "negative"):
        if word in text and f"{word}_prompt" in config:
            got = fixture.model.text.encode([config[f"{word}_prompt"]])
            yield Check(f"text of the {word} prompt", got, text[word], 0.0, "exact")


def image_prompt(
    fixture: Fixture, outputs: dict[str, Tensor], lq: Tensor, text: dict[str, Tensor]
) -> Iterator[Check | Lack]:
    """CLIP's input and feature, the adapter's token, and the context that the release concatenates."""
    prompt = fixture.model.image_prompt
    yield from compare(OUTPUTS, outputs, "clip_input_norm", clip_input(lq, prompt.tower.image_size[0]))
    yield from compare(OUTPUTS, outputs, "clip_image_feature", tower_features(prompt.tower, lq)[0])
    token = prompt.encode(lq)
    yield from compare(OUTPUTS, outputs, "image_token", token)
    for name, word in PROMPTS.items():
        if word in text:
            yield from compare(OUTPUTS, outputs, f"context_{name}", torch.cat([token, text[word]], dim=1))


def autoencoder(
    fixture: Fixture, inputs: dict[str, Tensor], outputs: dict[str, Tensor], lq: Tensor
) -> Iterator[Check | Lack]:
    """Moments (log-variance clamped as in use), mode, sample and decoding."""
    latents = fixture.model.latents
    yield from compare(OUTPUTS, outputs, "cond_latent", fixture.hint_latents.encode(lq))
    stored = dict(outputs)
    if "vae_moments_lq" in stored:
        mean, logvar = stored["vae_moments_lq"].chunk(2, dim=1)
        stored["vae_moments_lq"] = torch.cat([mean, logvar.clamp(-30, 20)], dim=1)
    yield from compare(OUTPUTS, stored, "vae_moments_lq", torch.cat(latents.moments(lq), dim=1))
    if "posterior_noise" in inputs:
        sample = posterior_sample(*latents.moments(lq), inputs["posterior_noise"]) * latents.scale
        yield from compare(OUTPUTS, outputs, "train_lq_latent_sample", sample)
    if "final_latent" in outputs:
        decoded = latents.decode(outputs["final_latent"]) / 2 + 0.5
        yield from compare(OUTPUTS, outputs, "decoded01", decoded, IMAGE, "absolute")


def networks(
    fixture: Fixture, inputs: dict[str, Tensor], outputs: dict[str, Tensor], conditions: dict[str, Condition]
) -> Iterator[Check | Lack]:
    """ControlNet residuals and predicted noise at every recorded timestep, with and without ControlNet, and batched."""
    times = sorted((int(m[1]) for key in inputs if (m := re.fullmatch(r"x_t(\d+)", key))), reverse=True)
    for time in times:
        z, t = inputs[f"x_t{time}"], torch.tensor([time])
        for name, condition in conditions.items():
            for index, residual in enumerate(residuals(fixture, z, t, condition)):
                yield from compare(OUTPUTS, outputs, f"control_{name}_t{time}_{index:02d}", residual)
            yield from compare(OUTPUTS, outputs, f"eps_{name}_t{time}", fixture.denoiser(z, t, condition))
            key = f"eps_nocontrol_{name}_t{time}"
            if key in outputs:
                yield from compare(OUTPUTS, outputs, key, without_control(fixture, z, t, condition))
    if len(times) == 2 and len(conditions) == 2:
        flipped = conditions["uncond"].map(lambda tensor: tensor)
        flipped.hint = flipped.hint.flip(-1)
        z = torch.cat([inputs[f"x_t{time}"] for time in times])
        got = fixture.denoiser(z, torch.tensor(times), conditions["cond"].cat(flipped))
        yield from compare(OUTPUTS, outputs, "eps_batch2", got)


def residuals(fixture: Fixture, z: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
    """The ControlNet's outputs, the middle last."""
    context = {"size": tuple(z.shape[-2:]), "image": condition.image}
    down, middle = fixture.model.controlnet(
        z, t, condition.text, condition.hint, cross_attention_kwargs=context, return_dict=False
    )
    return [*down, middle]


def without_control(fixture: Fixture, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The UNet alone."""
    context = {"size": tuple(z.shape[-2:]), "image": condition.image}
    return fixture.model.unet(z, t, condition.text, cross_attention_kwargs=context, return_dict=False)[0]
