"""Start reading here: low-quality images in, restored images out.

One image goes through `geometry.prepare` (upscale, pad), the autoencoder's encoder and the image prompt (together the
`Condition`), the sampler with its plan, the autoencoder's decoder, and `geometry.finish` (crop, colours).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from consissr.config.loading import changed
from consissr.config.sampler import SamplerConfig
from consissr.diffusion.plans import Step, check_plan, ddpm_plan
from consissr.diffusion.sampler import Draw, sample, seeded_draw, start_latent
from consissr.diffusion.schedule import Schedule
from consissr.diffusion.tiling import TiledDenoiser
from consissr.errors import UserError
from consissr.images.geometry import Prepared, finish, prepare
from consissr.images.inputs import Images, equal_sizes, packed, stacked, unpacked
from consissr.inference.memory import (
    KEPT,
    LITTLE,
    Tiles,
    choose_tiles,
    give_back,
    is_out_of_memory,
    keep_freed,
    total_memory,
    weight_bytes,
)
from consissr.models.denoiser import Condition, Denoiser, SoftPrompt, guided
from consissr.models.vae.fast import compile_forward, for_inference
from consissr.models.vae.latents import Latents
from consissr.models.vae.tiling import TiledLatents
from consissr.weights.folder import load_model
from consissr.weights.precision import PRECISIONS, choose_precision

log = logging.getLogger(__name__)

Inputs = Tensor | Sequence[Prepared]
"""Prepared images: their pixels (B,3,H,W), or what makes these when they are needed."""


class Restorer:
    """A loaded model that restores images.

    latents: the autoencoder; denoiser: UNet and ControlNet; prompts: embeddings (1,L,D) by prompt;
    image_prompt: image -> tokens, where the model has an image branch; hint_latents: the encoder of the ControlNet's
    hint, where it is another than `latents`; sampler: the default settings; soft_prompt: image -> tokens after the
    prompt's.
    """

    def __init__(
        self,
        latents: Latents,
        denoiser: Denoiser,
        schedule: Schedule,
        prompts: dict[str, Tensor],
        image_prompt: nn.Module | None = None,
        sampler: SamplerConfig | None = None,
        hint_latents: Latents | None = None,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        soft_prompt: SoftPrompt | None = None,
    ) -> None:
        self.soft_prompt = soft_prompt
        self.schedule, self.sampler = schedule, sampler or SamplerConfig()
        self.prompts = prompts
        self.device, self.dtype = torch.device(device), PRECISIONS[precision]
        self.latents, self.denoiser = latents, denoiser
        self.image_prompt, self.hint_latents = image_prompt, hint_latents or latents
        for network in self.networks():
            network.eval().requires_grad_(False).to(self.device, self.dtype)
            for_inference(network)
        self.keeps_freed = self.device.type == "cpu" and weight_bytes(self.networks()) < LITTLE
        if self.keeps_freed:
            keep_freed(KEPT)
        self.multiple = latents.factor * 2 ** (len(denoiser.unet.config.block_out_channels) - 1)
        """What the sides of the network's input are multiples of, in pixels."""

    @classmethod
    def load(
        cls,
        name: str,
        device: str | None = None,
        precision: str = "auto",
        base: str | None = None,
        **settings: Any,
    ) -> Restorer:
        """A model by bundled name, folder or hub id, ready on `device` (default: an accelerator if there is one).

        precision: 'fp32', 'bf16', 'fp16' or 'auto' (bf16 on accelerators, fp32 on the CPU). base: another place of the
        base model. settings: fields of SamplerConfig; prompts must be set here, because the text encoder is let go.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        precision = choose_precision(precision, device)
        model = load_model(name, base, PRECISIONS[precision], **settings)
        return cls(
            model.latents, model.denoiser(), Schedule(model.alpha_bar), model.prompts, model.image_prompt,
            model.config.sampler, model.hint_latents, device, precision,
        )  # fmt: skip

    def __call__(
        self,
        inputs: Images,
        scale: float = 4,
        seed: int = 0,
        *,
        longest: int | None = None,
        keys: Sequence[str | int] | None = None,
        repeat: int = 0,
        plan: Sequence[Step] | None = None,
        batch_size: int = 1,
        on_step: Callable | None = None,
        **settings: Any,
    ) -> Images:
        """Restore a PIL image, a list of them, or a tensor (B,3,H,W) in [-1, 1]; the same kind comes back (tensors:
        float32 on the CPU).

        Sides become floor(scale * side + 0.5), or the longest one `longest`. Noise depends on (seed, key, repeat) and
        nothing else; keys default to indices. plan: see diffusion.plans and ccsr.timesteps; settings: fields of
        SamplerConfig. Images of equal size run together, `batch_size` at a time. Raises UserError.
        """
        config = changed(self.sampler, settings)
        steps = self.plan(config, plan, settings)
        if not scale > 0 or (longest is not None and longest < 1):
            raise UserError(f"scale {scale} (longest side {longest}): use a number above 0")
        lqs, photos = unpacked(inputs)
        keys = list(range(len(lqs))) if keys is None else list(keys)
        if len(set(keys)) != len(lqs):
            raise UserError(f"{len(lqs)} images have {len(set(keys))} different keys: give each image its own")

        results: dict[int, Tensor] = {}
        for batch in equal_sizes([lq.shape for lq in lqs], batch_size):
            jobs = [prepare(lqs[i], scale, config.geometry, self.multiple, longest) for i in batch]
            y = self.restore_tensor(jobs, [keys[i] for i in batch], seed, repeat, config, steps, on_step=on_step)
            for i, job, image in zip(batch, jobs, y.split(1), strict=True):
                results[i] = finish(job, image, config.geometry, config.color_fix)
        return packed(inputs, photos, [results[i] for i in range(len(lqs))])

    def restore_tensor(
        self,
        x: Inputs,
        keys: Sequence[str | int],
        seed: int = 0,
        repeat: int = 0,
        config: SamplerConfig | None = None,
        plan: Sequence[Step] | None = None,
        draw: Draw | None = None,
        on_step: Callable | None = None,
        tiles: Tiles | None = None,
    ) -> Tensor:
        """Prepared images (B,3,H,W) in [-1, 1], sides multiples of `multiple` -> decoded (B,3,H,W) float32, on the CPU.

        Not clamped, colours not transferred. draw: noise other than that of (seed, key, repeat). Where memory runs out
        the batch is split, then tiles are halved; what has NaN runs again in float32. Never returns NaN.
        """
        config = config or self.sampler
        height, width = x.shape[2:] if isinstance(x, Tensor) else x[0].shape
        plan, tiles = self.plan(config, plan), tiles or self.tiles(config, (height, width), len(x))
        rest = {"config": config, "plan": plan, "on_step": on_step}
        y = self.attempt(x, draw or seeded_draw(seed, keys, repeat), tiles=tiles, **rest)
        if y is None and len(x) > 1 and draw is None:
            log.warning("out of memory with %d images at once: halving the batch", len(x))
            half = len(x) // 2
            parts = [(x[:half], keys[:half]), (x[half:], keys[half:])]
            return torch.cat([self.restore_tensor(*part, seed, repeat, tiles=tiles, **rest) for part in parts])
        if y is None:
            tiles = tiles.smaller(height // self.latents.factor, width // self.latents.factor)
            if tiles is None:
                raise UserError(f"{keys[0]}: out of memory even in the smallest tiles; use another device or precision")
            log.warning("out of memory: trying %s", tiles)
            return self.restore_tensor(x, keys, seed, repeat, draw=draw, tiles=tiles, **rest)
        bad = ~y.isfinite().flatten(1).all(1)
        if bad.any():
            y[bad] = self.in_float32(x, keys, seed, repeat, draw=draw, tiles=tiles, bad=bad, **rest)[bad]
        return y

    def in_float32(self, x: Inputs, keys: Sequence[str | int], *arguments, bad: Tensor, **rest) -> Tensor:
        """Another attempt with float32 weights; UserError if they are that already."""
        names = ", ".join(str(key) for key, is_bad in zip(keys, bad.tolist(), strict=True) if is_bad)
        if self.dtype == torch.float32:
            raise UserError(f"{names}: the result is not a number even in float32; check the input and the model")
        log.warning("%s: not a number in %s, running again in float32", names, self.dtype)
        usual, self.dtype = self.dtype, torch.float32
        try:
            for network in self.networks():
                network.to(torch.float32)
            return self.restore_tensor(x, keys, *arguments, **rest)
        finally:
            self.dtype = usual
            for network in self.networks():
                network.to(usual)

    @torch.no_grad()
    def attempt(self, x: Inputs, draw: Draw, tiles: Tiles, **rest) -> Tensor | None:
        """Decoded images (B,3,H,W), float32 on the CPU, or None if memory ran out."""
        try:
            latents = self.tiled_latents(tiles, rest["config"])
            return latents.decode(self.restore_latent(x, draw, tiles=tiles, latents=latents, **rest)).float().cpu()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.no_grad()
    def restore_latent(
        self,
        x: Inputs,
        draw: Draw,
        config: SamplerConfig,
        plan: Sequence[Step],
        tiles: Tiles,
        latents: Latents,
        on_step: Callable | None = None,
    ) -> Tensor:
        """Prepared images -> restored latents (B,C,h,w) for the decoder, on the model's device."""
        own_hint = self.hint_latents is not self.latents
        hint_latents = self.tiled_latents(tiles, config, self.hint_latents) if own_hint else None
        z, positive, negative = self.conditions(x, draw, config, latents, hint_latents)
        denoiser = self.denoiser
        if tiles.diffusion:
            together = 1 if self.device.type == "cpu" else 4  # batches save time on accelerators only
            denoiser = TiledDenoiser(denoiser, tiles.diffusion, tiles.stride, config.tile_weights, together)

        denoise, first = guided(denoiser, positive, negative, config.guidance), None
        if negative is not None and config.first_prompt != "guided" and plan[0].kind != "step":
            text = negative.text if config.first_prompt == "negative" else positive.text
            first = guided(denoiser, negative.changed(text=text))
        start = start_latent(config.start, z, self.schedule, draw)
        self.give_back()
        z = sample(denoise, plan, start, self.schedule, draw, first, on_step).to(self.dtype)
        self.give_back()
        return z

    def conditions(
        self, x: Inputs, draw: Draw, config: SamplerConfig, latents: Latents, hint_latents: Latents | None
    ) -> tuple[Tensor, Condition, Condition | None]:
        """z_lq (B,C,h,w) of prepared images, and what the networks are told: (z_lq, positive, negative if used)."""
        x = (x if isinstance(x, Tensor) else stacked([job.x for job in x])).to(self.device, self.dtype)
        twice = config.posterior_rows == 2 and config.posterior == "sample" and config.guidance != 1
        names = ("posterior", "posterior_positive") if twice else ("posterior",)
        # One pass could serve both samples, but its rounding is not that of the release's batch of two.
        mean, logvar = (part.float() for part in latents.moments(x.repeat(2, 1, 1, 1) if twice else x))
        if config.posterior == "sample":
            shape = (len(x), *mean.shape[1:])
            mean = mean + torch.exp(0.5 * logvar) * torch.cat([draw(name, shape) for name in names]).to(mean)
        z, z_positive = (mean * latents.scale).split(len(x)) if twice else 2 * [mean * latents.scale]
        hint, hint_positive = z, z_positive
        if hint_latents is not None:
            hint = hint_positive = hint_latents.encode(x).float()
        tokens = None if self.image_prompt is None else self.image_prompt.encode(x)
        soft = None if self.soft_prompt is None else self.soft_prompt.encode(x)
        positive = Condition(self.prompt(config.positive, x), hint_positive, tokens).with_soft(soft)
        negative = None
        if config.guidance != 1:
            negative = Condition(self.prompt(config.negative, x), hint, tokens).with_soft(soft)
        return z, positive, negative

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents (B,C,h,w) -> images (B,3,H,W), about [-1, 1], float32 on the CPU."""
        factor = self.latents.factor
        tiles = self.tiles(self.sampler, (z.shape[2] * factor, z.shape[3] * factor), len(z))
        return self.tiled_latents(tiles, self.sampler).decode(z.to(self.device, self.dtype)).float().cpu()

    def step_picture(self, z: Tensor, lq: Tensor, scale: float, longest: int | None = None) -> Tensor:
        """What latents (1,C,h,w) of `lq` (1,3,H,W) show: (1,3,H',W') in [-1, 1], the result's size, its own colours."""
        job = prepare(lq, scale, self.sampler.geometry, self.multiple, longest)
        return finish(job, self.decode(z), self.sampler.geometry, "none")

    def tiled_latents(self, tiles: Tiles, config: SamplerConfig, latents: Latents | None = None) -> Latents:
        """An autoencoder (the model's own by default), in tiles where there are any."""
        latents = latents or self.latents
        return TiledLatents(latents, tiles.vae, config.vae_tiling) if tiles.vae else latents

    def prompt(self, prompt: str, x: Tensor) -> Tensor:
        """Embeddings (B,L,D) of a prompt, for a batch of images."""
        if prompt not in self.prompts:
            known = ", ".join(f"'{known}'" for known in self.prompts)
            raise UserError(
                f"prompt '{prompt}' was not encoded at loading, only {known}: use one of these, or pass it to "
                "Restorer.load (a converted model with a text encoder of its own keeps no others)"
            )
        return self.prompts[prompt].to(x).expand(len(x), -1, -1)

    def plan(self, config: SamplerConfig, plan: Sequence | None, settings: dict[str, Any] | None = None) -> list[Step]:
        """The plan given, else the configuration's, checked."""
        if plan is None:
            changed_here = set(settings or {})
            stale = sorted({"plan", "steps", "t_max", "t_min", "grid"} & changed_here - {"timesteps"})
            if config.timesteps and ("timesteps" in changed_here or not stale):
                plan = config.timesteps
            elif config.plan == "nuts":
                raise UserError(f"{' '.join(stale) or 'NUTS'}: pass plan=ccsr.timesteps.nuts_plan(T, t_max, t_min)")
        return check_plan(ddpm_plan(config.steps, len(self.schedule)) if plan is None else plan, len(self.schedule))

    def tiles(self, config: SamplerConfig, size: tuple[int, int], count: int) -> Tiles:
        """Tile sizes for `count` prepared images of `size` (H, W)."""
        unet, vae, factor = self.denoiser.unet, self.latents.vae.config, self.latents.factor
        trained = unet.config.sample_size
        one_size = any(name.endswith("position_emb") for name, _ in unet.named_parameters())
        per_value = self.dtype.itemsize * count
        needs = (
            100 * unet.config.block_out_channels[0] * per_value,
            8 * vae.block_out_channels[0] * (factor // self.latents.patch) ** 2 * per_value,
        )
        latent = (size[0] // factor, size[1] // factor)
        side = trained if isinstance(trained, int) else max(latent)
        return choose_tiles(config, latent, factor, side, one_size, needs, total_memory(self.device))

    def give_back(self) -> None:
        """Between stages: what a large model has freed goes back to the system."""
        if not self.keeps_freed:
            give_back()

    def compile(self) -> None:
        """torch.compile the networks: slow at the first image of a size, faster after; results differ by rounding."""
        autoencoders = {id(latents): latents.vae for latents in (self.latents, self.hint_latents)}.values()
        for network in (self.denoiser, *(part for vae in autoencoders for part in (vae.encoder, vae.decoder))):
            compile_forward(network)

    def networks(self) -> list[nn.Module]:
        """All networks, each once."""
        found = [self.latents, self.denoiser, self.image_prompt, self.hint_latents]
        return list({id(network): network for network in found if network is not None}.values())
