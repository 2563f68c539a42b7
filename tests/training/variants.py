"""Variants of the restoring stages on tiny networks, and two steps of a run of one."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from consissr.nano.config import run_config
from consissr.training.loop import Loop
from scripts.train import stage_builder

VISION = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 2, "head_width": 8}
RUN = ["batch=2", "micro_batch=2", "tracker=none", "data.crop=64", "precision=fp32", "steps=3", "optimizer.lr=1e-3"]
PATCHES = "model.image_tokens=patches"
SHAPE = ["model.hint=stack", "model.position_embedding=16", "model.transposed_attention=true"]
DDPM = ["sampler.plan=ddpm", "sampler.steps=2", "sampler.start=noise"]
VARIANTS = {
    "consissr": ["stage=tala", "model.image_prompt=hpa", PATCHES, *SHAPE, *DDPM],
    "as released": [
        *("stage=tala", "model.image_prompt=hpa", "model.image_kv=separate", *SHAPE, *DDPM),
        *("tala.probability=as_released", "tala.shared_draw=true", "tala.encoder_gradients=false"),
        "tala.posterior=sample",
    ],
    "few steps": [
        *("stage=nano_tala", "model.image_prompt=hpa", PATCHES, *SHAPE, "sampler.plan=ddpm", "sampler.start=noise"),
        *("sampler.timesteps=[[999,666,step],[666,-1,x0]]", "tala.error=absolute", "tala.plan_share=0.5"),
        "tala.weighting=v",
    ],
    "without image": ["stage=tala", "model.image_prompt=none", *DDPM, "tala.probability=off"],
    "ip_adapter": ["stage=tala", "model.image_prompt=ip_adapter", PATCHES, *DDPM, "tala.probability=linear"],
    "ip_adapter, one token": ["stage=tala", "model.image_prompt=ip_adapter", *DDPM, "tala.gamma=5"],
    "hpa_separate": ["stage=tala", "model.image_prompt=hpa_separate", PATCHES, *DDPM, "tala.gamma=20"],
    "nuts": [
        "stage=nuts",
        "model.image_prompt=hpa",
        PATCHES,
        *SHAPE,
        "tala.probability=power",
        "gradient_checkpointing=true",
    ],
    "pre-training": ["stage=nuts", "nuts.losses=[l_diff]", "model.unet_trained=[conv_out]"],
}


def loop(base: Path, photos: Path, folder: Path, *more: str) -> Loop:
    """A run that has not begun."""
    words = [f"model.base={base}", f"data.paths=[{photos}]", f"output_dir={folder}", *RUN, *more]
    config = run_config(None, words)
    return Loop(config, stage_builder(config.stage))


def two_steps(run: Loop) -> set[str]:
    """Take two optimiser steps, then a third gradient; names of trained tensors that any of them reached.

    Where zero layers stand one behind the other's (those of the ControlNet's additions behind its zero convolutions),
    the inner layers' gradient begins after two steps.
    """
    seen: set[str] = set()
    for batch in run.batches():
        totals: dict[str, Tensor] = {}
        run.accumulate(batch, totals)
        seen |= {n for n, p in run.weights().items() if p.grad is not None and p.grad.abs().sum() > 0}
        if run.step == 2:
            break
        run.update(totals)
        run.step += 1
    return seen


def frozen(run: Loop) -> dict[str, Tensor]:
    """What a run does not train."""
    trained = {id(p) for p in run.weights().values()}
    return {n: p for n, p in run.stage.networks.named_parameters() if id(p) not in trained}
