"""`--dry-run`: every training config of the project, its counts at full size, what it says of memory and of places."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import pytest
import torch

from consissr.config.training import TrainConfig
from consissr.nano.config import run_config
from consissr.training import dry_run, estimate
from consissr.training.checks import accumulation, shared_out
from consissr.training.stage import Stage
from scripts.train import main, stage_builder
from tests.training.children import world
from tests.training.tiny import words

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if "\nstage: " in path.read_text())


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


@functools.cache
def built(path: Path) -> tuple[TrainConfig, Stage]:
    """A recipe and its stage."""
    config = run_config(path)
    return config, dry_run.build(config, stage_builder(config.stage))


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_recipe_builds_and_is_described(path: Path) -> None:
    """Networks of the right kind on the meta device, something trained, a batch that divides, places named."""
    config, stage = built(path)
    assert {p.device.type for p in stage.networks.parameters()} == {"meta"}
    trained = [p for phase in stage.phases for p in phase.parameters.values()]
    assert trained and {id(p) for p in trained} <= {id(p) for p in stage.networks.parameters()}
    assert "not a multiple" not in next(dry_run.batches(config))
    for n in (1, 2, 4, 8, 16, 32):  # as it stands, wherever each process gets an image
        assert config.batch % n or accumulation(shared_out(config, n), n) >= 1
    assert any(line.startswith("  photographs") for line in dry_run.inputs(config))


def test_memory_is_that_of_a_process(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of the micro-batch that each of the processes asked for will have."""
    told, common = [], ("--dry-run", "data.crop=512", "batch=4", "processes=2")
    for micro_batch in (2, 4):
        assert main(words("autoencoder", photos, tmp_path, *common, f"micro_batch={micro_batch}")) == 0
        told.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  activations  ")))
    assert told[0] == told[1]


def test_what_a_run_would_refuse_of_its_data_is_said(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pairs are not shrunk; a pattern's photographs are there; of several processes one prints."""
    given = words("autoencoder", photos, tmp_path, "--dry-run", f"data.paths=[{photos}/*.png]")
    assert main([*given, f"data.lq_paths=[{photos}]", "data.shrink=0.5"]) == 0
    said = capsys.readouterr().out
    assert f"{photos}/*.png: here" in said
    assert said.count("would stop here") == said.count("would stop here: LQ/HQ pairs are never resized") == 1
    monkeypatch.setenv("RANK", "1")  # whose levels of logging are put back
    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, "consissr.data"):
        assert main(given) == 0 and not capsys.readouterr().out


