"""Whole samplings through `Restorer`: CCSR's recorded runs (plain, guided, tiled) and ConsisSR's guided sampling."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from fixtures import GUIDED_LATENT, IMAGE, Check, Fixture, Lack, Missing, Stored, compare, lacking, to_image
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from ccsr.timesteps import nuts_plan
from consissr.config.sampler import SamplerConfig
from consissr.diffusion.plans import Step, ddpm_plan
from consissr.diffusion.schedule import CLEAN, Schedule
from consissr.diffusion.tiling import TiledDenoiser, gaussian_weights
from consissr.images.codec import to_uint8
from consissr.images.geometry import Prepared, finish, transfer
from consissr.models.denoiser import Denoiser
from consissr.models.vae.latents import Latents
from consissr.models.vae.released import RELEASED_MARGIN, PooledTiles
from consissr.models.vae.tiling import TiledLatents
from consissr.restorer import Restorer

TILED_VAE = "tiled_vae.safetensors"


class Recording(Schedule):
    """A schedule that keeps what went through it: the sampler's latents and estimates, in order."""

    def __init__(self, alpha_bar: Tensor) -> None:
        super().__init__(alpha_bar)
        self.noised: list[Tensor] = []
        self.estimates: list[tuple[int, Tensor, Tensor, Tensor]] = []
        """(t, z_t, eps, x0) of every evaluation."""

    def add_noise(self, z0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """Recorded."""
        self.noised.append(super().add_noise(z0, eps, t))
        return self.noised[-1]

    def x0_from_eps(self, z_t: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """Recorded."""
        self.estimates.append((int(t), z_t, eps, super().x0_from_eps(z_t, eps, t)))
        return self.estimates[-1][-1]


@torch.no_grad()
def cases(fixture: Fixture) -> Iterator[Check | Lack]:
    """Every sampling that the folder records."""
    if "ccsr" in fixture.kinds:
        for run in sorted(path.name for path in fixture.folder.glob("run_*.safetensors")):
            yield from ccsr_run(fixture, run)
        yield from tiled_decoder(fixture)
    if "consissr" in fixture.kinds:
        yield from consissr_run(fixture)


@lacking
def ccsr_run(fixture: Fixture, run: str) -> Iterator[Check | Lack]:
    """One recorded call of CCSR v2's pipeline."""
    stored, said = fixture.tensors(run), fixture.metadata(run)
    prompts = fixture.tensors("inputs.safetensors")
    inputs = fixture.tensors("tile_inputs.safetensors") if "tile_size_px" in said else prompts
    steps, guidance = int(said["num_inference_steps"]), float(said["guidance_scale"])
    plan = nuts_plan(steps, float(said["t_max"]), float(said["t_min"]), "leading")
    tile, stride = int(said.get("tile_size_px", 0)), int(said.get("tile_stride_px", 0))
    config = SamplerConfig(
        start={"lr": "lq", "noise": "noise"}[said.get("start_point", "lr")],
        guidance=guidance,
        positive="positive",
        negative="negative",
        first_prompt="negative",
        posterior="sample",
        posterior_rows=2,
        tile=tile,
        tile_overlap=tile - stride,
        tile_weights="as_released",
        vae_tile=0,
    )
    schedule = Recording(fixture.model.alpha_bar)
    texts = {"positive": prompts["prompt_embeds"], "negative": prompts["negative_prompt_embeds"]}
    restorer = Restorer(fixture.latents, fixture.denoiser, schedule, texts, sampler=config)
    lq = to_image(inputs["lq_image_uint8"])
    tiles = restorer.tiles(config, tuple(lq.shape[2:]), 1)
    noises = ccsr_noises(inputs, plan)
    with predictions(TiledDenoiser if tile else Denoiser) as predicted:
        z = restorer.restore_latent(lq, lambda name, shape: noises[name].float(), config, plan, tiles)
    yield from compare(run, stored, "final_latent", z)
    for i, (step, eps) in enumerate(zip(plan, predicted, strict=True)):
        yield from compare_like(run, stored, f"net_eps_{i}_t{step.t}", eps)
    if "image" in stored:
        got = (restorer.decode(z) / 2 + 0.5).clamp(0, 1)
        yield Check(f"{run}:image", got, stored["image"], IMAGE, "absolute")
    for i, noised in enumerate(schedule.noised):
        yield from compare_like(run, stored, rf"add_noise_{i}_t\d+", noised)
    yield from ccsr_evaluations(run, stored, schedule, noises, steps)
    for size in (int(m[1]) for key in stored if (m := re.fullmatch(r"gaussian_weights_(\d+)", key))):
        got = gaussian_weights(size, size, "as_released")
        yield Check(f"{run}:gaussian_weights_{size}", got, stored[f"gaussian_weights_{size}"])
    for key in stored:
        if m := re.fullmatch(r"gaussian_weights_(\d+)_(row|col)(\d+)", key):
            got = gaussian_weights(int(m[1]), int(m[1]), "as_released")
            yield Check(f"{run}:{key}", got[int(m[3])] if m[2] == "row" else got[:, int(m[3])], stored[key])


def ccsr_noises(inputs: Stored, plan: list[Step]) -> dict[str, Tensor]:
    """The recorded noises under the sampler's names. The release counts DDPM steps, the plan evaluations."""
    posterior, jumps = inputs["posterior_noise"], sum(step.kind == "renoise" for step in plan)
    named = {"init": inputs["init_noise"], "tmax": inputs["noise_tmax"], "posterior": posterior[:1]}
    named |= {"posterior_positive": posterior[1:2]}
    return named | {f"step[{i + jumps}]": noise for i, noise in enumerate(inputs["step_noise"])}


def ccsr_evaluations(
    run: str, stored: dict[str, Tensor], schedule: Recording, noises: dict[str, Tensor], steps: int
) -> Iterator[Check]:
    """Each evaluation's x0 and stepped sample (the last of which is discarded)."""
    for i, (t, z, _, x0) in enumerate(schedule.estimates):
        yield from compare_like(run, stored, rf"pred_x0_\d+_t{t}", x0)
        if t < len(schedule) - 1 and f"step[{i}]" in noises:
            t_next = max(t - len(schedule) // steps, CLEAN)
            mean, variance = schedule.posterior(z, x0, t, t_next)
            got = mean + variance.sqrt() * noises[f"step[{i}]"]
            yield from compare_like(run, stored, rf"step_\d+_t{t}_prev", got)


@contextmanager
def predictions(kind: type) -> Iterator[list[Tensor]]:
    """What modules of this class put out in the meantime: both halves of a guided evaluation in one batch."""
    found: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple, out: Tensor) -> None:
        if type(module) is kind:
            found.append(out)

    hook = register_module_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def compare_like(run: str, stored: dict[str, Tensor], pattern: str, got: Tensor) -> Iterator[Check]:
    """A check against every recorded quantity whose name matches."""
    for key in stored:
        if re.fullmatch(pattern, key):
            yield Check(f"{run}:{key}", got, stored[key])


@lacking
def tiled_decoder(fixture: Fixture) -> Iterator[Check | Lack]:
    """CCSR's tiled decoder: `latent`, the tiled output, the tiles' boxes, and how far tiled and untiled differ.

    A recorded latent may be scaled, unscaled, or past `post_quant_conv`, where the release's hook takes over. It is
    read as the one that explains the output best; a wrong decoder matches none of them.
    """
    stored, said = fixture.tensors(TILED_VAE), tiled_words(fixture)
    if not stored:
        raise Missing(TILED_VAE)
    latents = fixture.latents
    maps = {key: value for key, value in stored.items() if value.ndim == 4 and "minus" not in key}
    latent = maps.pop(next((key for key in maps if "latent" in key), min(maps, key=lambda key: maps[key].numel())))
    full_key = next((key for key in maps if re.search("full|untiled|plain", key)), None)
    key = next((key for key in maps if key != full_key and "tile" in key), next(key for key in maps if key != full_key))
    sides = (text for word, text in said.items() if re.search(r"tile(_size)?(_latents?)?$", word) and text.isdigit())
    tile = int(next(sides, "16"))
    tiled = TiledLatents(latents, tile, "as_released")
    results = [(form, tiled.decode(form)) for form in latent_forms(latent, latents)]
    z, got = min(results, key=lambda result: Check("", result[1], maps[key]).errors())
    yield Check(f"{TILED_VAE}:{key}", got, maps[key], IMAGE, "absolute")
    full = latents.decode(z)
    if full_key:
        yield Check(f"{TILED_VAE}:{full_key}", full, maps[full_key], IMAGE, "absolute")
    gaps = {word: value.item() for word, value in stored.items() if "absmax" in word}
    gaps |= {word: float(text) for word, text in said.items() if "absmax" in word}
    for name, gap in gaps.items():
        yield Check(f"{TILED_VAE}:{name}", (full - got).abs().max(), torch.tensor(gap), IMAGE, "absolute")
    boxes = {word: value for word, value in stored.items() if "box" in word}
    boxes |= {word: torch.tensor(json.loads(text)) for word, text in said.items() if "box" in word}
    for name, recorded in boxes.items():
        yield tile_boxes(f"{TILED_VAE}:{name}", recorded, tile, z, latents.factor)


def tiled_words(fixture: Fixture) -> dict[str, str]:
    """The metadata of the tiled decoder's file, if it is there; values that are JSON objects are opened."""
    found = fixture.metadata(TILED_VAE) if fixture.has(TILED_VAE) else {}
    for text in list(found.values()):
        if text.startswith("{"):
            found |= {word: json.dumps(value) for word, value in json.loads(text).items()}
    return found


def latent_forms(latent: Tensor, latents: Latents) -> list[Tensor]:
    """What a recorded latent (1,C,h,w) may mean, as scaled latents: scaled, unscaled, past `post_quant_conv`."""
    conv = latents.vae.post_quant_conv
    before = torch.linalg.solve(conv.weight[:, :, 0, 0], (latent - conv.bias[:, None, None]).flatten(2))
    return [latent, latent * latents.scale, before.view_as(latent) * latents.scale]


def tile_boxes(name: str, want: Tensor, tile: int, z: Tensor, factor: int) -> Check:
    """Boxes [x1, x2, y1, y2] of the tiles: as read from the latent, as written to the image, or both in this order."""
    size = (z.shape[2], z.shape[3])
    cores = PooledTiles([], tile).cores(size)
    read, written = (
        torch.tensor([[box.left, box.right, box.top, box.bottom] for box in boxes])
        for boxes in ([core.expanded(RELEASED_MARGIN, size) for core in cores], cores)
    )
    written_to = written * factor
    forms = [read, written_to, written, torch.stack([read, written_to]), torch.cat([read, written_to])]
    best = min(forms, key=lambda form: Check("", form, want).errors())
    return Check(name, best, want, 0.0, "exact")


@lacking
def consissr_run(fixture: Fixture) -> Iterator[Check | Lack]:
    """ConsisSR's guided spaced DDPM from recorded noise, and the two colour transfers of its result."""
    file = "outputs.safetensors"
    stored, inputs = fixture.tensors(file), fixture.tensors("inputs.safetensors")
    lq = to_image(inputs["lq_u8"])
    noises = {"init": inputs["x_T"]} | {f"step[{i}]": noise for i, noise in enumerate(inputs["step_noises"])}
    said, model = fixture.json("config.json"), fixture.model
    encode = model.text.encode_tokens
    texts = {word: encode(inputs[f"tokens_{word}"]) for word in ("positive", "negative")}
    config = SamplerConfig(
        plan="ddpm",
        steps=said["sampler_steps"],
        start="noise",
        guidance=said["cfg_scale"],
        positive="positive",
        negative="negative",
        geometry="consissr",
        tile=0,
        vae_tile=0,
    )
    schedule = Recording(model.alpha_bar)
    restorer = Restorer(
        model.latents,
        fixture.denoiser,
        schedule,
        texts,
        model.image_prompt,
        config,
        hint_latents=model.hint_latents,
    )
    plan, tiles = ddpm_plan(config.steps), restorer.tiles(config, tuple(lq.shape[2:]), 1)
    yield Check("timesteps", [step.t for step in plan], said["sampler_timesteps_desc"], 0.0, "exact")
    z = restorer.restore_latent(lq, lambda name, shape: noises[name].float(), config, plan, tiles)
    trajectory = torch.stack([z_t for _, z_t, _, _ in schedule.estimates[1:]] + [z])
    yield from compare(file, stored, "sampler_traj", trajectory, GUIDED_LATENT)
    yield from compare(file, stored, "final_latent", z, GUIDED_LATENT)
    y = restorer.decode(z)
    size = tuple(lq.shape[2:])
    prepared = Prepared.of(lq, size, size)
    for fix in ("adain", "wavelet"):
        yield from compare(file, stored, fix, transfer(y / 2 + 0.5, prepared.rows, fix), IMAGE, "absolute")
    image = to_uint8(finish(prepared, y.clone(), "consissr", "adain"))[0].permute(1, 2, 0)
    yield from compare(file, stored, "adain_u8", image, 1.0, "uint8")
