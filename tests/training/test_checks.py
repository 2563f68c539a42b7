"""Runs that cannot be are refused in one line, before torch is imported."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest

from consissr.errors import UserError
from consissr.nano.config import run_config
from consissr.training.checks import accumulation, check_models, check_run, depends_on_micro_batch, shared_out
from consissr.training.failures import memory_remedy
from scripts.train import main, stage_builder
from tests.training.children import world
from tests.training.tiny import beside, words


def refuse(photos: Path, tmp_path: Path, *changes: str) -> str:
    """What is said of a run of stage 'nuts' with `changes`."""
    config = run_config(None, ["batch=8", f"data.paths=[{photos}]", f"output_dir={tmp_path}", *changes])
    with pytest.raises(UserError) as caught:
        check_run(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.paths=[gone]", "data.paths: gone does not exist"),
        ("data.paths=[]", "no training images"),
        ("data.lq_paths=[gone]", "data.lq_paths: gone does not exist"),
        ("data.validation=gone", "data.validation: gone does not exist"),
        ("init=runs/gone/nuts", "init: runs/gone/nuts does not exist"),
        ("model.base=./gone", "/gone does not exist"),
        ("batch=9", "batch 9 is not a multiple of micro_batch 4 x 1 process(es): use batch=8"),
        ("processes=2", "1 process(es) run but processes=2 was asked for"),
        ("steps=0", "must be at least 1"),
        ("checkpoint_limit=0", "at least 1 checkpoint must be kept"),
        ("data.degradation=csr", "did you mean 'ccsr'"),
        ("optimizer.clip=-1", "optimizer.clip is -1.0: use a largest gradient norm, or 0"),
        ("deft.optimizer.clip=nan", "deft.optimizer.clip is nan"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay is -1.0: use 0 or more"),
        ("optimizer.warmup=-5", "optimizer.warmup is -5: use a number of steps, or 0"),
        ("deft.optimizer.final=2", "deft.optimizer.final is 2.0: use a share of lr"),
        ("deft.perceptual_weight=-1", "deft.perceptual_weight is -1.0: use 0 or more"),
        ("deft.adversarial_weight=nan", "deft.adversarial_weight is nan: use 0 or more"),
        ("optimizer.lr=0", "optimizer.lr is 0.0: use a number above 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]: use two numbers from 0 to below 1"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas is [0.9, 1.0]"),
        ("ema=1", "ema is 1.0: use a decay below 1, or 0"),
        ("data.validation_count=0", "data.validation_count is 0: use at least 1 image"),
        ("seed=-1", "seed is -1: use a whole number from 0 up"),
        ("data.crop=0", "data.crop is 0: use a side in pixels"),
        ("workers=-1", "workers is -1: use a number of threads, or 0"),
        ("validate_every=-1", "validate_every is -1: use a number of steps, or 0 for never"),
        ("data.pair_pool=-4", "data.pair_pool is -4: use a number of pairs, or 0"),
        ("rclip.patch_weight=-1", "rclip.patch_weight is -1.0: use 0 or more"),
    ],
)
def test_what_cannot_be_is_named(photos: Path, tmp_path: Path, change: str, message: str) -> None:
    assert message in refuse(photos, tmp_path, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["micro_batch=0", "data.pair_pool=8"], "micro_batch is 0: use at least 1"),
        (["deft.discriminator_width=6"], "deft.discriminator_width is 6: use a multiple of 4"),
        (["deft.discriminator_width=0"], "deft.discriminator_width is 0: use a multiple of 4"),
    ],
)
def test_configs_that_cannot_be(change: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_config(None, change)


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted in a file, `~` reaches us as it is; within a name it means nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["output_dir", "init", "model.base", "model.image_encoder", "prior.text"]
    names += ["deft.weights", "deft.dino", "deft.dino_v2"]
    config = run_config(None, ["stage=prior", *(f"{name}='~/a~b'" for name in names)])
    assert [attrgetter(name)(config) for name in names] == [f"{tmp_path}/a~b"] * len(names)
    assert run_config(None, ["model.base=me/base~1"]).model.base == "me/base~1"


@pytest.mark.parametrize("stage", ["autoencoder", "prior", "nuts"])
def test_crops_are_whole_latents(runs: Path, photos: Path, tmp_path: Path, stage: str) -> None:
    beside(runs, tmp_path, stage)
    _, path, *overrides = words(stage, photos, tmp_path, "data.crop=62", "data.degradation=ccsr")
    with pytest.raises(UserError, match="data.crop is 62: the autoencoder needs a multiple of 4, such as 64"):
        config = run_config(path, overrides)
        stage_builder(config.stage)(config)


def test_processes_share_the_batch(photos: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    """A file that is written for one process runs on two as it is, and says so; nothing else is changed."""
    config = run_config(None, ["stage=nuts", f"data.paths=[{photos}]", "batch=8", "micro_batch=8", "data.crop=64"])
    assert [shared_out(config, n).micro_batch for n in (1, 2, 4, 8, 16, 3)] == [8, 4, 2, 1, 8, 8]
    wide = replace(config, batch=96, micro_batch=4)
    assert [shared_out(wide, n).micro_batch for n in (1, 8, 16, 24, 32)] == [4, 4, 3, 4, 3]
    pool = replace(wide.data, pair_pool=64)  # a multiple of micro_batch: not of 3
    assert [shared_out(replace(wide, data=pool), n).micro_batch for n in (1, 8, 16)] == [4, 4, 2]
    assert replace(shared_out(config, 2), micro_batch=8) == config
    assert [accumulation(shared_out(config, n), n) for n in (1, 2, 4, 8)] == [1, 1, 1, 1]
    assert [shared_out(replace(config, batch=batch), 2).micro_batch for batch in (0, -2)] == [8, 8], "told by check_run"
    for name, value in world(2)[0].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("consissr.training.loop.Loop.__init__", lambda loop, config, *_: given.append(config))
    monkeypatch.setattr("consissr.training.loop.Loop.run", lambda loop: tmp_path)
    given: list = []
    with caplog.at_level(logging.INFO):
        assert main(words("autoencoder", photos, tmp_path, "batch=4", "micro_batch=4")) == 0
    assert given[0].micro_batch == 2 and given[0].batch == 4
    assert "micro_batch=2 in place of 4: 2 processes share a batch of 4" in caplog.text
    assert "what is learned changes" not in caplog.text
    with caplog.at_level(logging.INFO):
        assert main(words("clip", photos, tmp_path, "batch=4", "micro_batch=4")) == 0
    assert "what is learned changes with it" in caplog.text, "captions are told from those of the same micro-batch"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["stage=nuts"], False),
        (["stage=nuts", "tala.shared_draw=true"], True),
        (["stage=deft"], True),
        (["stage=rclip"], False),
        (["stage=rclip", "data.draws=per_batch"], True),
        (["stage=rclip", "data.pair_pool=8"], True),
    ],
)
def test_what_depends_on_the_micro_batch(words: list[str], wanted: bool) -> None:
    config = run_config(None, words)
    assert depends_on_micro_batch(config) is wanted
    told = memory_remedy(config, 1, 1)
    assert "a smaller one" in told and ("(same result)" in told) is not wanted


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "stage 'nuts' does not run under FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "stage 'nuts' does not run under DeepSpeed"),
        ("WORLD_SIZE", "0", "WORLD_SIZE=0 in the environment is no number of processes: unset it, or use torchrun"),
        (
            "WORLD_SIZE",
            "2",
            "WORLD_SIZE=2 is in the environment without RANK, MASTER_ADDR, MASTER_PORT: unset it",
        ),
        ("WORLD_SIZE", "two", "WORLD_SIZE=two in the environment is no number of processes"),
        ("WORLD_SIZE", "3", "batch 8 is not a multiple of micro_batch 4 x 3 process(es): use batch=12"),
    ],
)
def test_launches_that_cannot_be(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert message in refuse(photos, tmp_path)


@pytest.mark.parametrize(
    ("change", "package"), [("tracker=wandb", "wandb"), ("optimizer.kind=adamw8bit", "bitsandbytes")]
)
def test_missing_packages_are_named(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, package: str
) -> None:
    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else usual(name))
    assert f"{package} is not installed: `pip install {package}`" in refuse(photos, tmp_path, change)


def test_a_hub_id_s_revision_may_have_slashes(photos: Path, tmp_path: Path) -> None:
    config = run_config(None, [f"data.paths=[{photos}]", f"output_dir={tmp_path}/run", "init=owner/name@refs/pr/1"])
    check_models(config)
    assert "does not exist" in refuse(photos, tmp_path, "init=owner/name/more")


def test_an_output_that_is_a_file(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refuse(photos, tmp_path, f"output_dir={tmp_path}/file/run")


def test_nothing_is_imported_before(photos: Path, tmp_path: Path, root: Path) -> None:
    arguments = words("autoencoder", photos, tmp_path, "batch=3")
    code = (
        f"import sys; from scripts.train import main; assert main({arguments!r}) == 2\n"
        "assert not {'torch', 'numpy', 'accelerate'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(root)}
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: batch 3 is not a multiple") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "processes"), [("one_gpu", 1), ("one_node", 8), ("several_nodes", 32)])
def test_launch_settings_load(root: Path, name: str, processes: int) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = root / "configs/accelerate" / f"{name}.yaml"
    settings = load_config_from_file(str(path))
    assert settings.num_processes == processes and f"processes={processes}" in path.read_text()
