"""Schedules, colour transfer, sizes, learning rates and stability: everything recorded that needs no network."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from fixtures import IMAGE, Check, Fixture, Lack, lacking
from PIL import Image
from torch import Tensor

from consissr.config.optimizer import OptimizerConfig
from consissr.data.datasets import center_crop
from consissr.diffusion.augmentation import probability
from consissr.diffusion.plans import ddpm_plan
from consissr.diffusion.schedule import Schedule, alpha_bar
from consissr.images import color
from consissr.images.codec import to_uint8
from consissr.images.geometry import (
    ccsr_input,
    finish,
    prepare,
    raise_short_side,
    to_pil,
    to_tensor,
    transfer,
    truncated,
)

STEPS = 100_001
"""Optimiser steps of ConsisSR's first stage."""


def cases(fixture: Fixture) -> Iterator[Check | Lack]:
    """Every table of the folder."""
    checks = {
        "consissr": (tala,),
        "consissr_common": (schedule, schedule_50, color_fix, crops, enlarged, sizes, learning_rates),
        "ccsr": (color_fix_8bit, geometry, geometry_images, global_stability, local_stability),
    }
    for kind, found in checks.items():
        for check in found if kind in fixture.kinds else ():
            yield from lacking(check)(fixture)


def pixels(image: Tensor) -> Tensor:
    """(1,3,H,W) in [-1, 1] -> uint8 (H,W,3)."""
    return to_uint8(image[0]).permute(1, 2, 0)


def tala(fixture: Fixture) -> Iterator[Check | Lack]:
    """Algorithm 1 as released: mask, input, target and loss for one r per batch."""
    inputs, outputs = fixture.tensors("inputs.safetensors"), fixture.tensors("outputs.safetensors")
    marks = sorted({key.split("_")[1] for key in outputs if key.startswith("tala_r")})
    if not marks:
        yield Lack("outputs.safetensors:tala_r*")
    table = Schedule(alpha_bar())
    for mark in marks:
        t, r = inputs["tala_t"], torch.tensor([float(mark[1:].replace("p", "."))], dtype=torch.float64)
        p = probability(t, "as_released")
        mask, z_hq = r < p, inputs["tala_hq"]
        start = torch.where(mask.view(-1, 1, 1, 1), inputs["tala_lq"], z_hq)
        z_t = table.add_noise(start, inputs["tala_noise"], t)
        target = table.eps_from_x0(z_t, z_hq, t)
        name = f"outputs.safetensors:tala_{mark}"
        yield Check(f"{name}_mask", mask, outputs[f"tala_{mark}_mask"], 0.0, "exact")
        yield Check(f"{name}_x_t", z_t, outputs[f"tala_{mark}_x_t"])
        yield Check(f"{name}_target", target, outputs[f"tala_{mark}_target"])
        loss = (inputs["tala_pred"] - target).square().mean()
        yield Check(f"{name}_loss", loss[None], outputs[f"tala_{mark}_loss"])


def spaced(steps: int) -> dict[str, Tensor]:
    """Coefficients of spaced DDPM by the release's names, ascending, read off our formulas."""
    table, plan = Schedule(alpha_bar()), ddpm_plan(steps)[::-1]
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    zero = torch.zeros_like(one)
    t = [step.t for step in plan]
    of_z0 = [table.posterior(zero, one, step.t, step.t_next) for step in plan]
    of_zt = [table.posterior(one, zero, step.t, step.t_next)[0] for step in plan]
    found = {
        "posterior_variance": [variance for _, variance in of_z0],
        "posterior_mean_coef1": [mean for mean, _ in of_z0],
        "posterior_mean_coef2": of_zt,
        "sqrt_recip_alphas_cumprod": [table.x0_from_eps(one, zero, i) for i in t],
        "sqrt_recipm1_alphas_cumprod": [-table.x0_from_eps(zero, one, i) for i in t],
    }
    tensors = {name: torch.stack([value.reshape(()) for value in values]) for name, values in found.items()}
    a = table.alpha_bar[t]
    previous = torch.cat([a.new_ones(1), a[:-1]])
    betas, variance = 1 - a / previous, tensors["posterior_variance"]
    tensors |= {"timesteps": torch.tensor(t), "alphas_cumprod": a, "alphas_cumprod_prev": previous, "betas": betas}
    # the release's other two variances begin with the second one, as the first is zero
    clipped = torch.cat([variance[1:2], variance[1:]]).log()
    return tensors | {"posterior_log_variance_clipped": clipped, "fixed_large": torch.cat([variance[1:2], betas[1:]])}


