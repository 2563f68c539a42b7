"""Every stage as a run of a few seconds: what tests add to the configs of `nano`, in the order in which stages build on
each other. A new stage needs a line in each of the two tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

COMMON = ["batch=2", "micro_batch=2", "steps=2", "log_every=1", "tracker=none", "data.crop=64", "checkpoint_every=1"]
COMMON += ["compile=false", "precision=fp32", "frozen_precision=fp32"]
SMALL = {
    "autoencoder": ["autoencoder.widths=[16,16]", "autoencoder.latent_channels=4"],
    "clip": [
        *("clip.image_size=32", "clip.width=16", "clip.layers=1", "clip.head_width=8", "clip.embed_dim=8"),
        *("clip.text_width=8", "clip.text_layers=1", "clip.text_heads=2", "clip.held_out=4"),
    ],
    "prior": [
        "prior.widths=[16,16]",
        "prior.attention=[false,true]",
        "prior.heads=2",
        "prior.context_dim=8",
    ],
    "rclip": ["model.image_tokens=patches"],
    "tala": ["sampler.plan=ddpm", "sampler.steps=2", "model.image_prompt=hpa"],
    "nuts": [],
    "deft": ["deft.discriminator_width=8", "deft.adversarial_start=-1"],
}


def slow_but(*fast: str) -> list:
    """All stages as a test's parameters, marked slow but for the `fast` ones."""
    return [stage if stage in fast else pytest.param(stage, marks=pytest.mark.slow) for stage in SMALL]


def started(config: Any) -> Any:
    """A run that has not begun."""
    from consissr.training.loop import Loop
    from scripts.train import stage_builder

    return Loop(config, stage_builder(config.stage))


def validated(photos: Path) -> list[str]:
    """What the fixture `runs` adds to `words`: two held-out photographs."""
    return [f"data.validation={photos}", "data.validation_count=2"]


def beside(runs: Path, folder: Path, stage: str) -> Path:
    """`folder`, made where it is missing, with the results of the stages before `stage`, so that it can be trained."""
    folder.mkdir(exist_ok=True)
    for earlier in list(SMALL)[: list(SMALL).index(stage)]:
        (folder / earlier).symlink_to(runs / earlier)
    return folder


def words(stage: str, photos: Path, runs: Path, *more: str) -> list[str]:
    """Arguments of scripts/train.py for a tiny run of `stage`, on the earlier stages' results below `runs`."""
    inputs = {
        "autoencoder": [],
        "clip": [],
        "prior": [f"init={runs}/autoencoder", f"prior.text={runs}/clip"],
        "rclip": [f"model.base={runs}/prior", f"model.image_encoder={runs}/clip", "init="],
        "tala": [f"model.base={runs}/prior", f"init={runs}/rclip"],
        "nuts": [f"model.base={runs}/prior", "init="],
        "deft": [f"model.base={runs}/prior", f"init={runs}/nuts"],
    }
    config = Path(f"configs/nano/{stage}.yaml")
    own = [f"data.paths=[{photos}]", f"output_dir={runs}/{stage}", *COMMON, *SMALL[stage], *inputs[stage]]
    return ["--config", str(config if config.is_file() else "configs/nano/nuts.yaml"), *own, *more]
