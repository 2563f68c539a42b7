"""CCSR's recorded training steps as released, by the stages themselves: stage 1 (`Nuts`) and stage 2 (`Deft`)."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from fixtures import GRADIENT, IMAGE, Check, Fixture, Lack, compare, lacking
from torch import Tensor, nn

from ccsr.adversary import DinoAdversary
from ccsr.deft import Deft
from ccsr.discriminator import Augmentation, ProjectedDiscriminator, build_vit
from ccsr.nuts import Nuts
from ccsr.timesteps import nuts_plan
from consissr.config.loading import load_config
from consissr.config.training import TrainConfig
from consissr.diffusion.sampler import sample, start_latent
from consissr.diffusion.schedule import Schedule
from consissr.models.denoiser import Condition, Denoiser
from consissr.models.vae.latents import posterior_sample
from tests.training.plain import Recorded, only, start, watched

STAGE_1, STAGE_2 = "stage1_outputs.safetensors", "stage2_outputs.safetensors"
DISCRIMINATOR, VIT = "stage2_disc/discriminator.safetensors", "dino.model.model."
"""The release's discriminator, and what stands before the names of its ViT."""
AS_RELEASED = {
    "nuts": ["nuts.posterior=sample", "nuts.t_max_step=667"],
    "deft": [
        *("nuts.posterior=sample", "nuts.t_max_step=667", "deft.reconstruction=l2", "deft.clamp=true"),
        *("deft.perceptual=none", "deft.adaptive=false", "deft.adversarial_weight=0.05"),
        *("deft.adversarial_start=100", "deft.discriminator=dino", "init=recorded"),
    ],
}
"""The stages' settings as released. (The release trains at a t_max of 667 and samples at 499.)"""
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


def run_config(fixture: Fixture, given: dict[str, Tensor], stage: str, *words: str) -> TrainConfig:
    """The run's configuration on the fixture's model, whose empty prompt becomes the recorded one."""
    config = load_config(TrainConfig, None, [f"stage={stage}", *AS_RELEASED[stage], *words])
    config.model, config.sampler = fixture.model.config.model, fixture.model.config.sampler
    fixture.model.prompts = {"": given["prompt_embeds"]}
    return config


@lacking
def stage_1(fixture: Fixture, given: dict[str, Tensor]) -> Iterator[Check | Lack]:
    """Both starts: latents, estimates and losses; gradients of the ControlNet where they are recorded."""
    outputs, schedule, _ = fixture.tensors(STAGE_1), Schedule(fixture.model.alpha_bar), fixture.latents
    images, t = {name: pixels(given[f"{name}_uint8"]) for name in ("hq", "lq")}, given["timesteps"]
    noises = [given[f"noise{i}"] for i in (1, 2, 3)]
    for prefix, first in (("hqstart", "hq"), ("lrstart", "lq")):
        stage = Nuts(run_config(fixture, given, "nuts", f"nuts.start={first}"), fixture.model)
        (phase,) = stage.phases
        start(phase, stage.networks)
        posterior = [given["post_noise_hq"], given["post_noise_lq"]]
        batch = Recorded(**images, names=[], generators=[], normal=[*posterior, *noises], integer=[t])
        with watched(whole=only(stage.networks, Denoiser), controlnet=fixture.model.controlnet) as seen:
            with torch.no_grad():
                stage.prepare(batch)
            found = phase.loss(batch, 0)
        found["loss"].backward()
        yield from losses(outputs, prefix, found)
        at_t, at_T, at_tmax = seen["whole"]
        x0 = {"x0_T": at_T, "x0_tmax": at_tmax}
        x0 = {name: schedule.x0_from_eps(call["z_t"], call["returned"], call["t"]) for name, call in x0.items()}
        x0 |= {"latents": schedule.x0_from_eps(at_t["z_t"], noises[0], t)}
        for name, got in x0.items():
            yield from compare(STAGE_1, outputs, f"{prefix}_{name}", got)
        for call in seen["controlnet"]:
            yield from compare(STAGE_1, outputs, f"{prefix}_cond", call["controlnet_cond"])
        if any(key.startswith(f"{prefix}_grad") for key in outputs):
            yield from gradients(STAGE_1, outputs, prefix, released_names(fixture.model.controlnet))


def losses(outputs: dict[str, Tensor], prefix: str, found: dict[str, Tensor]) -> Iterator[Check | Lack]:
    """The parts of stage 1's loss, under the release's names."""
    for theirs, ours in {"loss_diff": "l_diff", "l_T": "l_T", "l_tmax": "l_tmax", "loss": "loss"}.items():
        yield from compare(STAGE_1, outputs, f"{prefix}_{theirs}", found[ours][None])


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


class RecordedAdversary(DinoAdversary):
    """The recorded discriminator, its condition, and the recorded views, in the order the release draws them."""

    def __init__(self, fixture: Fixture, given: dict[str, Tensor]) -> None:
        nn.Module.__init__(self)
        self.discriminator = discriminator_of(fixture)
        self.learned = self.discriminator.heads
        self.condition = given["cls_lr"]
        self.views = [(augmentation(given, number), None) for number in range(3)]

    def prepare(self, batch: Recorded) -> None:
        """What DINOv2 said of the low-quality images."""
        batch.cache["summary"] = self.condition

    def view(self, batch: Recorded) -> tuple[Augmentation, None]:
        """The generator's, then the photograph's, then that of the image given to the discriminator."""
        return self.views.pop(0)