def schedule(fixture: Fixture) -> Iterator[Check | Lack]:
    """Spaced coefficients for every recorded number of steps."""
    stored = fixture.arrays("schedule.npz")
    if not stored:
        yield Lack("schedule.npz")
    for count in sorted({int(key.split("_")[0][1:]) for key in stored}):
        for name, got in spaced(count).items():
            key = f"n{count}_{name}"
            if key not in stored:
                yield Lack(f"schedule.npz:{key}")
            elif name == "timesteps":
                yield Check(f"schedule.npz:{key}", got, stored[key], 0.0, "exact")
            else:
                yield Check(f"schedule.npz:{key}", got, stored[key], 1e-9)


def schedule_50(fixture: Fixture) -> Iterator[Check | Lack]:
    """Timesteps of several step counts, coefficients of 50."""
    stored, ours = fixture.json("schedule50.json"), spaced(50)
    for key, values in stored.items():
        if key.startswith("timesteps"):
            got = [step.t for step in ddpm_plan(len(values))][::-1]
            yield Check(f"schedule50.json:{key}", got, values, 0.0, "exact")
        elif (name := key.removesuffix("50").removesuffix("_")) in ours:
            yield Check(f"schedule50.json:{key}", ours[name], torch.tensor(values, dtype=torch.float64), 1e-9)


def color_fix(fixture: Fixture) -> Iterator[Check | Lack]:
    """Both transfers on float images."""
    stored = fixture.arrays("colorfix.npz")
    content, style = (torch.from_numpy(stored[name]).float() for name in ("content", "style"))
    for name, fix in (("adain", color.adain), ("wavelet", color.wavelet)):
        if name in stored:
            got = fix(content, style)
            yield Check(f"colorfix.npz:{name}", got, torch.from_numpy(stored[name]).float(), IMAGE, "absolute")
        else:
            yield Lack(f"colorfix.npz:{name}")


def color_fix_8bit(fixture: Fixture) -> Iterator[Check | Lack]:
    """CCSR's transfers on 8-bit images, as `geometry: ccsr` applies them."""
    stored = fixture.arrays("color_fix.npz")
    target, source = (torch.from_numpy(stored[name]).permute(2, 0, 1)[None] / 255 for name in ("target", "source"))
    style = source * 2 - 1
    for name in ("adain", "wavelet"):
        got = pixels(truncated(transfer(target.clone(), lambda top, bottom: style[:, :, top:bottom], name)))
        yield Check(f"color_fix.npz:{name}", got, torch.from_numpy(stored[name]), 1.0, "uint8")


def crops(fixture: Fixture) -> Iterator[Check | Lack]:
    """The crop of ConsisSR's training images."""
    stored = fixture.arrays("image_ops.npz")
    for key in stored:
        if key.startswith("center_crop_"):
            got = center_crop(stored["cc_src"], int(key.split("_")[-1]))
            want = torch.from_numpy(stored[key])
            yield Check(f"image_ops.npz:{key}", torch.from_numpy(got.copy()), want, 0.0, "exact")


def enlarged(fixture: Fixture) -> Iterator[Check | Lack]:
    """ConsisSR's enlargement to a short side, and its padding."""
    stored = fixture.arrays("image_ops.npz")
    source = Image.fromarray(stored["src"])
    for key in stored:
        if key.startswith("auto_resize_"):
            side = int(key.split("_")[-1])
            got = torch.from_numpy(np.asarray(raise_short_side(source, side)).copy())
            yield Check(f"image_ops.npz:{key}", got, torch.from_numpy(stored[key]), 1.0, "uint8")
            if "pad64" in stored:
                x = prepare(to_tensor(source), 1, "consissr", 64, short_side=side).x
                yield Check("image_ops.npz:pad64", pixels(x), torch.from_numpy(stored["pad64"]), 1.0, "uint8")


