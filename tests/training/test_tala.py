"""Stage 'tala' for few steps (ours): the sampled timesteps, dropped hints, absolute errors."""

from __future__ import annotations

from pathlib import Path

import torch

from consissr.models.vae.latents import LinearPath
from consissr.training.restoration import pixel_weights
from consissr.training.stage import Batch
from consissr.training.tala import Tala
from tests.training.test_restoration import VARIANTS, loop


def few_steps(base: Path, photos: Path, folder: Path, *words: str) -> tuple[Tala, Batch]:
    """A stage for two timesteps and a prepared batch."""
    run = loop(base, photos, folder, *VARIANTS["few steps"], *words)
    batch = next(iter(run.batches()))
    with torch.no_grad():
        run.stage.prepare(batch)
    return run.stage, batch


def test_training_at_the_sampled_timesteps(base: Path, photos: Path, tmp_path: Path) -> None:
    for share, wanted in ((1, True), (0, False)):
        stage, batch = few_steps(base, photos, tmp_path, f"tala.plan_share={share}")
        with torch.no_grad():
            times = torch.cat([stage.predict(batch).t for _ in range(4)])
        assert (set(times.tolist()) <= {999, 666}) == wanted


def test_without_the_hint_only_the_image_tokens_tell(base: Path, photos: Path, tmp_path: Path) -> None:
    for dropout, blind in ((1, True), (0, False)):
        stage, batch = few_steps(base, photos, tmp_path, f"tala.hint_dropout={dropout}", "model.hint=conv")
        guess = {}
        for name, change in (("as it is", {}), ("hint", {"hint": 2}), ("image", {"features": -1})):
            batch.generators[:] = [torch.Generator().manual_seed(i) for i in range(2)]
            cache, batch.cache = batch.cache, batch.cache | {k: v * batch.cache[k] for k, v in change.items()}
            for layer in (m for m in stage.denoiser.modules() if getattr(m, "bias", None) is not None):
                if not layer.weight.any():
                    torch.nn.init.normal_(layer.weight, std=0.1, generator=torch.Generator().manual_seed(3))
            with torch.no_grad():
                guess[name] = stage.predict(batch).eps
            batch.cache = cache
        assert torch.equal(guess["as it is"], guess["hint"]) == blind
        assert not torch.equal(guess["as it is"], guess["image"])


def test_absolute_errors_are_of_v_and_pixels(base: Path, photos: Path, tmp_path: Path) -> None:
    stage, batch = few_steps(base, photos, tmp_path, "tala.weighting=v")
    with torch.no_grad():
        found = stage.predict(batch)
        signal = stage.schedule.alpha_bar[found.t].sqrt().view(-1, 1, 1, 1)
        wanted = ((found.eps - found.target) / signal).abs().mean()
        torch.testing.assert_close(stage.error(found), wanted.float())
        stage.latents.linear = LinearPath(found.eps.shape[1], 8)
        stage.weights = pixel_weights(stage.latents)
        pixels = stage.latents.linear.decode((found.eps - found.target) / signal.float())
        torch.testing.assert_close(stage.error(found), pixels.abs().mean())
