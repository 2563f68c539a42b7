"""ConsisSR's recorded training steps as released: stage 2 (`consissr_train_*`) and RCLIP (`consissr_common`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fixtures import GRADIENT, NETWORK, Check, Fixture, Lack, compare, to_image
from torch import Tensor, nn

from consissr import ldm, released
from consissr.diffusion.schedule import Schedule
from consissr.diffusion.tala import probability, tala_inputs
from consissr.models.denoiser import Condition, Denoiser
from consissr.models.image_prompt import build_tower, tower_features

OUTPUTS = "train_outputs.safetensors"
STEP = "train_step.json"
RCLIP = "rclip_distill.safetensors"


def cases(fixture: Fixture) -> Iterator[Check | Lack]:
    """Every recorded quantity of the steps."""
    if fixture.kind == "consissr_common":
        yield from rclip(fixture)
    if fixture.kind == "consissr_train":
        yield from stage_2(fixture)


def stage_2(fixture: Fixture) -> Iterator[Check | Lack]:
    """Inputs, prediction, loss and gradients."""
    inputs, outputs = fixture.tensors("train_inputs.safetensors"), fixture.tensors(OUTPUTS)
    if not inputs or not (fixture.weights_folder / "weights.safetensors").is_file():
        yield Lack("train_inputs.safetensors" if not inputs else "weights.safetensors of the sibling fixture")
        return
    model, schedule = fixture.model, Schedule(fixture.model.alpha_bar)
    lq = to_image(inputs["lq_u8"])
    with torch.no_grad():
        z_hq = model.latents.encode(to_image(inputs["hq_u8"]), "sample", inputs["posterior_noise_hq"])
        z_lq = model.latents.encode(lq, "sample", inputs["posterior_noise_lq"])
        text, hint = model.text.encode([""] * len(lq)), model.hint_latents.encode(lq)
    t, p = inputs["t"], probability(inputs["t"], "as_released", T=len(schedule))
    z_t, target, _ = tala_inputs(z_hq, z_lq, inputs["eps"], t, inputs["r"], p, schedule)
    parameters = dict(by_released_name(fixture))
    learn_as_released(fixture, parameters)
    image = model.image_prompt.encode(lq)
    denoiser = Denoiser(model.unet, model.controlnet, model.alpha_bar, encoder_gradients=False)
    prediction = denoiser(z_t, t, Condition(text, hint, image))
    loss = (prediction - target).square().mean()
    loss.backward()
    found = {"hint": hint, "context": torch.cat([image, text], dim=1), "x_t": z_t, "target": target}
    for name, got in (found | {"eps_pred": prediction, "loss": loss[None]}).items():
        yield from compare(OUTPUTS, outputs, name, got, NETWORK)
    for key in outputs:
        if key.startswith("grad."):
            yield Check(f"{OUTPUTS}:{key}", parameters[key.removeprefix("grad.")].grad, outputs[key], GRADIENT)
    yield from norms(fixture, parameters)


def rclip(fixture: Fixture) -> Iterator[Check | Lack]:
    """Features of the teacher on HQ and of the student on LQ images, the loss between them and its gradients."""
    stored = fixture.tensors(RCLIP)
    if not stored:
        yield Lack(RCLIP)
        return
    clip, features = fixture.json("rclip_distill.json")["clip"], {}
    for role, image in (("teacher", "hq"), ("student", "lq")):
        tower = build_tower(clip["embed_dim"], clip["vision_cfg"]).eval()
        prefix = f"{role}."
        tower.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
        features[role] = tower_features(tower, stored[image])[0]
        yield from compare(RCLIP, stored, f"feat_{image}", features[role])
    loss = (features["student"] - features["teacher"].detach()).square().mean()
    loss.backward()
    yield from compare(RCLIP, stored, "loss", loss[None])
    for name, parameter in tower.named_parameters():
        if f"grad.{name}" in stored:
            yield Check(f"{RCLIP}:grad.{name}", parameter.grad, stored[f"grad.{name}"], GRADIENT)


def norms(fixture: Fixture, parameters: dict[str, nn.Parameter]) -> Iterator[Check | Lack]:
    """Gradient norms of everything trained, and which trained tensors have no gradient at all."""
    if not fixture.has(STEP):
        yield Lack(STEP)
        return
    step = fixture.json(STEP)
    wanted = step["grad_norm_of_optimised_params"]
    total = torch.tensor(list(wanted.values())).norm().item()
    for name, want in wanted.items():
        small = want < 1e-6 * total
        rule = (1e-6 * total, "absolute") if small else (GRADIENT, "relative")
        yield Check(f"{STEP}:|grad {name}|", parameters[name].grad.norm(), want, *rule)
    dead = sorted(name for name in learned(fixture) if parameters[name].grad is None)
    same = dead == sorted(step["optimised_params_without_gradient"])
    yield Check(f"{STEP}:tensors without a gradient", torch.tensor(same), torch.tensor(True), 0.0, "exact")


def learned(fixture: Fixture) -> set[str]:
    """Names of what the release's optimiser holds."""
    step = fixture.json(STEP)
    return {*step["grad_norm_of_optimised_params"], *step["optimised_params_without_gradient"]}


def learn_as_released(fixture: Fixture, parameters: dict[str, nn.Parameter]) -> None:
    """Switch gradients on for what the release trains, off elsewhere."""
    names = learned(fixture) if fixture.has(STEP) else {name for name in parameters if "visual" not in name}
    for part in (fixture.model.unet, fixture.model.controlnet, fixture.model.image_prompt):
        part.requires_grad_(False)
    for name in names:
        parameters[name].requires_grad_(True)


def by_released_name(fixture: Fixture) -> Iterator[tuple[str, nn.Parameter]]:
    """Our parameters under the names of the authors' file, through the readers' own renaming."""
    model, state = fixture.model, ldm.read_state(fixture.weights_folder / "weights.safetensors")
    parts = {
        "model.diffusion_model.": (released.unet_names, model.unet),
        "control_model.": (released.controlnet_names, model.controlnet),
        "cond_stage_model.ft_layers_4.": (released.adapter_names, model.image_prompt.adapter),
    }
    for prefix, (rename, module) in parts.items():
        stored = ldm.take(state, prefix)
        theirs: dict[int, str] = {id(tensor): name for name, tensor in stored.items()}
        renamed: dict[str, Tensor] = rename(stored)
        parameters = dict(module.named_parameters())
        for ours, tensor in renamed.items():
            yield f"{prefix}{theirs[id(tensor)]}", parameters[ours]
