"""What a stage is: ordered phases (parameters and loss) over batches whose every random number is a sample's own."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from consissr.config.data import DataConfig
from consissr.config.optimizer import OptimizerConfig
from consissr.data.datasets import PhotoDataset
from consissr.errors import UserError
from consissr.images.device import to_device


def seed_of(*values: object) -> int:
    """A 63-bit seed that depends on all `values` and on nothing else (stable over runs and machines)."""
    digest = hashlib.blake2b("\0".join(map(str, values)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


EXPORT = {"fp32": torch.float32, "fp16": torch.float16}
"""Storage types of exported weights by their config word."""


def held_out(data: DataConfig, seed: int) -> PhotoDataset:
    """Crops of `data.validation` with own partners or ones to be made; upright, so that figures mean the same."""
    partners = [data.validation_lq] if data.validation_lq else []
    fixed = replace(data, paths=[data.validation], probabilities=[], lq_paths=partners, flips="none")
    return PhotoDataset(fixed, seed)


def check_crop(crop: int, factor: int) -> None:
    """UserError unless crops of `crop` pixels are whole latents of an autoencoder that divides sides by `factor`."""
    if crop % factor:
        nearest = max(1, round(crop / factor)) * factor
        raise UserError(f"data.crop is {crop}: the autoencoder needs a multiple of {factor}, such as {nearest}")


@dataclass
class Batch:
    """Training images of one forward pass. Draws come from each sample's own generator, seeded by (seed, place)."""

    hq: Tensor
    """(B, 3, S, S) in [-1, 1]."""
    names: list[str]
    """File of each image."""
    generators: list[torch.Generator]
    """One CPU generator per image."""
    lq: Tensor | None = None
    """(B, 3, S, S) in [-1, 1]: degraded and brought back to full size; None where the stage needs none."""
    cache: dict[str, Tensor] = field(default_factory=dict)
    """What `Stage.prepare` computed once for all phases."""

    def randn(self, *shape: int) -> Tensor:
        """Standard normal (B, *shape) on the images' device."""
        drawn = torch.stack([torch.randn(shape, generator=g) for g in self.generators])
        return to_device(drawn, self.hq.device)

    def rand(self) -> Tensor:
        """Uniform [0, 1), shape (B,)."""
        return to_device(torch.cat([torch.rand(1, generator=g) for g in self.generators]), self.hq.device)

    def randint(self, high: int) -> Tensor:
        """Uniform integers in [0, high), shape (B,)."""
        return to_device(torch.cat([torch.randint(high, (1,), generator=g) for g in self.generators]), self.hq.device)


@dataclass
class Phase:
    """One player of a stage: its trainable parameters by name, its loss, its optimiser's settings."""

    name: str
    parameters: dict[str, nn.Parameter]
    loss: Callable[[Batch, int], dict[str, Tensor]]
    """(batch, optimiser step) -> values to log, and under "loss" the scalar that is differentiated."""
    optimizer: OptimizerConfig


class Stage:
    """What the loop asks of a stage. Its constructor sets `phases`, `networks` and `compile_modules`."""

    needs_lq = True
    """Whether its batches have low-quality partners."""
    phases: list[Phase]
    networks: nn.Module
    """Everything on the device, trained and frozen."""
    compile_modules: list[nn.Module]
    """The networks that most time goes to, which `compile` compiles."""

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Tensors beside parameters that training changes (spectral norm vectors); saved in checkpoints."""
        return {}

    def prepare(self, batch: Batch) -> None:
        """Fill `batch.cache` with what all phases share; runs without gradients."""

    def restore(self, batch: Batch) -> Tensor | None:
        """What the stage makes of a validation batch, (B, 3, S, S) in [-1, 1], or None if it makes no image."""
        return None

    def export(self, folder: Path) -> None:
        """Write the result in the form that the next stage and scripts/infer.py read."""
        raise NotImplementedError


def trained_ids(stage: Stage) -> set[int]:
    """The ids of the parameters that any phase trains."""
    return {id(p) for phase in stage.phases for p in phase.parameters.values()}
