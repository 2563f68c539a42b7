"""What goes wrong in mid-run: full disks, damaged and vanished data, losses that are not finite, signals to stop."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import exc

from consissr.errors import UserError
from consissr.nano.config import run_config
from consissr.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from consissr.training.loop import Loop
from consissr.training.run_log import RunLog, read_log
from consissr.training.validation import Validation
from scripts.train import main, stage_builder
from tests.training.children import finish, start, start_saving
from tests.training.tiny import started, words

TIMING = {"steps_per_second", "data_seconds", "peak_mb", "peak_share"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of 3 MB; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def one_line(caplog: pytest.LogCaptureFixture) -> str:
    """The only error that was told."""
    (record,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert "\n" not in record.getMessage()
    return record.getMessage()


def test_full_disk_keeps_the_last_checkpoint(photos: Path, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A real one; a run that then gets room goes on."""
    arguments = words("autoencoder", photos, small_disk, "steps=30")
    assert main([*arguments, "checkpoint_limit=30"]) == 2
    kept = list_checkpoints(small_disk / "autoencoder")
    message = one_line(caplog)
    assert "No space left on device" in message and f"last good checkpoint: {kept[-1]}" in message
    assert load_checkpoint(kept[-1])["step"] == len(kept) < 29
    for path in kept[:-1]:
        shutil.rmtree(path)
    assert main(["--resume", "latest", *arguments, "checkpoint_limit=1"]) == 0
    assert [line["step"] for line in read_log(small_disk / "autoencoder/log.jsonl")] == list(range(1, 31))


@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_full_disk_stops_the_log(
    photos: Path, small_disk: Path, caplog: pytest.LogCaptureFixture, tracker: str
) -> None:
    """Everything else that a run writes is told of in a line, too."""
    arguments = words("autoencoder", photos, small_disk, "steps=40", "checkpoint_every=2", f"tracker={tracker}")
    with pytest.MonkeyPatch.context() as patch:
        usual = RunLog.line

        def fill(log: RunLog, values: dict) -> None:
            for path in (small_disk / "filler", log.lines) if values["step"] == 3 else ():
                with pytest.raises(OSError), open(path, "ab", buffering=0) as file:
                    while True:
                        file.write(b"\n" * 64)
            usual(log, values)

        patch.setattr(RunLog, "line", fill)
        assert main(arguments) == 2
    message = one_line(caplog)
    assert "No space left on device" in message and "checkpoint-2" in message


