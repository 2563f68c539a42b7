"""Training through the front door: every stage on tiny networks, resumed runs, broken configurations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from consissr.config.training import TrainConfig
from consissr.data.datasets import PhotoDataset
from consissr.nano.autoencoder import MEASURED
from consissr.nano.config import run_config
from consissr.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from consissr.training.checks import accumulation
from consissr.training.loop import Loop
from consissr.training.stage import held_out
from consissr.training.validation import VALIDATION_SEED
from consissr.weights.latents import load_latents
from scripts.train import main, stage_builder
from tests.training.tiny import SMALL, beside, started, validated, words


@pytest.mark.parametrize(
    ("stage", "files"),
    [
        ("autoencoder", ["vae/config.json", "vae/linear_path.safetensors", "validation/step-2.png"]),
        ("clip", ["text_encoder/config.json", "tokenizer/vocab.json", "image_encoder/config.json", "retrieval.json"]),
        ("prior", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]),
        ("rclip", ["image_encoder/config.json", "image_encoder/model.safetensors"]),
        ("tala", ["config.yaml", "unet_adapter.safetensors", "image_encoder/config.json", "validation/step-2.png"]),
        ("nuts", ["config.yaml", "controlnet/config.json", "README.md", "validation/step-2.png"]),
        ("deft", ["config.yaml", "controlnet/config.json", "vae/decoder.safetensors", "validation/step-2.png"]),
    ],
)
def test_a_stage_leaves_its_result(runs: Path, stage: str, files: list[str]) -> None:
    lines = [json.loads(line) for line in (runs / stage / "log.jsonl").read_text().splitlines()]
    losses = [value for line in lines for name, value in line.items() if name.endswith("/loss")]
    assert len(losses) >= 2 and np.isfinite(losses).all()
    for name in [*files, "train.yaml", "run.json"]:
        assert (runs / stage / name).is_file()


@pytest.mark.parametrize("own", [[], ["data.validation={photos}", "data.validation_count=5"]])
def test_exported_latents_have_unit_variance(photos: Path, tmp_path: Path, own: list[str]) -> None:
    """Over all crops of the validation set, its uneven last micro-batch included; else over training's first."""
    own = [word.format(photos=photos) for word in own]
    _, path, *overrides = words("autoencoder", photos, tmp_path, *own)
    config = run_config(path, overrides)
    Loop(config, stage_builder("autoencoder")).run()
    numbers, dataset = range(MEASURED), PhotoDataset(config.data, config.seed)
    if own:
        numbers, dataset = range(5), held_out(config.data, VALIDATION_SEED)
    latents = load_latents(tmp_path / "autoencoder/vae")
    with torch.no_grad():
        z = latents.encode(torch.stack([dataset[n]["hq"] for n in numbers]))
    assert z.var().item() == pytest.approx(1, abs=2e-3) and latents.scale != 1  # stored in half precision


def test_the_result_runs(runs: Path) -> None:
    from consissr import Restorer

    restorer = Restorer.load(str(runs / "deft"))
    out = restorer(torch.zeros(1, 3, 20, 24), scale=2)
    assert out.shape == (1, 3, 40, 48) and out.isfinite().all()


@pytest.mark.parametrize("stage", list(SMALL))
def test_resuming_is_bit_exact(runs: Path, photos: Path, tmp_path: Path, stage: str) -> None:
    """A run stopped after one step and resumed ends with the weights of one that ran through."""
    again = tmp_path / stage
    shutil.copytree(runs / stage, again)
    shutil.rmtree(again / "checkpoint-2")
    assert main(["--resume", "latest", *words(stage, photos, runs, *validated(photos), f"output_dir={again}")]) == 0
    through, resumed = (load_checkpoint(folder / "checkpoint-2") for folder in (runs / stage, again))
    assert through["weights"].keys() == resumed["weights"].keys()
    for name, value in through["weights"].items():
        assert torch.equal(value, resumed["weights"][name]), name
        assert torch.equal(through["ema"][name], resumed["ema"][name]), name


@pytest.mark.parametrize("stage", list(SMALL))
def test_trained_parameters_learn_and_frozen_ones_stay(runs: Path, photos: Path, tmp_path: Path, stage: str) -> None:
    """Two steps, and the gradient after them, reach every trainable tensor; everything else stays bit-identical.

    (Where zero layers stand one behind the other, the inner one's gradient begins after the second step.)
    """
    beside(runs, tmp_path, stage)
    # A hinge loss cancels exactly in the discriminator's last bias until a logit leaves [-1, 1]: a large step makes it.
    _, path, *overrides = words(stage, photos, tmp_path, "precision=fp32", "deft.optimizer.lr=0.1", "steps=3")
    loop = started(run_config(path, overrides))
    trained = {id(p) for phase in loop.stage.phases for p in phase.parameters.values()}
    frozen = {n: p for n, p in loop.stage.networks.named_parameters() if id(p) not in trained}
    before = {name: p.detach().clone() for name, p in frozen.items()}
    seen: set[str] = set()
    for batch in loop.batches():
        totals: dict[str, torch.Tensor] = {}
        loop.accumulate(batch, totals)
        weights = loop.weights()
        seen |= {n for n, p in weights.items() if p.grad is not None and p.grad.abs().sum() > 0}
        if loop.step == 2:
            break
        loop.update(totals)
        loop.step += 1
    assert not (weights.keys() - seen), sorted(weights.keys() - seen)[:5]
    for name, value in before.items():
        assert torch.equal(value, frozen[name]), name


def test_more_micro_batches_change_nothing_but_rounding(runs: Path, photos: Path, tmp_path: Path) -> None:
    ends = []
    for name, size in (("whole", 2), ("halves", 1)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "prior").symlink_to(runs / "prior")
        arguments = words("nuts", photos, folder, f"micro_batch={size}", "precision=fp32", "steps=1")
        assert main(arguments) == 0
        ends.append(json.loads((folder / "nuts" / "log.jsonl").read_text().splitlines()[0]))
    assert ends[0]["controlnet/loss"] == pytest.approx(ends[1]["controlnet/loss"], rel=1e-5)
    assert ends[0]["controlnet/grad_norm"] == pytest.approx(ends[1]["controlnet/grad_norm"], rel=1e-4)


def test_an_earlier_run_is_not_overwritten(runs: Path, photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(words("autoencoder", photos, runs)) == 2
    assert "--resume latest" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--resume", "latest"], "no complete checkpoint"),
        (["batch=3"], "not a multiple of micro_batch 2"),
        (["processes=4"], "processes=4 was asked for"),
        (["stage=nutz"], "did you mean 'nuts'"),
        (["stage="], "stage is ''"),
        (["optimizer.rl=1"], "did you mean 'lr'"),
        (["steps=many"], "steps"),
        (["data.paths=[nowhere]"], "nowhere does not exist"),
    ],
)
def test_bad_runs_are_refused_in_a_line(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: list[str], message: str
) -> None:
    assert main([*words("autoencoder", photos, tmp_path), *change]) == 2
    assert message in caplog.text


def test_checkpoints_are_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1, "weights": {"a": torch.ones(3)}}, limit=2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(Exception, match="No space left on device.*last good checkpoint: .*checkpoint-1"):
        save_checkpoint(tmp_path, 2, {"step": 2}, limit=2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {"step": step}, limit=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_accumulation_follows_from_the_global_batch() -> None:
    config = TrainConfig(batch=96, micro_batch=4)
    assert accumulation(config, 4) == 6  # CCSR's: 4 GPUs x 4 x 6
    assert accumulation(config, 1) == 24
