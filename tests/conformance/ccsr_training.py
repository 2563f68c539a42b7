"""CCSR's recorded training steps as released: stage 1 (NUTS) and stage 2 (decoder and discriminator)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from fixtures import GRADIENT, IMAGE, Check, Fixture, Lack, compare, lacking
from torch import Tensor, nn
from torch.nn import functional as F

from ccsr.deft import adversarial_weight, discriminator_hinge, generator_adversarial
from ccsr.discriminator import Augmentation, ProjectedDiscriminator, read_discriminator
from ccsr.nuts import nuts_losses
from ccsr.timesteps import nuts_plan
from consissr.diffusion.sampler import recorded_draw, sample, start_latent
from consissr.diffusion.schedule import Schedule
from consissr.models.denoiser import Condition

STAGE_1, STAGE_2 = "stage1_outputs.safetensors", "stage2_outputs.safetensors"
DISCRIMINATOR = "stage2_disc/discriminator.safetensors"
T_MAX = 667
"""The timestep of t_max that the release trains at."""
OURS = {"condition_conv_in": "controlnet_cond_embedding.0"}


def cases(fixture: Fixture) -> Iterator[Check | Lack]:
    """Every recorded quantity of both steps."""
    if "ccsr" not in fixture.kinds:
        return
    for stage, outputs, check in (("stage1", STAGE_1, stage_1), ("stage2", STAGE_2, stage_2)):
        given = f"{stage}_inputs.safetensors"
        absent = [Lack(name) for name in (given, outputs) if not fixture.has(name)]
        yield from absent or check(fixture, fixture.tensors(given))


def pixels(image: Tensor) -> Tensor:
    """uint8 (B,3,H,W) -> [-1, 1]."""
    return image.float() / 255 * 2 - 1


@lacking
def stage_1(fixture: Fixture, given: dict[str, Tensor]) -> Iterator[Check | Lack]:
    """Both starts: losses and x0; gradients of the ControlNet where they are recorded."""
    outputs, latents, schedule = fixture.tensors(STAGE_1), fixture.latents, Schedule(fixture.model.alpha_bar)
    with torch.no_grad():
        z_hq = latents.encode(pixels(given["hq_uint8"]), "sample", given["post_noise_hq"])
        z_lq = latents.encode(pixels(given["lq_uint8"]), "sample", given["post_noise_lq"])
    condition = Condition(given["prompt_embeds"], z_lq)
    noises = [given[f"noise{i}"] for i in (1, 2, 3)]
    denoiser, controlnet = fixture.denoiser, fixture.model.controlnet.requires_grad_(True)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        return denoiser(z, t, condition)

    for prefix, start in (("hqstart", "hq"), ("lrstart", "lq")):
        controlnet.zero_grad(set_to_none=True)
        compared: list[Tensor] = []

        def error(value: Tensor, target: Tensor, compared: list[Tensor] = compared) -> Tensor:
            compared.append(value.detach())
            return F.mse_loss(value, target)

        z_start = z_lq if start == "lq" else z_hq
        found = nuts_losses(denoise, z_hq, z_start, given["timesteps"], noises, schedule, T_MAX, error=error)
        loss = found["l_diff"] + found["l_T"] + found["l_tmax"]
        named = {"cond": z_lq, "latents": z_hq, "x0_T": compared[1], "x0_tmax": compared[2]}
        named |= {"loss_diff": found["l_diff"][None], "l_T": found["l_T"][None], "l_tmax": found["l_tmax"][None]}
        for name, got in (named | {"loss": loss[None]}).items():
            yield from compare(STAGE_1, outputs, f"{prefix}_{name}", got)
        if any(key.startswith(f"{prefix}_grad") for key in outputs):
            loss.backward()
            yield from gradients(STAGE_1, outputs, prefix, released_names(controlnet))
    controlnet.requires_grad_(False)


def released_names(controlnet: nn.Module) -> dict[str, nn.Parameter]:
    """The ControlNet's parameters under the release's names."""
    renamed = {}
    for name, parameter in controlnet.named_parameters():
        for released, ours in OURS.items():
            name = name.replace(ours, released)
        renamed[name] = parameter
    return renamed


def gradients(
    file: str, outputs: dict[str, Tensor], prefix: str, parameters: dict[str, nn.Parameter]
) -> Iterator[Check]:
    """Recorded gradients, their norms by sorted name, and the norm of all. Tiny norms are compared absolutely."""
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    norms = torch.stack([grads[name].norm() for name in sorted(grads)])
    for key, stored in outputs.items():
        if m := re.fullmatch(rf"{prefix}_grad::(.+)", key):
            yield Check(f"{file}:{key}", grads[m[1]], stored, GRADIENT)
        elif key == f"{prefix}_grad_total_norm":
            yield Check(f"{file}:{key}", norms.norm().reshape(stored.shape), stored, GRADIENT)
        elif key == f"{prefix}_grad_norms_sorted_by_name":
            tiny = stored < 1e-6 * stored.norm()
            limit = 1e-6 * stored.norm().item()
            yield Check(f"{file}:{key}", norms[~tiny], stored[~tiny], GRADIENT)
            yield Check(f"{file}:{key} (tiny)", norms[tiny], stored[tiny], limit, "absolute")


@lacking
def stage_2(fixture: Fixture, given: dict[str, Tensor]) -> Iterator[Check | Lack]:
    """Every recorded variant of the step: one evaluation, two, and one before the adversarial loss begins."""
    outputs, hq = fixture.tensors(STAGE_2), pixels(given["hq_uint8"])
    discriminator = discriminator_of(fixture).train()
    decoder = fixture.latents.vae.decoder.requires_grad_(True)
    for prefix in sorted({key.removesuffix("_loss_l2") for key in outputs if key.endswith("_loss_l2")}):
        yield from stage_2_step(fixture, given, outputs, prefix, hq)
    decoder.requires_grad_(False)
    if any(key.startswith("eval_noaug_feat") for key in outputs):
        yield from judged(outputs, discriminator.eval(), hq, given["cls_lr"])
    if "augment0_of_hq" in outputs:
        got, want = augmentation(given, 0)(hq), outputs["augment0_of_hq"]
        step = got.shape[2] // want.shape[2]
        yield Check(f"{STAGE_2}:augment0_of_hq", got[:, :, ::step, ::step], want, IMAGE, "absolute")


@lacking
def stage_2_step(
    fixture: Fixture, given: dict[str, Tensor], outputs: dict[str, Tensor], prefix: str, hq: Tensor
) -> Iterator[Check | Lack]:
    """One decoder step, then one discriminator step."""
    latents, discriminator = fixture.latents, discriminator_of(fixture).train()
    z, c = stage_2_latent(fixture, given, prefix), given["cls_lr"]
    decoder = latents.vae.decoder
    decoder.zero_grad(set_to_none=True)
    image = latents.decode(z).clamp(-1, 1)
    discriminator.requires_grad_(False)
    fake, _ = discriminator(image, c, augmentation(given, 0))
    pixel, adversarial = F.mse_loss(image, hq), generator_adversarial(fake)
    loss = pixel + adversarial_weight(100 if prefix.endswith("warm") else 101) * adversarial
    loss.backward()
    yield from compare(STAGE_2, outputs, f"{prefix}_latents_in", z)
    if (key := f"{prefix}_image_sub8") in outputs:
        factor = image.shape[2] // outputs[key].shape[2]
        yield Check(f"{STAGE_2}:{key}", image[..., ::factor, ::factor], outputs[key], IMAGE, "absolute")
    else:
        yield Lack(f"{STAGE_2}:{key}")
    for name, got in {"loss_l2": pixel, "gan_loss": adversarial, "loss": loss}.items():
        yield from compare(STAGE_2, outputs, f"{prefix}_{name}", got[None])
    yield from compare(STAGE_2, outputs, f"{prefix}_logits_fake_G", fake)
    yield from gradients(STAGE_2, outputs, prefix, {f"decoder.{n}": p for n, p in decoder.named_parameters()})

    discriminator.heads.requires_grad_(True)
    real, _ = discriminator(hq, c, augmentation(given, 1))
    fake, _ = discriminator(image.detach(), c, augmentation(given, 2))
    losses = discriminator_hinge(real, fake)
    losses["loss"].backward()
    yield from compare(STAGE_2, outputs, f"{prefix}_logits_real", real)
    yield from compare(STAGE_2, outputs, f"{prefix}_logits_fake_D", fake)
    weighted = {"loss_disc": losses["loss"]} | {name: 0.5 * losses[name] for name in ("loss_real", "loss_fake")}
    for name, got in weighted.items():
        yield from compare(STAGE_2, outputs, f"{prefix}_{name}", got[None])
    norm = torch.stack([p.grad.norm() for p in discriminator.heads.parameters()]).norm()
    key = f"{prefix}_disc_grad_total_norm"
    yield Check(f"{STAGE_2}:{key}", norm[None], outputs[key], GRADIENT)


@torch.no_grad()
def stage_2_latent(fixture: Fixture, given: dict[str, Tensor], prefix: str) -> Tensor:
    """What the decoder is given: x0 of the last evaluation, started from the low-quality latent."""
    schedule = Schedule(fixture.model.alpha_bar)
    z_lq = fixture.latents.encode(pixels(given["lq_uint8"]), "sample", given["post_noise_lq"])
    condition = Condition(given["prompt_embeds"], z_lq)
    plan = nuts_plan(1, 2 / 3, 0.0, "leading") if prefix.startswith("S1") else nuts_plan(6, 0.6667, 0.5, "leading")
    steps = {f"step[{i + 1}]": noise for i, noise in enumerate(given["step_noise"])}
    draw = recorded_draw({"init": given["noise_T"], "tmax": given["noise_tmax"]} | steps)
    start = start_latent("lq", z_lq, schedule, draw)
    denoiser = fixture.denoiser
    return sample(lambda z, t: denoiser(z, t, condition), plan, start, schedule, draw)


def judged(
    outputs: dict[str, Tensor], discriminator: ProjectedDiscriminator, hq: Tensor, c: Tensor
) -> Iterator[Check | Lack]:
    """Token maps and logits of every head, without augmentation."""
    with torch.no_grad():
        for i, (feature, head) in enumerate(zip(discriminator.features(hq), discriminator.heads, strict=True)):
            yield from compare(STAGE_2, outputs, f"eval_noaug_feat_{i}", feature)
            yield from compare(STAGE_2, outputs, f"eval_noaug_logits_head{i}", head(feature, c))


def discriminator_of(fixture: Fixture) -> ProjectedDiscriminator:
    """The recorded discriminator in its first state; sizes that the weights don't show stand in the file's metadata."""
    said = fixture.metadata(DISCRIMINATOR)
    heads = int(re.search(r"heads (\d+)", said["vit"])[1])
    return read_discriminator(dict(fixture.tensors(DISCRIMINATOR)), int(said["c_dim"]), heads)


def augmentation(given: dict[str, Tensor], number: int) -> Augmentation:
    """One of the recorded draws."""
    return Augmentation(*(given[f"aug{number}_{name}"] for name in ("tx", "ty", "cx", "cy")))