def test_file_size_limit_stands_for_a_full_disk(tmp_path: Path) -> None:
    """Without the right to mount: files may not grow beyond 100 kB."""
    state = {"step": 1, "weights": {"a": torch.ones(1000)}}
    save_checkpoint(tmp_path, 1, state, limit=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="File too large.*last good checkpoint: .*checkpoint-1"):
            save_checkpoint(tmp_path, 2, {"step": 2, "weights": {"a": torch.ones(100_000)}}, limit=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert torch.equal(load_checkpoint(tmp_path / "checkpoint-1")["weights"]["a"], torch.ones(1000))


def test_corrupt_image_is_counted(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "3.png").write_bytes((photos / "3.png").read_bytes()[:500])
    with caplog.at_level(logging.WARNING):
        assert main(words("autoencoder", folder, tmp_path, "steps=4")) == 0
    told = {record.getMessage() for record in caplog.records if "skipped" in record.getMessage()}
    assert len(told) == 1 and "3.png" in caplog.text and "(1 so far)" in caplog.text
    assert read_log(tmp_path / "autoencoder/log.jsonl")[-1]["skipped"] == 1


def test_truncated_shard(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = tmp_path / "photos.tar"
    with tarfile.open(shard, "w") as tar:
        for path in sorted(photos.iterdir()):
            tar.add(path, path.name)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        assert main(words("autoencoder", shard, tmp_path)) == 0
    assert "photos.tar is damaged" in caplog.text and "images are used" in caplog.text


def test_deleted_folder(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    usual = RunLog.line

    def delete(log: RunLog, values: dict) -> None:
        usual(log, values)
        shutil.rmtree(folder, ignore_errors=True)

    monkeypatch.setattr(RunLog, "line", delete)
    assert main(words("autoencoder", folder, tmp_path, "steps=30", "data.cache_mb=0")) == 2
    assert "No such file" in one_line(caplog) and "check data.paths" in caplog.text


def test_a_loss_that_is_not_finite_names_files_and_checkpoint(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = ["steps=9", "optimizer.lr=1e30", "optimizer.warmup=3", "optimizer.final=0", "optimizer.clip=0"]
    assert main([*words("autoencoder", photos, tmp_path), *more]) == 2
    message, kept = one_line(caplog), list_checkpoints(tmp_path / "autoencoder")
    assert "is not finite" in message and message.count(".png") == 2
    assert message.startswith(f"error: step {kept[-1].name.removeprefix('checkpoint-')}:")
    assert f"last good checkpoint: {kept[-1]}" in message
    for value in load_checkpoint(kept[-1])["weights"].values():
        assert value.isfinite().all()


def test_a_gradient_that_is_not_finite_stays_out_of_the_weights(photos: Path, tmp_path: Path) -> None:
    _, path, *overrides = words("autoencoder", photos, tmp_path)
    loop = started(run_config(path, overrides))
    totals: dict[str, torch.Tensor] = {}
    loop.accumulate(next(loop.batches()), totals)
    next(p for p in loop.weights().values() if p.grad is not None).grad[0] = torch.inf
    before = {name: value.detach().clone() for name, value in loop.weights().items()}
    told = r"gradient of 'autoencoder' is not finite .*\.png.*last good checkpoint: none: start again with a lower"
    with pytest.raises(UserError, match=told):
        loop.update(totals)
    assert all(torch.equal(value, before[name]) for name, value in loop.weights().items())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_to_stop_save(photos: Path, tmp_path: Path, name: str) -> None:
    """A scheduler's and Ctrl-C's, also where a launcher repeats it."""
    arguments = words("autoencoder", photos, tmp_path, "steps=100000", "checkpoint_every=100000")
    process = start(arguments, tmp_path / "out.txt")
    while process.is_alive() and not read_log(tmp_path / "autoencoder/log.jsonl"):
        time.sleep(0.01)
    for _ in range(2):
        os.kill(process.pid, getattr(signal, name))
    assert finish(process, seconds=60) == [2]
    (saved,) = list_checkpoints(tmp_path / "autoencoder")
    step = load_checkpoint(saved)["step"]
    assert f"stopped by {name} after step {step}, which is saved" in (tmp_path / "out.txt").read_text()


def test_another_ctrl_c_stops_at_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = Loop.update

    def interrupted(loop: Loop, totals: dict) -> None:
        loop.on_signal(signal.SIGINT, None)
        loop.on_signal(signal.SIGINT, None)  # the launcher's repetition
        loop.signalled_at -= 2
        loop.on_signal(signal.SIGINT, None)
        usual(loop, totals)

    monkeypatch.setattr(Loop, "update", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert main(words("autoencoder", photos, tmp_path)) == 130
    assert one_line(caplog).startswith("interrupted") and signal.getsignal(signal.SIGINT) is handler
    assert not list_checkpoints(tmp_path / "autoencoder")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("loss", "step 0: out of memory with micro_batch=2: use a smaller one (same result); last good"),
        ("__init__", "out of memory while the networks were built"),
    ],
)
def test_too_little_memory_is_told(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
    message: str,
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(stage_builder("autoencoder"), place, fail)
    assert main(words("autoencoder", photos, tmp_path)) == 2
    assert message in one_line(caplog)


@pytest.mark.parametrize("kind", [getattr(exc, "InductorError", exc.LoweringException), BackendCompilerFailed])
def test_what_cannot_be_compiled_is_told(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type
) -> None:
    """No compiler; a file that a run left empty when it was killed in the minutes that compiling takes."""

    def fail(*_: object) -> None:
        error = RuntimeError.__new__(kind)  # their constructors differ from one torch to the next
        error.args = ("backend='inductor' raised:\nImportError",)
        error.inner_exception = ImportError("torchinductor/main.so: file too short\nand more")
        raise error

    monkeypatch.setattr(stage_builder("autoencoder"), "loss", fail)
    assert main(words("autoencoder", photos, tmp_path)) == 2
    line = one_line(caplog)
    assert "(torchinductor/main.so: file too short): install a C++ compiler; remove" in line
    assert line.endswith("or use compile=false")


def test_other_errors_keep_their_traceback(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(stage_builder("autoencoder"), "loss", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(words("autoencoder", photos, tmp_path))


def test_a_failing_validation_costs_no_step(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of its step is there before it, and the resumed run makes up for it."""
    own = (f"data.validation={photos}", "data.validation_count=2", "validate_every=1", "steps=3")
    logs = []
    for name in ("whole", "failed"):
        arguments = words("autoencoder", photos, tmp_path / name, *own)
        if name == "failed":
            with monkeypatch.context() as patch:
                patch.setattr(Validation, "run", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    main(arguments)
            assert [path.name for path in list_checkpoints(tmp_path / name / "autoencoder")] == ["checkpoint-1"]
            arguments = ["--resume", "latest", *arguments]
        assert main(arguments) == 0
        lines = read_log(tmp_path / name / "autoencoder/log.jsonl")
        logs.append([{k: v for k, v in line.items() if k not in TIMING} for line in lines])
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [1, 1, 2, 2, 3, 3]


def test_bad_validation_photographs_show_at_once(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"no picture")
    assert main(words("autoencoder", photos, tmp_path, f"data.validation={tmp_path / 'bad'}")) == 2
    assert "a.png" in one_line(caplog) and "check data.validation" in caplog.text
    assert not (tmp_path / "autoencoder").exists()


def test_kill_while_checkpoints_are_written(tmp_path: Path) -> None:
    """Whatever moment a kill hits: what counts as a checkpoint is whole."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        process, saved = start_saving(tmp_path)
        assert saved.wait(60), "no checkpoint within a minute"
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -9
        found = list_checkpoints(tmp_path)
        assert found
        for path in found:
            state = load_checkpoint(path)
            assert path.name == f"checkpoint-{state['step']}" and (state["a"] == state["step"]).all()
    save_checkpoint(tmp_path, 7, {"step": 7}, limit=2)
    assert all(path.name.startswith("checkpoint-") for path in tmp_path.iterdir())


def test_a_run_killed_before_its_first_checkpoint_may_start_anew(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "autoencoder").mkdir()
    (tmp_path / "autoencoder/log.jsonl").write_text('{"step": 1, "images": 2}\n{"step": 2, "ima')
    assert main(words("autoencoder", photos, tmp_path)) == 0
    assert [line["step"] for line in read_log(tmp_path / "autoencoder/log.jsonl")] == [1, 2]


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"step": 1, "a": torch.ones(1000)}, limit=1)
    (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:2000])
    with pytest.raises(UserError, match="checkpoint-1 cannot be read.*earlier checkpoint"):
        load_checkpoint(path)


def test_going_back_in_time_asks_first(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = words("autoencoder", photos, tmp_path, "checkpoint_limit=9")
    assert main(arguments) == 0
    first = tmp_path / "autoencoder/checkpoint-1"
    assert main(["--resume", str(first), *arguments]) == 2
    assert "newer checkpoints stand beside it" in one_line(caplog) and "checkpoint-2" in caplog.text
    caplog.clear()
    assert main(["--resume", "latest", *arguments, "steps=1"]) == 2
    assert "is at step 2, beyond steps=1: use more steps" in one_line(caplog)