@lacking
def stage_2(fixture: Fixture, given: dict[str, Tensor]) -> Iterator[Check | Lack]:
    """Every recorded variant of the step: one evaluation, two, and one before the adversarial loss begins."""
    outputs, hq = fixture.tensors(STAGE_2), pixels(given["hq_uint8"])
    for prefix in sorted({key.removesuffix("_loss_l2") for key in outputs if key.endswith("_loss_l2")}):
        yield from stage_2_step(fixture, given, outputs, prefix)
    discriminator = discriminator_of(fixture)
    if any(key.startswith("eval_noaug_feat") for key in outputs):
        yield from judged(outputs, discriminator.eval(), hq, given["cls_lr"])
    if "augment0_of_hq" in outputs:
        got, want = augmentation(given, 0)(hq), outputs["augment0_of_hq"]
        step = got.shape[2] // want.shape[2]
        yield Check(f"{STAGE_2}:augment0_of_hq", got[:, :, ::step, ::step], want, IMAGE, "absolute")


@lacking
def stage_2_step(
    fixture: Fixture, given: dict[str, Tensor], outputs: dict[str, Tensor], prefix: str
) -> Iterator[Check | Lack]:
    """One decoder step, then one discriminator step."""
    latents = fixture.latents
    stage = Deft(run_config(fixture, given, "deft"), fixture.model, RecordedAdversary(fixture, given).train())
    of_decoder, of_judge = stage.phases
    normal = [torch.zeros_like(given["post_noise_lq"]), given["post_noise_lq"], given["noise_T"]]
    images = {name: pixels(given[f"{name}_uint8"]) for name in ("hq", "lq")}
    batch = Recorded(**images, names=[], generators=[], normal=normal)
    with torch.no_grad():
        stage.prepare(batch)
    if not prefix.startswith("S1"):  # the release may decode the sampler's result; our stage trains on x0_from_T
        batch.cache["x0_from_T"] = sampled(fixture, given)
    step = 100 if prefix.endswith("warm") else 101
    start(of_decoder, stage.networks)
    with watched(convolution=latents.vae.post_quant_conv, judge=stage.adversary) as seen:
        decoder = of_decoder.loss(batch, step)
        decoder["loss"].backward()
        for name, got in {"loss_l2": decoder["pixel"], "gan_loss": decoder["adversarial"]}.items():
            yield from compare(STAGE_2, outputs, f"{prefix}_{name}", got[None])
        yield from compare(STAGE_2, outputs, f"{prefix}_loss", decoder["loss"][None])
        names = {f"decoder.{name}": p for name, p in latents.vae.decoder.named_parameters()}
        yield from gradients(STAGE_2, outputs, prefix, names)
        start(of_judge, stage.networks)
        judge = of_judge.loss(batch, step)
        judge["loss"].backward()
    yield from compare(STAGE_2, outputs, f"{prefix}_latents_in", seen["convolution"][0]["input"] * latents.scale)
    image = seen["judge"][0]["x"]
    if (key := f"{prefix}_image_sub8") in outputs:
        factor = image.shape[2] // outputs[key].shape[2]
        yield Check(f"{STAGE_2}:{key}", image[..., ::factor, ::factor], outputs[key], IMAGE, "absolute")
    else:
        yield Lack(f"{STAGE_2}:{key}")
    for name, call in zip(("fake_G", "real", "fake_D"), seen["judge"], strict=True):
        yield from compare(STAGE_2, outputs, f"{prefix}_logits_{name}", call["returned"][0])
    weighted = {"loss_disc": judge["loss"]} | {name: 0.5 * judge[name] for name in ("loss_real", "loss_fake")}
    for name, got in weighted.items():
        yield from compare(STAGE_2, outputs, f"{prefix}_{name}", got[None])
    norm = torch.stack([p.grad.norm() for p in of_judge.parameters.values()]).norm()
    key = f"{prefix}_disc_grad_total_norm"
    yield Check(f"{STAGE_2}:{key}", norm[None], outputs[key], GRADIENT)


@torch.no_grad()
def sampled(fixture: Fixture, given: dict[str, Tensor]) -> Tensor:
    """x0 of the last of two evaluations, started from the low-quality latent."""
    schedule, latents = Schedule(fixture.model.alpha_bar), fixture.latents
    z_lq = posterior_sample(*latents.moments(pixels(given["lq_uint8"])), given["post_noise_lq"]) * latents.scale
    condition = Condition(given["prompt_embeds"], z_lq)
    noises = {"init": given["noise_T"], "tmax": given["noise_tmax"]}
    draw = lambda name, shape: noises[name].float()  # noqa: E731
    denoiser, begin = fixture.denoiser, start_latent("lq", z_lq, schedule, draw)
    return sample(lambda z, t: denoiser(z, t, condition), nuts_plan(6, 2 / 3, 0.5, "leading"), begin, schedule, draw)


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
    state, heads = dict(fixture.tensors(DISCRIMINATOR)), int(re.search(r"heads (\d+)", said["vit"])[1])
    vit = build_vit({name.removeprefix(VIT): state.pop(name) for name in list(state) if name.startswith(VIT)}, heads)
    discriminator = ProjectedDiscriminator(vit, int(said["c_dim"]))
    discriminator.heads.load_state_dict({name.removeprefix("heads."): value.float() for name, value in state.items()})
    return discriminator


def augmentation(given: dict[str, Tensor], number: int) -> Augmentation:
    """One of the recorded draws."""
    return Augmentation(*(given[f"aug{number}_{name}"] for name in ("tx", "ty", "cx", "cy")))
