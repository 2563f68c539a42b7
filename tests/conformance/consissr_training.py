"""ConsisSR's recorded training steps as released: stage 2 (`consissr_train_*`) and RCLIP (`consissr_common`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fixtures import GRADIENT, NETWORK, Check, Fixture, Lack, Stored, compare, lacking, to_image
from torch import Tensor, nn

from consissr.config.tala import TalaConfig
from consissr.config.training import TrainConfig
from consissr.models.denoiser import Denoiser
from consissr.models.image_prompt import build_tower, tower_features
from consissr.training.rclip import Rclip
from consissr.training.stage import Batch
from consissr.training.tala import Tala
from consissr.weights import from_ldm, ldm, released_consissr
from consissr.weights.files import read_weights
from tests.training.plain import Recorded, only, start, watched

NOISES = ("posterior_noise_hq", "posterior_noise_lq", "eps")
"""Recorded noise, in the order the stage draws it."""

OUTPUTS = "train_outputs.safetensors"
STEP = "train_step.json"
RCLIP = "rclip_distill.safetensors"


def cases(fixture: Fixture) -> Iterator[Check | Lack]:
    """Every recorded quantity of the steps."""
    if "consissr_common" in fixture.kinds:
        yield from rclip(fixture)
    if "consissr_train" in fixture.kinds:
        yield from stage_2(fixture)


def tala_stage(fixture: Fixture) -> Tala:
    """The stage on the fixture's weights, with the release's settings."""
    model = fixture.model
    config = TrainConfig(
        model=model.config.model,
        sampler=model.config.sampler,
        tala=TalaConfig(
            probability="as_released", gamma=10, shared_draw=True, encoder_gradients=False, posterior="sample"
        ),
    )
    model.prompts = {"": model.text.encode([""])}
    return Tala(config, model)


def recorded(inputs: Stored) -> Recorded:
    """The recorded batch; Missing if it lacks an image or a draw."""
    images = {name: to_image(inputs[f"{name}_u8"]) for name in ("hq", "lq")}
    draws = {"normal": [inputs[name] for name in NOISES], "uniform": [inputs["r"]], "integer": [inputs["t"]]}
    return Recorded(**images, names=[], generators=[], **draws)


@lacking
def stage_2(fixture: Fixture) -> Iterator[Check | Lack]:
    """What the stage's networks are given and give, its loss and gradients."""
    inputs, outputs = fixture.tensors("train_inputs.safetensors"), fixture.tensors(OUTPUTS)
    batch, stage = recorded(inputs), tala_stage(fixture)
    (phase,) = stage.phases
    start(phase, stage.networks)
    with watched(whole=only(stage.networks, Denoiser), unet=fixture.unet, controlnet=fixture.model.controlnet) as seen:
        with torch.no_grad():
            stage.prepare(batch)
        loss = phase.loss(batch, 0)["loss"]
    (call,) = seen["unet"]
    (whole,) = seen["whole"]
    whole["returned"].retain_grad()
    loss.backward()
    eps = whole["returned"]
    context = torch.cat([call["cross_attention_kwargs"]["image"], call["encoder_hidden_states"]], dim=1)
    found = {"hint": seen["controlnet"][0]["controlnet_cond"], "context": context, "x_t": call["sample"]}
    # the loss is a mean of squares: its gradient 2 (eps - target) / N tells what was asked for
    found |= {"eps_pred": eps, "target": eps - eps.grad * eps.numel() / 2, "loss": loss[None]}
    for name, got in found.items():
        yield from compare(OUTPUTS, outputs, name, got, NETWORK)
    parameters = dict(by_released_name(fixture))
    for key in outputs:
        if key.startswith("grad."):
            yield Check(f"{OUTPUTS}:{key}", parameters[key.removeprefix("grad.")].grad, outputs[key], GRADIENT)
    yield from norms(fixture, parameters, stage)


@lacking
def rclip(fixture: Fixture) -> Iterator[Check | Lack]:
    """Features of the teacher on HQ and of the student on LQ images, the loss between them and its gradients."""
    stored = fixture.tensors(RCLIP)
    batch = Batch(hq=stored["hq"], lq=stored["lq"], names=[], generators=[])
    clip, towers = fixture.json("rclip_distill.json")["clip"], {}
    for role in ("teacher", "student"):
        towers[role] = build_tower(clip["embed_dim"], dict(clip["vision_cfg"])).eval()
        prefix = f"{role}."
        towers[role].load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
    stage = Rclip(TrainConfig(stage="rclip"), **towers)
    start(stage.phases[0], stage.networks)
    with torch.no_grad():
        stage.prepare(batch)
        student = tower_features(stage.student, batch.lq)[0]
    loss = stage.phases[0].loss(batch, 0)["loss"]
    loss.backward()
    for name, got in (("feat_hq", batch.cache["pooled"]), ("feat_lq", student), ("loss", loss[None])):
        yield from compare(RCLIP, stored, name, got)
    for name, parameter in stage.phases[0].parameters.items():
        if f"grad.{name}" in stored:
            yield Check(f"{RCLIP}:grad.{name}", parameter.grad, stored[f"grad.{name}"], GRADIENT)


@lacking
def norms(fixture: Fixture, parameters: dict[str, nn.Parameter], stage: Tala) -> Iterator[Check | Lack]:
    """Gradient norms of everything trained, and that the stage trains just what has a gradient in the release.

    The release's optimiser also holds tensors that never get one (the UNet's encoder and middle): the stage leaves
    them out.
    """
    step = fixture.json(STEP)
    wanted = step["grad_norm_of_optimised_params"]
    total = torch.tensor(list(wanted.values())).norm().item()
    for name, want in wanted.items():
        small = want < 1e-6 * total
        rule = (1e-6 * total, "absolute") if small else (GRADIENT, "relative")
        yield Check(f"{STEP}:|grad {name}|", parameters[name].grad.norm(), want, *rule)
    trained = {id(p) for p in stage.phases[0].parameters.values()}
    names = {name for name, p in parameters.items() if id(p) in trained}
    same = len(trained) == len(names) and names == wanted.keys()
    yield Check(f"{STEP}:trained tensors", torch.tensor(same), torch.tensor(True), 0.0, "exact")
    dead = sorted(name for name in step["optimised_params_without_gradient"] if parameters[name].grad is None)
    same = dead == sorted(step["optimised_params_without_gradient"])
    yield Check(f"{STEP}:tensors without a gradient", torch.tensor(same), torch.tensor(True), 0.0, "exact")


def by_released_name(fixture: Fixture) -> Iterator[tuple[str, nn.Parameter]]:
    """Our parameters under the names of the authors' file, through the readers' own renaming."""
    model, state = fixture.model, read_weights(fixture.weights_folder / "weights.safetensors")
    parts = {
        "model.diffusion_model.": (from_ldm.unet_names, model.unet),
        "control_model.": (from_ldm.controlnet_names, model.controlnet),
        "cond_stage_model.ft_layers_4.": (
            lambda weights: ldm.rename(weights, released_consissr.ADAPTER, {}),
            model.image_prompt.adapter,
        ),
    }
    for prefix, (rename, module) in parts.items():
        stored = ldm.split_off(state, prefix)
        theirs: dict[int, str] = {id(tensor): name for name, tensor in stored.items()}
        renamed: dict[str, Tensor] = rename(stored)
        parameters = dict(module.named_parameters())
        for ours, tensor in renamed.items():
            yield f"{prefix}{theirs[id(tensor)]}", parameters[ours]
