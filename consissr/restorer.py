"""Start reading here: low-quality images in, restored images out.

One image in the order of its data: a file, PIL image or tensor is prepared (enlarged to the result's size, padded) and
encoded (z_lq); z_lq and the prompts are the condition; the sampler runs its plan; the result is decoded and finished
(cropped, colours transferred).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from consissr.config.loading import changed
from consissr.config.sampler import SamplerConfig
from consissr.diffusion.plans import Step, check_plan, ddpm_plan
from consissr.diffusion.sampler import Denoise, Draw, drawn, sample, seeded_draw, start_latent
from consissr.diffusion.schedule import Schedule
from consissr.diffusion.tiling import TiledDenoiser
from consissr.errors import UserError
from consissr.images.device import to_device
from consissr.images.formats import output_size
from consissr.images.geometry import Prepared, finish, finished, prepare
from consissr.images.inputs import Images, check_numbers, equal_sizes, network_input, noise_names, packed, unpacked
from consissr.images.rows import Rows
from consissr.models.denoiser import Condition, Denoiser, SoftPrompt, guided
from consissr.models.fast import compile_all, for_inference
from consissr.models.memory import pixel_device
from consissr.models.norms import shared_norms
from consissr.models.recovery import finite, within_memory
from consissr.models.tiles import OnTile, Tiles, in_batch, tiles_for
from consissr.models.vae.latents import Latents, posterior_sample
from consissr.models.vae.tiling import TiledLatents
from consissr.weights.find import find_model
from consissr.weights.folder import load_model
from consissr.weights.precision import PRECISIONS, choose_precision

Inputs = Tensor | Sequence[Prepared]
"""Prepared images: their pixels (B,3,H,W), or what makes these when they are needed."""
RULES = {"plan", "steps", "t_max", "t_min", "grid"}
"""Settings from which a plan is made where none is written out (`timesteps`)."""


class Restorer:
    """A loaded model that restores images.

    latents: the autoencoder; denoiser: UNet and ControlNet; prompts: embeddings (1,L,D) by prompt;
    image_prompt: image -> tokens, where the model has an image branch; hint_latents: the encoder of the ControlNet's
    hint, where it is another than `latents`; sampler: the default settings; soft_prompt: image -> tokens after the
    prompt's. The networks are frozen and moved to `device`; `models.fast.for_inference`, which `load` applies before,
    makes them faster.
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
        self.latents, self.denoiser, self.schedule, self.prompts = latents, denoiser, schedule, prompts
        self.image_prompt, self.soft_prompt = image_prompt, soft_prompt
        self.hint_latents = hint_latents or latents
        self.sampler = sampler or SamplerConfig()
        self.device, self.dtype = torch.device(device), PRECISIONS[precision]
        for network in self.networks():
            network.eval().requires_grad_(False).to(self.device, self.dtype)
        self.precision, self.compiled = precision, False
        """What `load` was asked for, or chose; whether `compile` was called."""
        self.multiple = latents.factor * 2 ** (len(denoiser.unet.config.block_out_channels) - 1)
        """What the sides of the network's input are multiples of, in pixels."""

    @classmethod
    def load(
        cls, name: str, device: str | None = None, precision: str = "auto", base: str | None = None, **settings: Any
    ) -> Restorer:
        """A model by bundled name, folder or hub id, ready on `device` (default: an accelerator if there is one).

        precision: 'fp32', 'bf16', 'fp16' or 'auto' (bf16 where the device computes it fast; else fp16 on GPUs, fp32 on
        the CPU). base: another place of the base model. settings: fields of SamplerConfig; prompts must be set here,
        because the text encoder is let go.
        """
        if RULES & settings.keys() and "timesteps" not in settings:
            settings["timesteps"] = []  # the model's own plan, written out, would win
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        precision = choose_precision(precision, device)
        model = load_model(find_model(name, precision != "fp32"), base, PRECISIONS[precision], **settings)
        denoiser = model.denoiser()
        for network in (model.latents, denoiser, model.image_prompt, model.hint_latents):
            if network is not None:
                for_inference(network, device)
        return cls(
            model.latents, denoiser, Schedule(model.alpha_bar), model.prompts, model.image_prompt,
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
        on_tile: OnTile | None = None,
        **settings: Any,
    ) -> Images:
        """Restore a PIL image, a tensor (B,3,H,W) in [-1, 1], or a list of PIL images or photos; the same kind comes
        back (tensors: float32 on the CPU; of a tensor on a GPU, there, unless its result is too large for that; photos:
        their pixels are finished when they are read).

        Sides become floor(scale * side + 0.5), or the longest one `longest`. Noise depends on (seed, key, repeat) and
        nothing else; keys default to indices. plan: see diffusion.plans and ccsr.timesteps; settings: fields of
        SamplerConfig. Images of equal size run together, `batch_size` at a time. on_step: see diffusion.sampler;
        on_tile(tiles done, in all, share of the work) tells how far a large image is. Raises UserError.
        """
        config = changed(self.sampler, settings)
        plan = self.plan(config, plan, settings)
        check_numbers(scale=scale, longest=1 if longest is None else longest, batch_size=batch_size)
        lqs, photos = unpacked(inputs)
        seed, repeat, keys = noise_names(seed, repeat, range(len(lqs)) if keys is None else keys)
        if len(set(keys)) != len(lqs):
            raise UserError(f"{len(lqs)} images have {len(set(keys))} different keys: give each image its own")

        strength = config.fidelity if config.color_strength is None else config.color_strength
        results: dict[int, Rows] = {}
        for batch in equal_sizes([lq.shape for lq in lqs], batch_size):
            prepared = [self.prepared(lqs[i], scale, config, longest) for i in batch]
            names = [keys[i] for i in batch]
            y = self.restore_tensor(prepared, names, seed, repeat, config, plan, on_step=on_step, on_tile=on_tile)
            for i, image, decoded in zip(batch, prepared, y.split(1), strict=True):
                results[i] = finished(image, decoded, config.geometry, config.color_fix, strength)
        return packed(inputs, photos, [results[i] for i in range(len(lqs))], pixel_device)

    def prepared(self, lq: Tensor | Rows, scale: float, config: SamplerConfig, longest: int | None) -> Prepared:
        """The networks' input for one image (1,3,H,W)."""
        lq = lq.to(pixel_device(self.device, output_size(*lq.shape[2:], scale, longest)))
        return prepare(lq, scale, config.geometry, self.multiple, longest, config.short_side, config.margin)

    def restore_tensor(
        self,
        x: Inputs,
        keys: Sequence[str | int],
        seed: int = 0,
        repeat: int = 0,
        config: SamplerConfig | None = None,
        plan: Sequence[Step] | None = None,
        on_step: Callable | None = None,
        on_tile: OnTile | None = None,
    ) -> Tensor:
        """Prepared images (B,3,H,W) in [-1, 1], sides multiples of `multiple` -> decoded (B,3,H,W), where x is.

        Not clamped, colours not transferred. Where memory runs out the batch is split, then tiles are halved; what has
        NaN runs again in float32. Never returns NaN.
        """
        config = config or self.sampler
        plan = self.plan(config, plan)
        (height, width), place = (x.shape[2:], x.device) if isinstance(x, Tensor) else (x[0].shape, x[0].device)
        latent_size = (height // self.latents.factor, width // self.latents.factor)

        @torch.no_grad()
        def attempt(rows: slice, tiles: Tiles) -> Tensor:
            draw = seeded_draw(seed, keys[rows], repeat)
            tiles = tiles.reporting(on_tile and in_batch(on_tile, rows, len(x)), *latent_size, len(plan))
            latents = self.tiled_latents(tiles)
            return latents.decode(  # z has no name here, so that the decoder can let it go
                self.restore_latent(x[rows], draw, config=config, plan=plan, tiles=tiles, on_step=on_step)
            ).to(place)

        def restore() -> Tensor:
            tiles, together = self.tiles(config, (height, width), 1), len(x)
            while self.tiles(config, (height, width), together) != tiles:  # as alone
                together = (together + 1) // 2
            return within_memory(attempt, keys, tiles, latent_size, together)

        return finite(restore, keys, None if self.dtype == torch.float32 else self.in_float32)

    @torch.no_grad()
    def restore_latent(
        self,
        x: Inputs,
        draw: Draw,
        config: SamplerConfig,
        plan: Sequence[Step],
        tiles: Tiles,
        on_step: Callable | None = None,
    ) -> Tensor:
        """The methods themselves, from prepared images (B,3,H,W) to restored latents (B,C,h,w) for the decoder."""
        z_lq, hints = self.encode(x, draw, config, tiles)
        positive, negative = self.conditions(x, hints, config)
        denoise, first = self.guide(positive, negative, config, plan, tiles)
        z_T = start_latent(config.start, z_lq, self.schedule, draw)
        return sample(denoise, plan, z_T, self.schedule, draw, first, on_step).to(self.dtype)

    def pixels(self, x: Inputs) -> Tensor:
        """Prepared images as the networks see them, (B,3,H,W). Made anew where they are needed: see `Prepared`."""
        return (x if isinstance(x, Tensor) else network_input(x, self.dtype)).to(self.device, self.dtype)

    def encode(
        self, x: Inputs, draw: Draw, config: SamplerConfig, tiles: Tiles
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Prepared images (B,3,H,W) -> z_lq (B,C,h,w), and the hints of the (negative, positive) condition like it.

        Both hints are z_lq, but for CCSR v2 as released (a posterior sample each) and a hint encoder of its own.
        """
        two_samples = config.posterior_rows == 2 and config.posterior == "sample" and config.guidance != 1
        names = ("posterior", "posterior_positive") if two_samples else ("posterior",)
        # One pass could serve both samples, but its rounding is not that of the release's batch of two.
        latents, pixels = self.tiled_latents(tiles), self.pixels(x)
        moments = latents.moments(pixels.repeat(2, 1, 1, 1) if two_samples else pixels)
        del pixels  # large images: what is not needed any more makes room
        mean = moments[0].float()
        if config.posterior == "sample":
            noise = torch.cat([drawn(draw, name, mean[: len(x)]) for name in names])
            mean = posterior_sample(mean, moments[1].float(), noise)
        del moments
        z_lq, z_positive = (mean * latents.scale).split(len(x)) if two_samples else 2 * [mean * latents.scale]
        if self.hint_latents is self.latents:
            return z_lq, (z_lq, z_positive)
        return z_lq, 2 * (self.tiled_latents(tiles, self.hint_latents).encode(self.pixels(x)).float(),)

    def conditions(
        self, x: Inputs, hints: tuple[Tensor, Tensor], config: SamplerConfig
    ) -> tuple[Condition, Condition | None]:
        """What the networks are told about prepared images (B,3,H,W): (positive, negative; None without guidance)."""
        image = None if self.image_prompt is None else self.image_prompt.encode(self.pixels(x))
        soft = None if self.soft_prompt is None else self.soft_prompt.encode(self.pixels(x))

        def told(prompt: str, hint: Tensor) -> Condition:
            return Condition(self.prompt(prompt, hint), hint, image, strength=config.fidelity).with_soft(soft)

        positive = told(config.positive, hints[1])
        return positive, None if config.guidance == 1 else told(config.negative, hints[0])

    def guide(
        self, positive: Condition, negative: Condition | None, config: SamplerConfig, plan: Sequence[Step], tiles: Tiles
    ) -> tuple[Denoise, Denoise | None]:
        """eps(z_t, t) under guidance, and what the first step takes in its place where that is unguided."""
        denoiser = self.denoiser
        if max(tiles.diffusion):
            together = 1 if self.device.type == "cpu" else 4  # batches save time on accelerators only
            windows = (tiles.diffusion, tiles.stride, config.tile_weights, together, tiles.count)
            sharing = shared_norms if len(plan) == 1 and tiles.alike and not self.compiled else None
            denoiser = TiledDenoiser(denoiser, *windows, sharing=sharing)
        denoise, first = guided(denoiser, positive, negative, config.guidance), None
        if negative is not None and config.first_prompt != "guided" and plan[0].kind != "step":
            text = negative.text if config.first_prompt == "negative" else positive.text
            first = guided(denoiser, negative.changed(text=text))
        return denoise, first

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """The model with float32 weights inside; what 16 bits rounded stays rounded."""
        usual = self.dtype
        try:
            self.cast(torch.float32)
            yield
        finally:
            self.cast(usual)

    def cast(self, dtype: torch.dtype) -> None:
        """Bring all weights to a type, and what the networks are given."""
        self.dtype = dtype
        for network in self.networks():
            network.to(dtype)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents (B,C,h,w) -> images (B,3,H,W), about [-1, 1], float32 on the CPU."""
        height, width = z.shape[2:]

        def attempt(rows: slice, tiles: Tiles) -> Tensor:
            return self.tiled_latents(tiles).decode(z[rows].to(self.device, self.dtype)).float().cpu()

        tiles = self.tiles(self.sampler, (height * self.latents.factor, width * self.latents.factor), len(z))
        return within_memory(attempt, len(z) * ["latents"], tiles, (height, width), len(z))

    def step_picture(self, z: Tensor, lq: Tensor | Rows, scale: float, longest: int | None = None) -> Tensor:
        """What latents (1,C,h,w) of `lq` (1,3,H,W) show: (1,3,H',W') in [-1, 1], the result's size, its own colours."""
        image = self.prepared(lq, scale, self.sampler, longest)
        return finish(image, self.decode(z), self.sampler.geometry, "none")

    def tiled_latents(self, tiles: Tiles, latents: Latents | None = None) -> Latents:
        """An autoencoder (the model's own by default), in tiles where there are any."""
        latents = latents or self.latents
        return TiledLatents(latents, tiles.vae, tiles.vae_tiling, tiles.count) if tiles.vae else latents

    def tiles(self, config: SamplerConfig, size: tuple[int, int], count: int) -> Tiles:
        """Tile sizes for `count` prepared images of `size` (H, W)."""
        return tiles_for(config, self.denoiser, self.latents, size, count, self.device, fixed=self.compiled)

    def prompt(self, prompt: str, x: Tensor) -> Tensor:
        """Embeddings (B,L,D) of a prompt, for a batch of images."""
        if prompt not in self.prompts:
            known = ", ".join(f"'{known}'" for known in self.prompts)
            raise UserError(
                f"prompt '{prompt}' was not encoded at loading, only {known}: use one of these, or pass it to "
                "Restorer.load (a converted model with a text encoder of its own keeps no others)"
            )
        return to_device(self.prompts[prompt], x.device).to(self.dtype).expand(len(x), -1, -1)

    def plan(self, config: SamplerConfig, plan: Sequence | None, settings: dict[str, Any] | None = None) -> list[Step]:
        """The plan given, else the configuration's, checked."""
        if plan is None:
            changed_here = set(settings or {})
            stale = sorted(RULES & changed_here)
            if config.timesteps and ("timesteps" in changed_here or not stale):
                plan = config.timesteps
            elif config.plan == "nuts":
                raise UserError(f"{' '.join(stale) or 'NUTS'}: pass plan=ccsr.timesteps.nuts_plan(T, t_max, t_min)")
        return check_plan(ddpm_plan(config.steps, len(self.schedule)) if plan is None else plan, len(self.schedule))

    def compile(self, one_size: bool = False) -> None:
        """torch.compile the networks: slow at the first image, faster after; results differ by rounding.

        one_size: all images will have the same size, for which the code is then made.
        """
        networks = {id(network): network for network in (self.denoiser, self.latents, self.hint_latents)}
        self.denoiser.coefficients(torch.zeros(1, dtype=torch.int64, device=self.device))  # made once, before the code
        compile_all(networks.values(), one_size)
        self.compiled = True

    def networks(self) -> list[nn.Module]:
        """All networks, each once."""
        every = [self.latents, self.denoiser, self.image_prompt, self.hint_latents]
        return list({id(network): network for network in every if network is not None}.values())
