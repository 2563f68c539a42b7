"""Restoring and training on a GPU that need not be there: shapes, types and devices of every operation, no values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ccsr.adversary
import consissr.data.draws
import consissr.data.jpeg
import consissr.data.noise
import consissr.images.moments
import consissr.models.tiles
import consissr.nano.clip
import consissr.nano.prior
from ccsr import nuts_plan
from ccsr.methods import method, stages
from consissr.bench import launches
from consissr.bench.fake_gpu import fake_gpu, mixed
from consissr.config.loading import changed
from consissr.config.training import TrainConfig
from consissr.data.degradation import degrade, preset
from consissr.diffusion.plans import ddpm_plan
from consissr.diffusion.sampler import seeded_draw
from consissr.diffusion.schedule import Schedule
from consissr.models.denoiser import Denoiser
from consissr.models.residual import ResidualDenoiser
from consissr.nano.config import run_config
from consissr.restorer import Restorer
from consissr.training import dry_run, estimate
from consissr.training.engine import Average
from consissr.training.feed import Feed
from consissr.training.optimisers import build_optimizer
from consissr.training.precision import Frozen
from consissr.training.stage import Batch
from consissr.weights.precision import choose_precision
from scripts.train import stage_builder
from tests.training.tiny import SMALL

SIDE = 64
FEATURES = ["model.image_prompt=hpa", "model.image_tokens=patches", "model.transposed_attention=true"]
FEATURES += ["model.position_embedding=16", "model.hint=stack", "sampler.plan=ddpm", "sampler.timesteps=[]"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """A mode in which tensors may be on "cuda", and have no values. What checks its values is built before."""
    monkeypatch.setattr(ccsr.adversary, "draw_windows", lambda *_: [None, (1, 2)])
    small = consissr.nano.clip.F.interpolate
    monkeypatch.setattr(consissr.nano.clip, "random_windows", lambda batch, _, size: small(batch.hq, (size, size)))
    monkeypatch.setattr(consissr.nano.clip, "caption", lambda image: f"bright {image.device.type} photo")
    monkeypatch.setattr(consissr.nano.prior, "captions", lambda batch, _: ["bright photo"] * len(batch.names))
    monkeypatch.setattr(torch, "lazy", torch.cpu, raising=False)  # where checkpointing asks for a device's generator
    with fake_gpu() as mode:
        yield mode


def configuration(stage: str, tiny_model: Path, *more: str) -> TrainConfig:
    """Of a tiny run of a stage on the base of `tiny_model`."""
    path = Path(f"configs/nano/{stage}.yaml")
    path = path if path.is_file() else Path("configs/nano/nuts.yaml")
    inputs = [f"model.base={tiny_model.parent}/base", "nuts.metric=latents", f"data.crop={SIDE}"]
    inputs += {"autoencoder": [], "clip": [], "prior": [], "deft": [f"init={tiny_model}"]}.get(stage, ["init="])
    return run_config(path, [*SMALL[stage], *inputs, *more])


RELEASED = {"guidance": 2.0, "first_prompt": "negative", "posterior": "sample", "posterior_rows": 2}
RESTORING = [
    ("fp32", [], nuts_plan(6, 2 / 3, 0.5), {"start": "lq", "vae_tile": 32, "vae_tiling": "sampled"}),
    ("fp16", [], nuts_plan(6, 2 / 3, 0.5), RELEASED | {"vae_tile": 16, "vae_tiling": "as_released"}),
    ("bf16", FEATURES, ddpm_plan(2, 1000), {"guidance": 2.0, "start": "noise", "tile": 48, "vae_tile": 32}),
]


class AsOnApple(TorchDispatchMode):
    """What a Mac's GPU refuses is refused here: float64, on a device that has no values either."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: Any = None) -> Any:
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and tensor.device.type == "meta" and tensor.dtype == torch.float64:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype ({function})")
        return out


