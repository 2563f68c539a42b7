"""`bench.py gpu`: its minutes are kept, nothing measured is lost, what is left undone is named."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from consissr.bench.gpu import Task, lines, measure
from consissr.bench.process import Worker


class Clocked:
    """Stands for the worker: every task takes the seconds it is given."""

    def __init__(self):
        self.now, self.limits = 0.0, []

    def ask(self, run, given, limit):
        took = given["took"]
        self.limits.append(limit)
        self.now += min(took, limit)
        if took > limit:
            return {"status": "failed", "reason": f"took longer than {limit:.0f} s"}
        return {"status": "done", "found": {"images/s": 2.5, "all": {}}}

    def stop(self):
        self.limits.append("stopped")


def test_what_does_not_fit_is_named_and_a_smaller_task_still_runs(tmp_path):
    worker, said, file = Clocked(), [], tmp_path / "gpu.json"
    names = [("first", 10, 10), ("hangs", 10, 10**6), ("too long", 100, 1), ("last", 5, 5)]
    listed = [Task(name, seconds, str, {"took": took}) for name, seconds, took in names]
    record = measure(listed, 3, file, said.append, worker, lambda: worker.now)
    assert [entry["status"] for entry in record["tasks"]] == ["done", "failed", "not begun", "done"]
    assert record["tasks"][2]["reason"] == "takes about 100 s, 67 were left"  # of 3 minutes less 3 s, after 10 and 100
    assert worker.limits == [100.0, 100.0, 67.0, "stopped"] and worker.now <= 180
    assert json.loads(file.read_text()) == record and said[0] == "first: done, 10 s\n    images/s: 2.5"


def test_a_kill_loses_nothing_that_was_measured(tmp_path):
    worker, file = Clocked(), tmp_path / "gpu.json"

    def killed(run, given, limit):
        if given["name"] == "second":
            raise KeyboardInterrupt
        return Clocked.ask(worker, run, given, limit)

    worker.ask = killed
    with pytest.raises(KeyboardInterrupt):
        measure([Task(name, 1, str, {"took": 1, "name": name}) for name in ("first", "second")], 1, file, str, worker)
    tasks = json.loads(file.read_text())["tasks"]
    assert [task["status"] for task in tasks] == ["done", "not begun"] and worker.limits[-1] == "stopped"


def test_a_worker_that_dies_or_hangs_is_replaced():
    worker = Worker()
    try:
        assert worker.ask(os.path.basename, {"p": "a/b"}, 60) == {"status": "done", "found": "b"}
        died = worker.ask(os._exit, {"status": 3}, 60)
        assert died == {"status": "failed", "reason": "its process ended with status 3"}
        wrong = worker.ask(os.path.basename, {"p": 5}, 60)
        assert wrong["status"] == "failed" and wrong["reason"].startswith("TypeError: expected str")
        assert "took longer" in worker.ask(signal.pause, {}, 0.1)["reason"]
        assert worker.process is None
    finally:
        worker.stop()


def test_lines_leave_out_what_is_nested():
    entry = {"task": "a", "status": "done", "seconds": 3.2, "found": {"seconds": 0.0123456, "card": "b", "all": {}}}
    assert list(lines(entry)) == ["a: done, 3 s", "    seconds: 0.01235", "    card: b"]


def test_the_largest_micro_batch_is_where_the_line_through_two_peaks_ends():
    from consissr.bench.gpu_training import largest

    assert largest((1, 3), [10, 30], 72.0) == 7  # 10 for each image: 70 for seven
    assert largest((1, 3), [10, 30], 5.0) == 0


def test_a_stage_in_training(monkeypatch):
    """Speed, work and memory of the smallest one; the others differ in their configurations."""
    from ccsr.methods import stages
    from consissr.bench import gpu_training

    monkeypatch.setattr(gpu_training, "STEPS", 2)
    monkeypatch.setattr(gpu_training, "LINE", 1)
    config, builder = stages(Path("configs"))["rclip"]
    found = gpu_training.stage(config, builder, [*gpu_training.TINY, "micro_batch=1"], "cpu")
    assert found["images/s, 1 images"] > 0 and found["G multiply-accumulates per image"] > 0
    assert found["peak of 3, MB"] > 0 and found["micro-batch in 24 GB"] > found["micro-batch in 40 GB"] // 2


def test_a_stage_s_figures_are_of_one_image(monkeypatch):
    """The loop counts an image's work: whatever the micro-batch, and for the images that are timed."""
    from torch import nn

    from consissr.bench import gpu_training
    from consissr.training.window import LogWindow

    def train():
        loop.window.work = 2e9
        loop.lines += 2 * [(1.0, 0.0, loop.window.work * loop.window.images)]

    loop = object.__new__(gpu_training.Timed)
    loop.config, loop.device, loop.window = SimpleNamespace(micro_batch=4, batch=4), None, LogWindow(4)
    loop.stage, loop.train = SimpleNamespace(needs_lq=False, networks=nn.Module()), train
    monkeypatch.setattr(gpu_training, "Feed", lambda *_: None)
    monkeypatch.setattr(gpu_training, "memory", lambda *_: {})
    found = gpu_training.measured(loop)
    assert found["G multiply-accumulates per image"] == 1 and found["share of the ceiling, 4 images"] == 8e9
    assert loop.timed(8)["share of the ceiling"] == 16e9


@pytest.mark.slow
def test_rehearsal(script, tmp_path):
    """Everything at the bundled models' sizes on the CPU, as README says."""
    call = ["gpu", "--minutes", "15", "--size", "tiny", "--device", "cpu", "--json", str(tmp_path / "gpu.json")]
    script("bench").main(call)
    tasks = json.loads((tmp_path / "gpu.json").read_text())["tasks"]
    wrong = [task for task in tasks if task["status"] != "done"]
    assert not wrong and Path("tests/test_gpu.py").is_file()
