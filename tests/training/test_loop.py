"""How the loop conducts a run, on a toy stage: when it tells, validates and saves; what it says of time; how a run is
stopped and goes on; and steps that are not finite.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.nano.config import run_config
from consissr.training import loop as loop_module
from consissr.training.checkpoints import list_checkpoints, load_checkpoint
from consissr.training.loop import Loop
from consissr.training.precision import stores_bf16
from consissr.training.run_log import RunLog, read_log
from consissr.training.stage import Batch
from tests.training.test_loop_values import Toy

WORDS = ["batch=4", "micro_batch=2", "tracker=none", "data.crop=16", "precision=fp32", "checkpoint_limit=9"]
WORDS += ["compile=false", "frozen_precision=fp32", "optimizer.warmup=0", "data.validation_count=2"]


class Acting(Toy):
    """Counts its training micro-batches in a buffer, and does what a test wants in the middle of a step."""

    act: Callable[[Acting, Batch, int], Tensor | float] = lambda stage, batch, step: 1.0
    """(stage, batch, step) -> a factor of the second phase's loss."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.networks["conv"] = nn.Conv2d(3, 5, 3)
        self.before = {name: value.clone() for name, value in self.networks.state_dict().items()}
        self.buffers = {"turn": torch.zeros(1)}
        self.autocast: set[bool] = set()
        self.pairs: set[bool] = set()

    def prepare(self, batch: Batch) -> None:
        self.pairs.add(batch.lq is not None)
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        super().prepare(batch)

    def second(self, batch: Batch, step: int) -> dict[str, Tensor]:
        self.buffers["turn"] += 1
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        factor = type(self).act(self, batch, step)
        return {"loss": super().second(batch, step)["loss"] * factor}

    def restore(self, batch: Batch) -> Tensor:
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        return super().restore(batch)


def acting(act: Callable) -> type[Acting]:
    """A stage that does `act` in every micro-batch."""
    return type("Stage", (Acting,), {"act": act})


def begun(photos: Path, folder: Path, *words: str, build: type = Acting, resume: str = "") -> Loop:
    """A run that has not begun."""
    config = run_config(None, [f"data.paths=[{photos}]", f"output_dir={folder}", *WORDS, *words])
    return Loop(config, build, resume)


def terminate() -> None:
    """A scheduler's signal, where somebody listens."""
    assert callable(signal.getsignal(signal.SIGTERM))
    signal.raise_signal(signal.SIGTERM)


def saved(folder: Path) -> list[int]:
    """Steps of the checkpoints."""
    return [load_checkpoint(path)["step"] for path in list_checkpoints(folder)]


