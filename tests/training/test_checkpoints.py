"""Checkpoints that are damaged, resumed with other settings, or belong to a run that still goes on."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from consissr.errors import UserError
from consissr.nano.config import run_config
from consissr.training.checkpoints import Writer, damage, list_checkpoints, load_checkpoint, save_checkpoint
from consissr.training.checkpoints import sound_checkpoint as sound
from consissr.training.checks import check_changes
from consissr.training.lock import claimed
from scripts.train import main
from tests.training.tiny import words


def test_a_removed_checkpoint_that_a_file_server_keeps_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS holds a file that another process still reads in the folder that was to go."""
    busy, usual = tmp_path / ".stale-checkpoint-1", os.rmdir
    busy.mkdir()

    def rmdir(path: str, **options: int) -> None:
        if Path(path).name == busy.name:
            raise OSError(errno.EBUSY, "Device or resource busy")
        usual(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    assert save_checkpoint(tmp_path, 2, {"step": 2}, limit=1).is_dir()
    assert busy.is_dir()


def test_any_damaged_byte_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, {"step": 3, "a": torch.arange(50.0)}, limit=2)
    assert damage(path) == ""
    for file in (path / "state.pt", path / "state.json"):
        whole = file.read_bytes()
        for place in range(0, len(whole), 1 if file.suffix == ".json" else 7):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert damage(path), (file.name, place)
        file.write_bytes(whole[:-1])
        assert damage(path)
        file.write_bytes(whole)
    assert damage(path) == ""


def test_latest_is_the_newest_sound_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, step, {"step": step, "a": torch.full((1000,), step)}, limit=3)
    file = tmp_path / "checkpoint-6/state.pt"
    data = bytearray(file.read_bytes())
    data[2000:2064] = bytes(64)
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert sound(tmp_path, "latest").name == "checkpoint-4"
    assert "checkpoint-6 is damaged" in caplog.text
    with pytest.raises(UserError, match="checkpoint-6 is damaged .*: name an earlier checkpoint"):
        sound(tmp_path, str(tmp_path / "checkpoint-6"))
    save_checkpoint(tmp_path, 5, {"step": 5}, limit=2)  # the run that goes on from 4: the damaged one is in its way
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]


def test_what_is_written_later_is_what_was_true_then(tmp_path: Path) -> None:
    weights = torch.zeros(1000, 100)
    writer = Writer(tmp_path, limit=9)
    for step in range(3):
        writer.save(step, {"step": step, "inner": [{"a": weights}]})
        weights += 1
    writer.finish()
    for step in range(3):
        assert (load_checkpoint(tmp_path / f"checkpoint-{step}")["inner"][0]["a"] == step).all()
    writer.output_dir = tmp_path / "checkpoint-0/state.pt"
    writer.save(9, {"step": 9})
    with pytest.raises(UserError, match="step 9 could not be written"):
        writer.finish()
    writer.close()


def test_changed_optimiser_settings_count(photos: Path, tmp_path: Path) -> None:
    assert main(words("autoencoder", photos, tmp_path)) == 0
    more = ("steps=3", "optimizer.betas=[0.5,0.6]", "optimizer.weight_decay=0.25")
    assert main(["--resume", "latest", *words("autoencoder", photos, tmp_path, *more)]) == 0
    group = load_checkpoint(tmp_path / "autoencoder/checkpoint-3")["optimizers"]["autoencoder"]["param_groups"][0]
    assert group["betas"] == (0.5, 0.6) and group["weight_decay"] == 0.25


def test_another_run_is_not_resumed_by_mistake(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(words("autoencoder", photos, tmp_path)) == 0
    for change in ("seed=5", "data.flips=none", "batch=4"):
        caplog.clear()
        arguments = words("autoencoder", photos, tmp_path, "steps=3", change)
        assert main(["--resume", "latest", *arguments]) == 2
        assert f"differs from this run in {change.split('=')[0]}: " in caplog.text and "--allow-changes" in caplog.text
    assert main(["--resume", "latest", "--allow-changes", *arguments, "optimizer.lr=1e-5"]) == 0
    assert "step 2 goes on with other settings than before: batch, optimizer.lr" in caplog.text


def test_one_run_per_folder(tmp_path: Path, root: Path) -> None:
    """The second is told of the first; nothing is left of one that ended, or was killed."""
    code = (
        "import sys, time; from consissr.training.lock import claimed\n"
        f"with claimed({str(tmp_path / 'run')!r}): print('in', flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": str(root)}
    first = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"in\n"
    with pytest.raises(UserError, match=f"process {first.pid} on .*; stop that one first"), claimed(tmp_path / "run"):
        pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    with claimed(tmp_path / "run"):
        assert f"process {os.getpid()} " in (tmp_path / "run/.lock").read_text()
    assert not (tmp_path / "run").exists()


def test_words_may_stand_anywhere(photos: Path, tmp_path: Path) -> None:
    first, config, *rest = words("autoencoder", photos, tmp_path)
    assert main([first, config, *rest]) == 0
    assert main([first, config, rest[0], "--resume", "latest", *rest[1:], "steps=3"]) == 0
    assert [path.name for path in list_checkpoints(tmp_path / "autoencoder")] == ["checkpoint-2", "checkpoint-3"]


def test_accelerates_precision_is_not_passed_over(photos: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert main(words("autoencoder", photos, tmp_path)) == 2
    assert "mixed_precision=fp16, but the run's config decides" in caplog.text


def test_a_run_of_another_stage_is_not_resumed(photos: Path, tmp_path: Path) -> None:
    """Not even one of nano's, whose settings a paper's stage has no fields for."""
    config = run_config(None, [f"data.paths=[{photos}]", f"output_dir={tmp_path}"])
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/state.json").write_text("{}")
    for stage in ("nano_nuts", "tala"):
        (tmp_path / "train.yaml").write_text(f"stage: {stage}\nmodel: {{residual: 0.5}}\n")
        with pytest.raises(
            UserError, match=f"train.yaml is of stage {stage}, this run of nuts: choose another output_"
        ):
            check_changes(config, "latest", allowed=False)
        check_changes(config, "latest", allowed=True)