def test_restoring_on_a_mac(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, which `auto` chooses there, in every kind of tiles."""
    assert choose_precision("auto", "mps") == "fp32"
    monkeypatch.setattr(consissr.images.moments, "WITHOUT_FLOAT64", ("meta",))
    model = dry_run.untrained_model(configuration("nuts", tiny_model, *FEATURES))
    denoiser = Denoiser(model.unet, model.controlnet, model.alpha_bar, "v_prediction")
    prompts = {"": torch.zeros(model.prompts[""].shape)}
    with AsOnApple():
        schedule = Schedule(model.alpha_bar)
        restorer = Restorer(model.latents, denoiser, schedule, prompts, model.image_prompt, device="meta")
        sampler = changed(
            restorer.sampler, {"positive": "", "negative": "", "guidance": 2.0, "tile": 48, "vae_tile": 32}
        )
        tiles, x = restorer.tiles(sampler, (SIDE, SIDE), 1), torch.zeros(1, 3, SIDE, SIDE)
        z = restorer.restore_latent(x, seeded_draw(0, [0]), sampler, nuts_plan(1), tiles)
        for tiling in ("exact", "sampled"):
            latents = restorer.tiled_latents(replace(tiles, vae_tiling=tiling))
            z, y = latents.encode(x.to("meta")), latents.decode(z)
            assert z.device.type == y.device.type == "meta" and y.shape == x.shape
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(1, device="meta").double()


@pytest.mark.parametrize(("precision", "features", "plan", "settings"), RESTORING)
def test_restoring(
    gpu: FakeTensorMode, tiny_model: Path, precision: str, features: list[str], plan: list, settings: dict[str, Any]
) -> None:
    """From the prepared image to the decoded one."""
    config = configuration("nuts", tiny_model, *features)
    model = dry_run.untrained_model(config)
    denoiser = ResidualDenoiser(model.unet, model.controlnet, model.alpha_bar, "v_prediction", residual=0.5)
    prompts, place = {"": torch.zeros(model.prompts[""].shape)}, {"device": "cuda", "precision": precision}
    schedule, seen = Schedule(model.alpha_bar), []
    with gpu:
        x = torch.zeros(2, 3, SIDE, SIDE)
        restorer = Restorer(model.latents, denoiser, schedule, prompts, model.image_prompt, **place)
        sampler = changed(restorer.sampler, {"positive": "", "negative": ""} | settings)
        rest = {"config": sampler, "plan": plan, "on_step": lambda i, step, eps, x0: seen.append(x0.device.type)}
        tiles = restorer.tiles(sampler, (SIDE, SIDE), 2)
        z = restorer.restore_latent(x, seeded_draw(0, [0, 1]), tiles=tiles, **rest)
        y = restorer.tiled_latents(tiles).decode(z).float().cpu()
    assert (y.shape, y.device.type, y.dtype) == (x.shape, "cpu", torch.float32)
    assert set(seen) == {"cuda"} and {p.device.type for n in restorer.networks() for p in n.parameters()} == {"cuda"}


MORE = ["tala.metric=latents", "tala.plan_share=0.5", "tala.weighting=v"]
STAGE_CASES = {stage: (stage, []) for stage in SMALL} | {
    "tala": ("tala", [*FEATURES, *MORE, "tala.posterior=sample", "gradient_checkpointing=true"]),
    "nuts": ("nuts", ["model.residual=0.5", "tala.probability=power", "nuts.losses=[l_diff,l_T,l_tmax]"]),
    "deft, narrow": ("deft", ["deft.decoder_width=0.5"]),
    "deft, dino": ("deft", ["deft.discriminator=dino", "deft.adaptive=true"]),
}
MOST = ("rclip", "tala", "deft, dino")  # the others share their operations


@pytest.mark.parametrize("case", [c if c in MOST else pytest.param(c, marks=pytest.mark.slow) for c in STAGE_CASES])
def test_a_training_step(gpu: FakeTensorMode, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """What the loop does with a micro-batch: losses, gradients, optimisers, averages, validation."""
    stage_name, more = STAGE_CASES[case]
    vit = ccsr.adversary.ViT
    monkeypatch.setattr(ccsr.adversary, "ViT", lambda *_, **scaled: vit(32, 8, 16, 12, 2, **scaled))
    config = configuration(stage_name, tiny_model, *more)
    stage = dry_run.build(config, stage_builder(config.stage))
    Frozen(stage.networks, {id(p) for q in stage.phases for p in q.parameters.values()}, low=True, keep=False)
    with gpu:
        put(stage, "cuda", None)
        batch = prepared(stage, "cuda")
        for phase in stage.phases:
            with mixed():
                parts = phase.loss(batch, -1)  # before the adaptive weight begins, which asks for gradients
            assert {part.device.type for part in parts.values()} == {"cuda"}
            for parameter in phase.parameters.values():
                parameter.grad = torch.empty_like(parameter)
            torch.nn.utils.clip_grad_norm_(phase.parameters.values(), 1.0)
            build_optimizer(phase).step()
        weights = {f"{phase.name}/{n}": p for phase in stage.phases for n, p in phase.parameters.items()}
        with Average(weights, 0.9).swapped(), mixed(), torch.no_grad():
            restored = stage.restore(batch)
        assert restored is None or restored.device.type == "cuda"

        put(stage, "lazy", torch.float32)  # a device that autograd takes without its driver, and without autocast
        batch = prepared(stage, "lazy")
        for phase in stage.phases:
            phase.loss(batch, 10**6)["loss"].backward()
            assert {p.grad.device.type for p in phase.parameters.values() if p.grad is not None} == {"lazy"}


def test_a_dry_run_knows_what_autograd_keeps(gpu: FakeTensorMode, tiny_model: Path) -> None:
    """Bytes of all tensors that are kept for the backward pass under autocast, beside the weights."""
    config = configuration(
        "tala", tiny_model, *FEATURES, *MORE, "micro_batch=2", "precision=bf16", "frozen_precision=auto"
    )
    stages = [dry_run.build(config, stage_builder(config.stage)) for _ in range(2)]
    estimated, stage = estimate.activations(config, stages[0]), stages[1]
    (phase,) = stage.phases
    Frozen(stage.networks, {id(p) for p in phase.parameters.values()}, low=True, keep=False)
    kept: dict[int, Tensor] = {}
    fused = estimate.OnGpu(low=False, halved=set())  # without a GPU, torch computes attention in plain steps
    with gpu, fused:
        put(stage, "cuda", None)
        batch = prepared(stage, "cuda")
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.setdefault(x.untyped_storage()._cdata, x), lambda x: x
        )
        with mixed(), keep:
            phase.loss(batch, 0)
    weights = {p.untyped_storage()._cdata for p in stage.networks.parameters()}
    assert estimated == pytest.approx(
        sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in weights), rel=0.01
    )


def put(stage: Any, device: str, dtype: torch.dtype | None) -> None:
    """The stage's networks on a device, as the loop has them."""
    dry_run.exchange(stage, lambda m: m.to(device, dtype, memory_format=torch.channels_last))


def prepared(stage: Any, device: str) -> Batch:
    """A micro-batch of two images."""
    images = [torch.zeros(2, 3, SIDE, SIDE, device=device) for _ in range(2)]
    batch = Batch(images[0], ["", ""], [torch.Generator().manual_seed(i) for i in range(2)], lq=images[1])
    with mixed() if device == "cuda" else nullcontext(), torch.no_grad():
        stage.prepare(batch)
    return batch


def test_degrading(gpu: FakeTensorMode) -> None:
    with gpu:
        for seed in range(4):
            hq = torch.zeros(1, 3, 2 * SIDE, 2 * SIDE, device="cuda")
            lq, enlarged = degrade(hq, preset("ccsr"), [seed])
            assert lq.device.type == enlarged.device.type == "cuda" and enlarged.dtype == torch.float32


@pytest.mark.parametrize("stage", ["nuts", "tala"])
def test_a_step_does_not_wait_for_the_gpu(stage: str) -> None:
    """Neither the host's numbers nor the device's keep the host; the first step alone moves what stays there."""
    file, builder = stages(Path("configs"))[stage]
    words = [*launches.TINY, "micro_batch=2", "batch=2", "init="]
    counted = launches.trained(launches.run_config(file, words), builder)
    assert sum(counted.launches.values()) > 500 and set(counted.waits) <= {"_to_copy"}
    assert sum(counted.waits.values()) <= 2  # tables of the noise schedule


def test_degrading_does_not_wait_for_the_gpu() -> None:
    counted = launches.degraded(8)
    assert not counted.waits and 50 * 8 < sum(counted.launches.values()) < 170 * 8


def test_one_image_from_pixels_to_whole_numbers() -> None:
    config = launches.run_config("configs/ccsr/nuts.yaml", [*launches.TINY, "micro_batch=2", "batch=2", "init="])
    counted = launches.restored(config, method("ccsr-1", 1))
    assert sum(counted.waits.values()) <= 1 and counted.launches["_upsample_bicubic2d_aa"] >= 2


@pytest.mark.parametrize("broken", [lambda x: x + torch.ones(2), lambda x: x[None] @ torch.ones(2, 2)])
def test_two_devices_raise(gpu: FakeTensorMode, broken: Callable[[Tensor], Tensor]) -> None:
    """What all tests here rely on."""
    with gpu, pytest.raises(RuntimeError, match="two different devices|same device"):
        broken(torch.zeros(2, device="cuda"))


def test_validation_degrades_in_float32(tiny_model: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Validation runs under autocast, which GPUs have on by default; training's degradation, in threads, does not."""
    Image.fromarray(rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    config = configuration("nuts", tiny_model, f"data.paths=[{tmp_path}]", "micro_batch=1")
    feed = Feed(config, torch.device("cpu"), 0, 1, needs_lq=True)
    usual = feed.make_batch([feed.dataset[0]]).lq
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(feed.make_batch([feed.dataset[0]]).lq, usual)
