"""scripts/infer.py through its front door. A stand-in for the model shows what the script does with files and flags."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.config.sampler import SamplerConfig
from consissr.diffusion.sampler import seeded_draw
from consissr.images import formats
from consissr.images.resize import resize
from consissr.images.rows import rows_of


class Enlarger:
    """Bicubic plus the noise that a model would draw; `spoil` maps a key to what goes wrong with that image."""

    def __init__(self, spoil: dict[str, str] | None = None) -> None:
        self.sampler = SamplerConfig()
        self.device, self.precision = torch.device("cpu"), "fp32"
        self.spoil = spoil or {}
        self.calls = []

    def __call__(self, photos, *, scale, longest, seed, keys, repeat, plan, batch_size, on_step, on_tile=None):
        x = torch.cat([rows_of(photo.image, 0, photo.image.shape[2]) for photo in photos])
        self.calls.append(SimpleNamespace(shape=tuple(x.shape), keys=keys, plan=plan, repeat=repeat))
        troubles = {self.spoil[key] for key in keys if key in self.spoil}
        if "memory" in troubles:
            raise torch.OutOfMemoryError("out of memory")
        if "bug" in troubles:
            raise RuntimeError("shapes do not fit")
        y = resize(x, formats.output_size(*x.shape[-2:], scale, longest))
        y = (y + 0.1 * seeded_draw(seed, keys, repeat)("init", y.shape)).clamp(-1, 1)
        if "nan" in troubles:
            y[0, 0, 0, 0] = float("nan")
        if on_step:
            on_step(0, SimpleNamespace(t=999), None, y)
        return [photo.restored(pixels) for photo, pixels in zip(photos, y, strict=True)]

    def step_picture(self, z, lq, scale, longest):
        return z


@pytest.fixture
def model():
    return Enlarger()


@pytest.fixture
def infer(script, model, monkeypatch, capsys):
    """infer(*arguments) -> (exit status, standard output, standard error)."""
    module = script("infer")
    loads = []
    monkeypatch.setattr(module, "load", lambda args, local_rank, one_size: loads.append(args) or model)

    def run(*arguments):
        status = module.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    run.loads = loads
    return run


@pytest.fixture
def folder(tmp_path, rng):
    """A folder as users have them: photographs, a sub-folder, hidden and other files."""
    base = tmp_path / "in"
    (base / "sub").mkdir(parents=True)
    for name, size in (("a.png", (12, 9)), ("b.jpg", (12, 9)), ("c.webp", (7, 11)), ("sub/d.png", (12, 9))):
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(base / name)
    (base / "notes.txt").write_text("not an image")
    (base / ".hidden.png").write_text("not an image")
    return base


@pytest.fixture
def files():
    """files(folder) -> the paths of all files in it, relative to it."""

    def found(path) -> set[str]:
        return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}

    return found