def test_compiling_is_told(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The bar stands still for minutes meanwhile."""
    for words, told in ((["compile=true"], 1), ([], 0)):
        caplog.clear()
        config = run_config(None, [f"data.paths=[{photos}]", f"output_dir={tmp_path}", *WORDS, *words])
        with caplog.at_level(logging.INFO):
            RunLog(config, 0, {}).close()
        assert caplog.text.count("compiled in the first steps, which take minutes") == told


def test_what_is_told_and_saved_when(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro-batch is waited for for 1 s and takes 10 s; what is no step's, 100 or 1000 s, does not count."""
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/3.png").write_bytes((photos / "3.png").read_bytes()[:500])
    now, asked = [0.0], []

    def work(stage: Acting, batch: Batch, step: int) -> float:
        now[0] += 10
        return 1.0

    class Slow(acting(work)):
        def restore(self, batch: Batch) -> Tensor:
            now[0] += 100
            return super().restore(batch)

    def batches() -> Iterator[Batch]:
        for batch in run.feed.batches(run.step):
            now[0] += 1
            yield batch

    words = ["steps=5", "log_every=2", "checkpoint_every=3", "validate_every=2", "workers=3"]
    words += [f"data.validation={photos}"]
    monkeypatch.setattr(loop_module, "fastest_rate", lambda *given: asked.append(given) or 7.0)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run = begun(tmp_path / "photos", tmp_path / "run", *words, build=Slow)
    assert asked == [(torch.device("cpu"), False)]
    lasts = []
    for player in run.players:
        monkeypatch.setattr(player, "averaging", lambda last: lasts.append(last) or nullcontext())
    monkeypatch.setattr(run, "batches", batches)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    now[0] = 1000.0
    assert run.run() == tmp_path / "run"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert run.log.bar.n == 5 and run.log.bar.disable, "its line is ended"
    assert lasts == [False, False, True, True] * 5, "both players' gradients are averaged in a step's last micro-batch"

    lines = read_log(tmp_path / "run/log.jsonl")
    told = [(line["step"], line.get("images")) for line in lines]
    assert told == [(2, 8), (2, None), (4, 16), (4, None), (5, 20), (5, None)]
    for line, waited in zip(lines[::2], (1.5, 2, 2), strict=True):  # the first wait fills the feed
        assert line["steps_per_second"] == round(1 / 22, 4) and line["data_seconds"] == waited, line
        # Of both micro-batches' products of (2, 3) and (3, n), n outputs: 2 * 2 * 3 n operations, forward (n = 3 three
        # times, 1 three times), to weights (3 twice, 1 twice), and to the judge's input.
        assert line["peak_share"] == round(2 * 12 * (3 * 3 + 3 + 2 * 3 + 2 + 1) / 22 / 7, 4)
        assert line["peak_mb"] > 1 and line["skipped"] == 1 and "not_finite" not in line
    assert all("validation/restored_psnr" in line for line in lines[1::2])
    assert sorted(path.name for path in (tmp_path / "run/validation").iterdir()) == [f"step-{n}.png" for n in (2, 4, 5)]
    assert saved(tmp_path / "run") == [3, 5]
    about = json.loads((tmp_path / "run/run.json").read_text())
    wanted = {"device": "cpu", "processes": 1, "engine": "ddp", "autocast": "fp32", "global_batch": 4}
    assert about.items() >= (wanted | {"micro_batches": 2, "workers": 3}).items()


def test_a_steps_work_is_counted_once_in_a_run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done without compiled networks, whose last bits are others: a resumed run would differ from one that was
    never stopped."""
    asked = []
    monkeypatch.setattr(loop_module, "counted", lambda run: asked.append(run()) or 50)
    monkeypatch.setattr(loop_module, "fastest_rate", lambda *_: 1.0)
    begun(photos, tmp_path, "steps=2").run()
    begun(photos, tmp_path, "steps=3", resume="latest").run()
    assert len(asked) == 1
    lines = read_log(tmp_path / "log.jsonl")
    for line in lines:  # of an image, 50 / 2: a micro-batch has two
        assert line["peak_share"] == pytest.approx(25 * 4 * line["steps_per_second"], rel=1e-2)
    assert [line["step"] for line in lines] == [2, 3]


def test_resuming_a_run_that_has_ended_tells_nothing_twice(photos: Path, tmp_path: Path) -> None:
    words = ["steps=2", f"data.validation={photos}"]
    begun(photos, tmp_path, *words).run()
    before = read_log(tmp_path / "log.jsonl")
    assert before[-1]["step"] == 2 and "validation/restored_psnr" in before[-1]
    begun(photos, tmp_path, *words, resume="latest").run()
    assert read_log(tmp_path / "log.jsonl") == before


def test_how_the_stage_is_set_up(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast in every forward pass, frozen matrices stored as they are computed; exported as they were."""
    from torch._functorch import config as functorch

    compiled, sharded, traced = [], [], []
    fast = torch.compile(lambda x: x + 1, backend=lambda graph, _: traced.append(graph) or graph.forward)
    usual = loop_module.Player
    monkeypatch.setattr(loop_module, "Player", lambda *given: sharded.append(given[2]) or usual(*given))

    class Compiled(Acting):
        needs_lq = True

        def __init__(self, config: TrainConfig) -> None:
            super().__init__(config)
            self.compile_modules = [SimpleNamespace(compile=lambda: compiled.append(config))]

        def restore(self, batch: Batch) -> Tensor:
            return fast(super().restore(batch))

        def export(self, folder: Path) -> None:
            fast(self.maker.weight)
            super().export(folder)

    low = ["precision=bf16", "frozen_precision=bf16", "compile=true", "steps=1", "data.crop=80", "timeout=3"]
    with functorch.patch(donated_buffer=True):
        run = begun(photos, tmp_path / "low", *low, f"data.validation={photos}", build=Compiled)
        assert compiled == [run.config] and functorch.donated_buffer is False
    assert run.accelerator.init_handler.timeout == timedelta(minutes=6), "processes tell of silence before that"
    assert run.accelerator.ddp_handler.gradient_as_bucket_view
    stage = run.stage
    assert stage.frozen.weight.dtype == torch.bfloat16 and stage.maker.weight.dtype == torch.float32
    assert stage.networks["conv"].weight.is_contiguous(memory_format=torch.channels_last)
    run.run()
    assert stage.autocast == {True} and stage.pairs == {True} and not traced, "what runs once is not compiled"
    result = torch.load(tmp_path / "low/result.pt")
    for name in ("frozen.weight", "conv.weight"):
        assert torch.equal(result[name], stage.before[name]) and result[name].dtype == torch.float32
    assert json.loads((tmp_path / "low/run.json").read_text())["autocast"] == "bf16"

    plain = begun(photos, tmp_path / "plain", "precision=bf16", "frozen_precision=auto", "engine=zero1")
    assert sharded == [False, False, True, True]
    assert plain.stage.frozen.weight.dtype == torch.float32, "on a CPU"
    plain.device, plain.autocast = torch.device("cuda"), False
    assert plain.mixed().fast_dtype == torch.bfloat16, "where torch's own choice is float16"
    for device, words in (("cuda", "auto bf16"), ("cpu", "bf16")):
        for word in ("auto", "bf16", "fp32"):
            assert stores_bf16(word, torch.device(device), True) == (word in words.split()), (device, word)
            assert not stores_bf16(word, torch.device(device), False)


def test_averages_may_begin_or_end_in_mid_run(photos: Path, tmp_path: Path) -> None:
    """ema may change on resuming, so it may be turned on (from the weights as they are) and off."""
    words = ["steps=2", "ema=0"]
    begun(photos, tmp_path, *words).run()
    weights = load_checkpoint(tmp_path / "checkpoint-2")["weights"]
    on = begun(photos, tmp_path, "steps=4", "ema=0.5", resume="latest")
    assert on.average.values.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in on.average.values.items())
    on.run()
    off = begun(photos, tmp_path, "steps=5", "ema=0", resume="latest")
    assert off.average.values == {} and load_checkpoint(tmp_path / "checkpoint-4")["ema"]
    off.run()


