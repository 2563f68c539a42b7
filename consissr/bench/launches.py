"""How many operations a GPU is given, and how often the host waits for it, counted on tensors without values.

Fake tensors say that they are on a GPU; an operation that is no view and no allocation is a launch (a fused or a split
kernel counts as torch names it), attention one. The host waits where a value is asked for, and where a copy
between CPU and GPU was not asked to let it go on.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from consissr.bench.fake_gpu import fake_gpu, mixed
from consissr.bench.gpu_training import TINY
from consissr.bench.models import SamplingMethod
from consissr.config.sampler import SamplerConfig
from consissr.config.training import TrainConfig
from consissr.data.degradation import degrade, preset
from consissr.diffusion.schedule import Schedule
from consissr.images import codec
from consissr.models.fast import for_inference
from consissr.nano.config import run_config
from consissr.restorer import Restorer
from consissr.training import dry_run
from consissr.training.estimate import Attention
from consissr.training.precision import Frozen
from consissr.training.stage import Batch

DRAWN = 16
"""Images that are degraded, for a mean."""
FREE = {"alias", "detach", "lift_fresh", "_unsafe_view", "device", "empty", "empty_like", "new_empty", "empty_strided",
        "new_empty_strided", "_pin_memory", "is_pinned", "_local_scalar_dense"}  # fmt: skip
ASKS = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}
"""What needs a value, or as many elements as values say."""
GPUS = {"cuda", "lazy"}


class Launches(TorchDispatchMode):
    """Counts inside its context, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.attention = FusedAttention(self.launches)

    def __enter__(self) -> Launches:
        self.attention.__enter__()
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self.attention.__exit__(*failure)

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result, name = operation(*args, **(kwargs or {})), operation.overloadpacket.__name__
        places = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
        if not places & GPUS:
            return result
        if not operation.is_view and name not in FREE:
            self.launches[name] += 1
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        by_mask = name in ("index", "index_put_") and any(x.dtype == torch.bool for x in given)
        if name in ASKS or by_mask or (name in ("_to_copy", "copy_") and "cpu" in places and not patient(args, kwargs)):
            self.waits[name] += 1
        return result


def patient(args: tuple, kwargs: dict | None) -> bool:
    """Whether a copy lets the host go on (`copy_` has that as its third argument)."""
    return bool((kwargs or {}).get("non_blocking") or args[2:3] == (True,))


class FusedAttention(TorchFunctionMode):
    """Attention as GPUs compute it: one launch."""

    def __init__(self, launches: Counter[str]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.launches["attention"] += 1
            return Attention.apply(*args[:3])
        return function(*args, **(kwargs or {}))


def rows(size: str, method: SamplingMethod, stages: dict[str, tuple[str, Any]]) -> list[dict[str, Any]]:
    """Launches and waits of one image by `method`, of a training step per stage, and of degrading an image.

    size: 'sd21', or 'tiny' for the bundled models' (the same blocks, fewer of them).
    """
    words = ["micro_batch=2", "batch=2", "init=", *(TINY if size == "tiny" else [])]
    table = [row("one image, decoded and rounded", restored(run_config(stages["nuts"][0], words), method))]
    for name in ("tala", "nuts"):
        config, builder = stages[name]
        table.append(row(f"a {name} micro-batch of 2, forward", trained(run_config(config, words), builder)))
    table.append(row("degrading an image", degraded(DRAWN), DRAWN))
    return table


def row(what: str, counted: Launches, times: int = 1) -> dict[str, Any]:
    """A row of the table."""
    names = ", ".join(f"{count // times} {name}" for name, count in counted.launches.most_common(6))
    waits = sum(counted.waits.values()) / times
    return {"what": what, "launches": sum(counted.launches.values()) / times, "waits": waits, "most often": names}


def restored(config: TrainConfig, method: SamplingMethod) -> Launches:
    """From the low-quality image on the device to whole numbers on their way back.

    Without the question whether the result is a number, which has no answer here and waits once for each batch.
    """
    model = dry_run.untrained_model(config)
    networks, schedule = [model.latents, model.denoiser()], Schedule(model.alpha_bar)
    prompts, side = {"": torch.zeros(model.prompts[""].shape)}, config.data.crop
    asked = mock.patch("consissr.restorer.finite", lambda restore, names, float32: restore())
    with fake_gpu() as gpu, asked, gpu:
        for network in networks:
            for_inference(network, "cuda")
        place = {"device": "cuda", "precision": "bf16", "sampler": SamplerConfig()}
        restorer = Restorer(*networks, schedule, prompts, **place)
        with mock.patch("consissr.models.memory.total_memory", lambda device: 2**34), Launches() as counted:
            y = restorer(torch.zeros(1, 3, side // 4, side // 4, device="cuda"), plan=method.plan)
            codec.levels(y[0].clamp(-1, 1).add_(1).div_(2), 8).to("cpu", non_blocking=True)
    return counted


def trained(config: TrainConfig, builder: Any) -> Launches:
    """What the stage computes of a micro-batch, without gradients' way back."""
    stage = dry_run.build(config, builder)
    trained = {id(p) for phase in stage.phases for p in phase.parameters.values()}
    Frozen(stage.networks, trained, low=True, keep=False)
    side, count = config.data.crop, config.micro_batch
    with fake_gpu() as gpu, gpu:
        dry_run.exchange(stage, lambda m: m.to("cuda", memory_format=torch.channels_last))
        stage.text = torch.zeros(stage.text.shape, device="cuda")  # there after the first step
        hq, lq = (torch.zeros(count, 3, side, side, device="cuda") for _ in range(2))
        hq, lq = (x.contiguous(memory_format=torch.channels_last) for x in (hq, lq))
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        batch = Batch(hq, [""] * count, generators, lq=lq)
        with Launches() as counted, mixed():
            with torch.no_grad():
                stage.prepare(batch)
            for phase in stage.phases:
                phase.loss(batch, 0)
    return counted


def degraded(count: int) -> Launches:
    """`count` images, which draw different operations."""
    with fake_gpu() as gpu, gpu:
        for counted in (Launches(), Launches()):  # the first time tables are made
            with counted:
                for first in range(0, count, 4):
                    degrade(torch.zeros(4, 3, 512, 512, device="cuda"), preset("ccsr"), range(first, first + 4))
    return counted