def test_launched_processes_count_as_those_asked_for(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun, too, the moments are shared out; other numbers of processes begin with the file's micro-batch."""
    given = words("autoencoder", photos, tmp_path, "--dry-run", "batch=96", "micro_batch=4", "engine=zero1")
    given += ["autoencoder.widths=[256,512]"]

    def told(beginning: str, *more: str) -> str:
        assert main([*given, *more]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if beginning in line)

    asked = told("moments", "processes=16")
    assert asked != told("moments")
    for name, value in world(16)[0].items():
        monkeypatch.setenv(name, value)
    assert told("moments") == asked
    assert "micro_batch 3 x 16 processes x 2" in (line := told("effective batch")) and "4 x 4 processes x 6" in line


def counts(name: str) -> dict[str, int]:
    """Trained parameters of a recipe by group."""
    _, stage = built(CONFIGS / f"{name}.yaml")
    lines = [line.rsplit(maxsplit=1) for line in dry_run.parameters(stage)]
    end = next(i for i, (label, _) in enumerate(lines) if label == "frozen")
    return {label.strip(): int(number.replace(",", "")) for label, number in lines[:end]}


def test_trained_parameters_are_those_of_the_releases() -> None:
    """Counted in the authors' optimisers: ConsisSR's stages 1 and 2, CCSR's ControlNet and decoder."""
    assert counts("consissr/rclip") == {"trained": 632_076_800, "tower": 632_076_800}
    assert counts("consissr/tala") == {
        "trained": 420_064_992, "controlnet": 365_187_168, "in the UNet": 51_726_976, "image adapter": 3_150_848,
    }  # fmt: skip
    assert counts("consissr/tala_as_released")["trained"] == 395_414_048  # no gradients in the UNet's encoder
    assert counts("ccsr/nuts")["trained"] == 363_153_600
    assert counts("ccsr/deft_as_released")["decoder"] == 49_490_179


def test_frozen_networks_are_told_by_name() -> None:
    """Which are frozen, and how large each is."""
    codes = ["autoencoder: quant_conv", "autoencoder: post_quant_conv"]
    both = ["autoencoder: encoder", "autoencoder: decoder", *codes]
    deft = ["unet", "controlnet", "autoencoder: encoder", *codes]
    for name, wanted in {
        "ccsr/nuts": ["unet", *both],
        "consissr/tala": ["unet", "controlnet", *both, "image_prompt: tower"],
        "consissr/rclip": ["teacher"],
        "ccsr/deft": [*deft, "lpips"],
        "ccsr/deft_as_released": [*deft, "adversary: summary", "adversary: discriminator"],
    }.items():
        _, stage = built(CONFIGS / f"{name}.yaml")
        labels = [line.rsplit(maxsplit=1)[0].strip() for line in dry_run.parameters(stage)]
        assert labels[labels.index("frozen") + 1 :] == wanted, name


def test_memory_counts_every_kind(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "GIB", 2**20)  # of small networks' megabytes digits are to be seen
    words = [f"model.base={tiny_model.parent / 'base'}", "model.hint=conv", "data.crop=64", "micro_batch=2", "ema=0.9"]

    def described(*more: str) -> dict[str, str]:
        config = run_config(None, ["stage=nuts", *words, *more])
        lines = estimate.memory(config, dry_run.build(config, stage_builder("nuts")))
        return {line[:44].strip(): line[44:].strip() for line in lines}

    found = described()
    assert {"gradients, float32", "moments of the optimiser", "averaged weights (EMA), float32"} <= found.keys()
    assert "averaged weights (EMA), float32" not in described("ema=0")
    assert "frozen weights" in described("precision=fp32")
    weights, moments = (
        float(found[name].split()[0]) for name in ("trained weights, float32", "moments of the optimiser")
    )
    assert moments == pytest.approx(2 * weights, rel=0.1), "AdamW's two, in float32"


def test_activations_are_what_autograd_keeps(tiny_model: Path) -> None:
    """Proportional to the images, and less with checkpointing."""
    base = ["stage=nuts", f"model.base={tiny_model.parent / 'base'}", "model.hint=conv", "data.crop=64"]

    def saved(*more: str) -> int:
        config = run_config(None, [*base, *more])
        return estimate.activations(config, dry_run.build(config, stage_builder("nuts")))

    one, two = saved("micro_batch=1"), saved("micro_batch=2")
    assert two == pytest.approx(2 * one, rel=0.02)
    assert saved("micro_batch=2", "gradient_checkpointing=true") < 0.9 * two


def test_attention_is_counted_without_its_matrix() -> None:
    q = torch.empty(2, 3, 500, 8, device="meta", requires_grad=True)
    kept = []
    with estimate.OnGpu(low=False, halved=set()), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert sum(t.numel() for t in kept) == 4 * q.numel()


def test_the_front_door(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, root: Path) -> None:
    """The flag prints the report, runs nothing and ends well, whatever is missing for the run itself."""
    words = [f"model.base={tiny_model.parent / 'base'}", f"output_dir={tmp_path / 'run'}", "data.crop=64", "batch=6"]
    config = str(root / "configs/ccsr/deft_as_released.yaml")
    assert main(["--config", config, "--dry-run", *words, "micro_batch=2", "deft.dino=none.pth"]) == 0
    said = capsys.readouterr().out
    for text in (
        "effective batch 6 = micro_batch 2 x 1 process x 3 accumulated",
        "under autocast to bf16",
        "init",
        "base here",
    ):
        assert text in said
    assert f"{'DINO':18s} none.pth: missing" in said and "DINOv2" in said
    assert "the run itself would stop here: " in said
    assert not (tmp_path / "run").exists()


def test_all_that_is_missing_is_said(tiny_model: Path, capsys: pytest.CaptureFixture, root: Path) -> None:
    """Not the first mistake alone; and what a missing `init` would bring is not called a download."""
    words = [f"model.base={tiny_model.parent / 'base'}", "data.crop=64", "init=runs/gone/rclip", "optimizer.clip=-1"]
    assert main(["--config", str(root / "configs/consissr/tala.yaml"), "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    stops = [line.partition(": ")[2] for line in said.splitlines() if line.startswith("the run itself would stop here")]
    assert [stop.split()[0] for stop in stops] == ["optimizer.clip", "no", "init:"]
    assert "runs/gone/rclip: missing" in said and "open_clip" not in said