def test_accelerate_adds_no_precision_of_its_own(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --mixed_precision bf16` on a processor without bfloat16, for which auto means float32."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # which other tests of this process made
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        assert begun(photos, tmp_path, "precision=auto").accelerator.mixed_precision == "no"
    finally:
        AcceleratorState._reset_state()


def test_what_is_not_finite_is_told_with_its_files(photos: Path, tmp_path: Path) -> None:
    """Those of the step, of all its micro-batches; the steps before are saved."""
    names: list[str] = []

    def infinite(stage: Acting, batch: Batch, step: int) -> float:
        names.extend(batch.names if step == 2 else [])
        return torch.inf if step == 2 else 1.0

    run = begun(photos, tmp_path, "steps=5", "checkpoint_every=1", build=acting(infinite))
    with pytest.raises(UserError) as told:
        run.run()
    assert len(names) == 4 and str(told.value).startswith("step 2: loss of 'judge' is not finite ({'loss': inf}); ")
    assert f"files: {', '.join(names)}; last good checkpoint: {tmp_path}/checkpoint-2:" in str(told.value)
    assert saved(tmp_path) == [1, 2]


def test_what_ends_a_step_is_told_with_its_number(photos: Path, tmp_path: Path) -> None:
    remedies = {
        OSError(
            5, "Input/output error"
        ): r"\[Errno 5\] Input/output error; last good checkpoint: .*/checkpoint-1; mend this",
        torch.OutOfMemoryError("CUDA out of memory"): "out of memory with micro_batch=2: use a smaller one ",
    }
    for number, (error, remedy) in enumerate(remedies.items()):

        def fail(stage: Acting, batch: Batch, step: int, error: Exception = error) -> float:
            if step == 1:
                raise error
            return 1.0

        words = ["steps=3", "checkpoint_every=1"]
        with pytest.raises(UserError, match=f"^step 1: {remedy}"):
            begun(photos, tmp_path / str(number), *words, build=acting(fail)).run()


def test_a_last_checkpoint_that_cannot_be_written_is_told(photos: Path, tmp_path: Path) -> None:
    def stop(stage: Acting, batch: Batch, step: int) -> float:
        terminate()
        return 1.0

    (tmp_path / "file").write_text("")
    for build, steps in ((Acting, 1), (acting(stop), 9)):
        run = begun(photos, tmp_path / str(steps), f"steps={steps}", "checkpoint_every=9", build=build)
        run.writer.output_dir = tmp_path / "file"
        with pytest.raises(UserError, match="step 1 could not be written"):
            run.run()


def test_runs_that_cannot_begin(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(Acting):
        def __init__(self, config: TrainConfig) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    built = r"^out of memory while the networks were built \(--dry-run estimates what they need\)$"
    with pytest.raises(UserError, match=built):
        begun(photos, tmp_path, build=Large)
    monkeypatch.setattr(loop_module, "launched", lambda: 2)
    with pytest.raises(UserError, match="^2 processes were launched, 1 joined: check the launcher's settings$"):
        begun(photos, tmp_path)
