"""scripts/infer.py with a real model (small, random weights): the whole path, and what a run may not depend on."""

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.errors import UserError
from consissr.inference import processes
from consissr.models.vae.latents import Latents

SIZES = {"a.png": (20, 28), "b.png": (20, 28), "c.png": (1, 1), "d.png": (13, 40)}


@pytest.fixture
def folder(tmp_path, rng):
    (tmp_path / "in").mkdir()
    for name, size in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(tmp_path / "in" / name)
    return tmp_path / "in"


@pytest.fixture
def infer(script, tiny_model, folder, tmp_path):
    """infer(name, *flags) restores the folder into tmp_path/name and gives {file name: samples}."""
    main = script("infer").main

    def run(name, *flags, source=folder, status=0):
        arguments = ["-i", source, "-o", tmp_path / name, "-m", tiny_model, "--device", "cpu", "--scale", "2", *flags]
        assert main([str(argument) for argument in arguments]) == status
        paths = [path for path in (tmp_path / name).rglob("*.png")]
        return {path.relative_to(tmp_path / name).as_posix(): np.asarray(Image.open(path)) for path in paths}

    return run


def test_sizes_and_repeatability(infer, tmp_path):
    first, again = infer("1"), infer("2")
    assert {name: image.shape[:2] for name, image in first.items()} == {
        name: (2 * height, 2 * width) for name, (height, width) in SIZES.items()
    }
    for name in first:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
        assert (first[name] == again[name]).all()
    other = infer("3", "--seed", "1")
    assert (other["a.png"] != first["a.png"]).any()
    assert (first["a.png"] != first["b.png"]).any()


def test_batches_and_processes_change_rounding_only(infer, monkeypatch):
    alone = infer("1")
    batched = infer("2", "--batch-size", "3")
    shared = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        shared = infer("3")
    assert alone.keys() == batched.keys() == shared.keys()
    for name, image in alone.items():
        assert (image == shared[name]).all()
        close = np.abs(image.astype(int) - batched[name]) <= 1
        assert close.mean() >= 0.999


def test_numbers_of_processes_that_are_none(monkeypatch):
    """A shell that exports RANK= is one process; RANK=x is told in one line."""
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert processes.numbers() == (0, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")  # else every second image alone would be restored, without a word
    with pytest.raises(UserError, match="WORLD_SIZE=2 is in the environment without RANK: unset it, or use torchrun"):
        processes.numbers()
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="RANK=x .* are not whole numbers: unset them, or use torchrun"):
        processes.numbers()


def test_flags_reach_the_model(infer, folder):
    source = folder / "a.png"
    base = infer("base", source=source)["a.png"]
    changes = {
        "steps": ["--steps", "1"],
        "ddpm": ["--plan", "ddpm", "--steps", "3"],
        "t_max": ["--t-max", "0.9"],
        "start": ["--start", "noise"],
        "color": ["--color-fix", "none"],
        "wavelet": ["--color-fix", "wavelet"],
    }
    for name, flags in changes.items():
        assert (infer(name, *flags, source=source)["a.png"] != base).any(), name


def test_a_file_leaves_the_rest_to_the_model(infer, folder, tmp_path):
    """The model's plan is explicit: a file without one keeps it, a file with a part of one goes before it."""
    source, file = folder / "a.png", tmp_path / "sampler.yaml"
    base = infer("base", source=source)["a.png"]
    file.write_text("color_fix: adain\n")
    assert (infer("same", "--config", file, source=source)["a.png"] == base).all()
    file.write_text("t_min: 0.3333333\n")
    longer = infer("longer", "--config", file, source=source)["a.png"]
    assert (longer == infer("flag", "--t-min", "0.3333333", source=source)["a.png"]).all() and (longer != base).any()


def test_settings_that_cannot_be_are_told_once(infer, capsys):
    """Not for each image: tiles of a part of a latent pixel, or that overlap as a whole; guidance that is no number."""
    for flags, words in (
        (["--tile", "1"], "tile 1 is smaller than one latent pixel"),
        (["--vae-tile", "1"], "vae_tile 1 is smaller"),
        (["--tile", "64", "--tile-overlap", "64"], "overlap 64 must be smaller"),
        (["--guidance", "nan"], "guidance is nan"),
    ):
        assert infer("none", *flags, status=2) == {}
        assert (error := capsys.readouterr().err).startswith("error: ") and words in error and error.count("\n") == 1


def test_save_steps(infer, folder, tmp_path):
    """A shorter plan leaves none of the longer one's, whose curves would mix; what is the user's stays."""
    files = infer("out", "--save-steps", source=folder / "a.png")
    assert files.keys() == {"a.png", "a.png_steps/00_t999.png", "a.png_steps/01_t666.png"}
    assert all(image.shape == (40, 56, 3) for image in files.values())
    Image.new("L", (3, 3)).save(tmp_path / "out" / "a.png_steps" / "mine.png")
    files = infer("out", "--save-steps", "--overwrite", "--steps", "1", source=folder / "a.png")
    assert files.keys() == {"a.png", "a.png_steps/00_t999.png", "a.png_steps/mine.png"}


@pytest.mark.parametrize("trouble", ["memory", "nan"])
def test_steps_cost_no_recovery(infer, folder, monkeypatch, trouble):
    """What would be restored in smaller tiles, or in float32, is restored with --save-steps, too, and its steps are."""
    decode = Latents.decode

    def decoded(self, z):
        if trouble == "memory" and max(z.shape[2:]) > 16:
            raise torch.OutOfMemoryError("out of memory")
        y = decode(self, z)
        return y * float("nan") if trouble == "nan" and y.dtype != torch.float32 else y

    monkeypatch.setattr(Latents, "decode", decoded)
    flags = ["--steps", "1", *(["--scale", "3"] if trouble == "memory" else ["--precision", "bf16"])]
    usual = infer("usual", *flags, source=folder / "a.png")
    files = infer("steps", "--save-steps", *flags, source=folder / "a.png")
    assert files.keys() == {"a.png", "a.png_steps/00_t999.png"} and (files["a.png"] == usual["a.png"]).all()


def test_a_model_that_does_not_fit_is_one_line(infer, monkeypatch, capsys):
    """Another process holds the GPU's memory."""

    def full(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("consissr.Restorer.load", full)
    assert infer("none", status=2) == {}
    error = capsys.readouterr().err
    assert "does not fit into the free memory of --device cpu: free some" in error and error.count("\n") == 1


def test_unknown_model(script, folder, tmp_path, capsys):
    main = script("infer").main
    assert main(["-i", str(folder), "-o", str(tmp_path / "out"), "-m", "nano-csr", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "nano-ccsr" in error and error.count("\n") == 1
