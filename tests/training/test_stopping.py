"""How a run stops, by whom, and goes on bit for bit."""

from __future__ import annotations

import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.training import loop as loop_module
from consissr.training.checkpoints import load_checkpoint
from consissr.training.run_log import read_log
from consissr.training.stage import Batch
from tests.training.test_loop import Acting, acting, begun, saved, terminate


def test_a_stopped_run_goes_on_bit_for_bit(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """SIGTERM ends it after the step; the window of the log, the count of what was left out, and the buffers go on."""
    words = ["steps=5", "log_every=4", "checkpoint_every=4", "skip_not_finite=true", "ema=0.5"]
    words += [f"data.validation={photos}", "validate_every=1"]

    def infinite(stage: Acting, batch: Batch, step: int) -> float:
        return torch.inf if step in (0, 3) else 1.0

    def stopping(stage: Acting, batch: Batch, step: int) -> float:
        if step == 1:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "what is ignored, as in background jobs, stays so"
            terminate()
        return infinite(stage, batch, step)

    begun(photos, tmp_path / "through", *words, build=acting(infinite)).run()
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run = begun(photos, tmp_path / "stopped", *words, build=acting(stopping))
        with pytest.raises(UserError, match="^stopped by SIGTERM after step 2, which is saved: use --resume latest$"):
            run.run()
    finally:
        signal.signal(signal.SIGINT, usual)
    assert capfd.readouterr().err.count("\nSIGTERM: finishing this step and saving it first\n") == 1
    assert saved(tmp_path / "stopped") == [2] and run.log.bar.disable
    begun(photos, tmp_path / "stopped", *words, build=acting(infinite), resume="latest").run()
    shutil.rmtree(tmp_path / "stopped/checkpoint-5")  # step 4 has been validated, step 2 had not
    begun(photos, tmp_path / "stopped", *words, build=acting(infinite), resume="latest").run()

    states = [load_checkpoint(tmp_path / name / "checkpoint-5") for name in ("through", "stopped")]
    assert states[0].keys() == states[1].keys() and states[0]["buffers"]["turn"].item() == 10
    assert states[0]["not_finite"] == 2
    for part in ("weights", "ema", "buffers", "optimizers", "not_finite", "since", "window", "step"):
        assert repr(states[0][part]) == repr(states[1][part]), part
    for name, value in states[0]["weights"].items():
        assert torch.equal(value, states[1]["weights"][name]), name
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("through", "stopped")]
    told = [(line["step"], line.get("not_finite")) for line in logs[0]]
    assert told == [(1, None), (2, None), (3, None), (4, 2), (4, None), (5, 2), (5, None)]
    assert all(math.isfinite(v) for line in logs[0] for v in line.values() if isinstance(v, float)), (
        "left out there, too"
    )
    for first, second in zip(*logs, strict=True):
        for key in first.keys() - {"steps_per_second", "data_seconds", "peak_mb", "peak_share"}:
            assert repr(first[key]) == repr(second[key]), (first["step"], key)

    class Wider(Acting):
        def __init__(self, config: TrainConfig) -> None:
            super().__init__(config)
            self.buffers = {"turn": torch.zeros(2)}

    with pytest.raises(UserError, match="checkpoint-5 is of another configuration: its buffers differ from this run's"):
        begun(photos, tmp_path / "stopped", *words, build=Wider, resume="latest")


def test_who_else_stops_a_run(photos: Path, tmp_path: Path) -> None:
    orphan = begun(photos, tmp_path / "a", "steps=3")
    orphan.processes.orphaned = lambda: True
    with pytest.raises(UserError, match="^stopped by its launcher's end after step 1, which is saved"):
        orphan.run()
    told = begun(photos, tmp_path / "b", "steps=3")
    collect, asked = told.flags.collect, []
    told.flags.collect = lambda every: asked.append(every) or [(it, [1.0, *bad]) for it, (_, *bad) in collect(every)]
    with pytest.raises(UserError, match="^stopped by a signal to another process after step 1, which is saved"):
        told.run()
    assert asked == [False, True], "before a checkpoint, the last step's too"


def test_what_is_told_to_be_saved_is(photos: Path, tmp_path: Path) -> None:
    """On a GPU a step's flags are known later: a signal in the step before a checkpoint shows while that is written."""
    run = begun(photos, tmp_path, "steps=3", "checkpoint_every=1")
    collect, waited = run.flags.collect, []
    run.flags.collect = lambda every: [(it, [float(every), *bad]) for it, (_, *bad) in collect(every)] if every else []
    run.processes.wait = lambda: waited.append(saved(tmp_path))
    with pytest.raises(UserError, match="after step 1, which is saved"):
        run.run()
    assert waited == [[1]], "the others leave once it is written: the launcher then ends them all"


def test_flags_of_several_steps_all_count(photos: Path, tmp_path: Path) -> None:
    """As they come from a GPU: whether to stop, and which phase's loss was not finite."""
    run = begun(photos, tmp_path, "skip_not_finite=true")
    watched = ["maker/loss", "judge/loss"]
    flags = ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0])
    run.flags.collect = lambda every: [((step, [], watched, {}), list(row)) for step, row in enumerate(flags)]
    run.check_flags()
    assert run.stopping and run.not_finite == 2


def test_ctrl_c_again_ends_at_once(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a second, in which launchers repeat it."""
    now, usual = [10.0], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    run = begun(photos, tmp_path)
    for number, at in ((signal.SIGTERM, 10.0), (signal.SIGINT, 11.0), (signal.SIGTERM, 12.0)):
        now[0] = at
        run.on_signal(number, None)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.on_signal(signal.SIGINT, None)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and run.signalled == "SIGTERM"
    finally:
        signal.signal(signal.SIGINT, usual)
    assert capfd.readouterr().err.count("finishing this step") == 1
    second = begun(photos, tmp_path)
    second.rank = 1
    second.on_signal(signal.SIGINT, None)
    assert second.signalled == "SIGINT" and "finishing" not in capfd.readouterr().err, "the first process tells"