def sizes(fixture: Fixture) -> Iterator[Check | Lack]:
    """ConsisSR's sizes at every stage, enlarged four times."""
    for row in fixture.json("resize_cases.json"):
        width, height = row["input_wh"]
        found = prepare(torch.zeros(1, 3, height, width), 4, "consissr", 64)
        name = f"resize_cases.json:{width}x{height}"
        yield Check(f"{name} upscaled", list(found.size[::-1]), row["upscaled_wh"], 0.0, "exact")
        yield Check(f"{name} raised", list(found.upscaled[::-1]), row["auto_resize_wh"], 0.0, "exact")
        yield Check(f"{name} padded", list(found.x.shape[2:]), row["padded_hw"], 0.0, "exact")


def learning_rates(fixture: Fixture) -> Iterator[Check | Lack]:
    """Warm-up and cosine of ConsisSR's first stage."""
    from consissr.training.loop import learning_rate

    config = OptimizerConfig(lr=1.0, warmup=1000, decay="cosine", final=0.01)
    for step, value in fixture.json("stage1_lr_multiplier.json").items():
        got = torch.tensor([learning_rate(config, int(step), STEPS)], dtype=torch.float64)
        want = torch.tensor([value], dtype=torch.float64)
        yield Check(f"stage1_lr_multiplier.json:{step}", got, want, 1e-9)


def geometry(fixture: Fixture) -> Iterator[Check | Lack]:
    """CCSR's sizes of the network's input and of the result."""
    for row in fixture.json("geometry.json")["rows"]:
        width, height = row["input_wh"]
        found = prepare(torch.zeros(1, 3, height, width), row["upscale"], "ccsr", 8, short_side=row["process_size"])
        name = f"geometry.json:{width}x{height} x{row['upscale']}"
        yield Check(f"{name} input", [found.x.shape[3], found.x.shape[2]], row["processed_wh"], 0.0, "exact")
        yield Check(f"{name} result", list(found.size[::-1]), row["output_wh"], 0.0, "exact")


def geometry_images(fixture: Fixture) -> Iterator[Check | Lack]:
    """CCSR's resizing of two images, and of one back to the final size."""
    stored = fixture.arrays("geometry.npz")
    said = fixture.json("geometry.json")["npz"]
    for number in sorted(int(key.removeprefix("lq")) for key in stored if key.startswith("lq")):
        lq, want = Image.fromarray(stored[f"lq{number}"]), torch.from_numpy(stored[f"processed{number}"])
        got = torch.from_numpy(np.asarray(ccsr_input(lq, said["upscale"], said["process_size"])).copy())
        yield Check(f"geometry.npz:processed{number}", got, want, 1.0, "uint8")
        back = f"resized_back{number}"
        if back in stored:
            found = prepare(to_tensor(lq), said["upscale"], "ccsr", 8, short_side=said["process_size"])
            result = np.asarray(to_pil(finish(found, found.x.clone(), "ccsr", "none"))).copy()
            yield Check(f"geometry.npz:{back}", torch.from_numpy(result), torch.from_numpy(stored[back]), 1.0, "uint8")


def global_stability(fixture: Fixture) -> Iterator[Check | Lack]:
    """CCSR's G-STD."""
    from consissr.evaluation.stability import global_std

    stored, want = fixture.arrays("stability_inputs.npz"), fixture.json("stability_outputs.json")
    for metric, value in want["G_STD"].items():
        got = global_std(stored[f"{metric}_MN"].T)
        yield Check(f"stability_outputs.json:G_STD {metric}", torch.tensor(got), torch.tensor(value), 1e-6)


def local_stability(fixture: Fixture) -> Iterator[Check | Lack]:
    """CCSR's L-STD, cropped by 4 as its script does, and not cropped."""
    from consissr.evaluation.stability import local_std

    stored, want = fixture.arrays("stability_inputs.npz"), fixture.json("stability_outputs.json")
    for crop, key in ((4, "L_STD_official_crop4"), (0, "L_STD_nocrop")):
        images = stored["images_MNHWC"] / np.float32(255)
        inner = images[:, :, crop : images.shape[2] - crop, crop : images.shape[3] - crop]
        per_scene = torch.tensor([local_std(runs) for runs in inner])
        yield Check(f"stability_outputs.json:{key}_per_scene", per_scene, torch.tensor(want[f"{key}_per_scene"]), 1e-5)
        yield Check(f"stability_outputs.json:{key}", per_scene.mean(), torch.tensor(want[key]), 1e-5)
