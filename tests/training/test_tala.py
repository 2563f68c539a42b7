"""Stage 'tala' for few steps (ours): the sampled timesteps, absolute errors."""

from __future__ import annotations

from pathlib import Path

import torch

from consissr.models.vae.latents import LinearPath
from consissr.nano.stages import NanoTala, pixel_weights
from consissr.training.stage import Batch
from tests.training.variants import VARIANTS, loop


def few_steps(base: Path, photos: Path, folder: Path, *words: str) -> tuple[NanoTala, Batch]:
    """A stage for two timesteps and a prepared batch."""
    run = loop(base, photos, folder, *VARIANTS["few steps"], *words)
    batch = next(iter(run.batches()))
    with torch.no_grad():
        run.stage.prepare(batch)
    return run.stage, batch


def test_training_at_the_sampled_timesteps(base: Path, photos: Path, tmp_path: Path) -> None:
    for share, wanted in ((1, True), (0, False)):
        stage, batch = few_steps(base, photos, tmp_path, f"tala.plan_share={share}")
        times = torch.cat([stage.timesteps(batch) for _ in range(8)])
        assert (set(times.tolist()) <= {999, 666}) == wanted


def test_errors_of_noise_v_and_pixels(base: Path, photos: Path, tmp_path: Path) -> None:
    """At given z_t an error of v is one of the noise over sqrt(alpha_bar)."""
    generator, t = torch.Generator().manual_seed(0), torch.tensor([3, 900])
    for weighting in ("eps", "v"):
        for kind in ("squared", "absolute"):
            stage, _ = few_steps(base, photos, tmp_path, f"tala.weighting={weighting}", f"tala.error={kind}")
            stage.latents.linear = LinearPath(4, 8)
            eps, target = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
            signal = stage.schedule.alpha_bar[t].sqrt().view(-1, 1, 1, 1).float()
            error = (eps - target) / (signal if weighting == "v" else 1)
            wanted = error.abs().mean() if kind == "absolute" else error.square().mean()
            torch.testing.assert_close(stage.error(eps, target, t), wanted)
            stage.weights = pixel_weights(stage.latents)
            if kind == "absolute":
                wanted = stage.latents.linear.decode(error).abs().mean()
            else:
                power = stage.latents.linear.synthesis.weight.square().sum((0, 2, 3))
                wanted = (error.square() * (power / power.mean()).view(1, -1, 1, 1)).mean()
            torch.testing.assert_close(stage.error(eps, target, t), wanted)
