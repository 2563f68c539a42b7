"""The training loop, the only one. A stage (see stage.py) says what is trained and by which loss.

One optimiser step sees the global batch: images number step * batch ... + batch - 1 of an endless sequence that
depends on the seed alone, split over processes and accumulated in micro-batches, so that the result depends on the
process count by rounding only. How a loss becomes a step stands in engine.py; how processes wait for each other, and
say what went wrong, in processes.py.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.models.memory import out_of_memory_in_one_line, peak_memory_mb
from consissr.training.checkpoints import Writer, load_checkpoint, sound_checkpoint
from consissr.training.checks import check_run, launched
from consissr.training.engine import Average, Player
from consissr.training.failures import not_finite, step_errors_in_one_line
from consissr.training.feed import Feed
from consissr.training.optimisers import learning_rate, load_optimizer
from consissr.training.precision import Frozen, stores_bf16
from consissr.training.processes import Flags, Processes
from consissr.training.run_log import RunLog
from consissr.training.stage import Batch, Stage, seed_of, trained_ids
from consissr.training.validation import Validation
from consissr.training.window import LogWindow, counted, fastest_rate
from consissr.weights.precision import choose_precision

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What asks a run to stop: a scheduler, and Ctrl-C."""
AGAIN = 1.0
"""Seconds within which a second Ctrl-C counts as the first, which launchers pass on to processes that had it."""


class Loop:
    """State of one run: `run()` trains to the end, saves, and exports the result."""

    def __init__(self, config: TrainConfig, build: type[Stage], resume: str = "") -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        self.config = config
        self.output_dir = Path(config.output_dir)
        check_run(config, resume)
        # A process that hangs is told of by Processes first, after `timeout`.
        settings = [
            InitProcessGroupKwargs(timeout=timedelta(minutes=2 * config.timeout)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ]
        # Without `cpu`, several processes on CPUs would each train alone.
        # No mixed precision of its own: where this run's is, is said by `mixed`.
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=settings
        )
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if launched() != self.world:
            raise UserError(f"{launched()} processes were launched, {self.world} joined: check the launcher's settings")
        self.autocast = choose_precision(config.precision, self.device) == "bf16"
        self.processes = Processes(self.rank, self.world, self.device, config.timeout)
        self.flags = Flags(self.processes)
        self.signalled: str = ""
        """What asked this process to stop."""
        self.stopping = False
        self.files: list[str] = []
        """This process's images of the step that is being computed."""
        self.step = 0
        self.not_finite = 0
        """Steps that were skipped because their loss or gradient was not finite."""
        self.window = LogWindow(config.batch // self.world)
        self.writer = Writer(self.output_dir, config.checkpoint_limit)

        with self.processes.one_line():
            # 1. Data
            with self.processes.machine_first(self.accelerator.local_process_index):
                self.feed = Feed(config, self.device, self.rank, self.world, build.needs_lq)
            self.micro_batches = self.feed.micro_batches
            self.validation = None
            if config.data.validation:
                self.validation = Validation(config, self.feed.make_batch, self.processes)

            # 2. Networks
            with out_of_memory_in_one_line(
                "out of memory while the networks were built (--dry-run estimates what they need)"
            ):
                self.build(build)
                if resume:
                    checkpoint = sound_checkpoint(self.output_dir, resume) if self.rank == 0 else None
                    self.load(self.processes.first(checkpoint))

    def build(self, build: type[Stage]) -> None:
        """Networks, optimisers, averages. Initial weights depend on the seed alone: they are equal in all processes."""
        config = self.config
        torch.manual_seed(seed_of(config.seed, "init"))
        self.stage = build(config)
        low = stores_bf16(config.frozen_precision, self.device, self.autocast)
        self.frozen = Frozen(self.stage.networks, trained_ids(self.stage), low, keep=self.rank == 0)
        self.stage.networks.to(self.device, memory_format=torch.channels_last)
        if config.compile:
            from torch._functorch import config as functorch

            functorch.donated_buffer = False  # deft's adaptive weight goes backward through one graph several times
            for network in self.stage.compile_modules:
                network.compile()
        self.players = [Player(phase, self.accelerator, config.engine == "zero1") for phase in self.stage.phases]
        self.average = Average(self.weights(), config.ema)
        self.window.peak = fastest_rate(self.device, self.autocast)

    def batches(self) -> Iterator[Batch]:
        """Micro-batches of this process from the current step on."""
        return self.feed.batches(self.step)

    def mixed(self) -> torch.autocast:
        """Context of forward passes; backward ones take each operation's precision from there."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    # --- one optimiser step -------------------------------------------------------------------------------------

    def accumulate(self, batch: Batch, totals: dict[str, Tensor | float], last: bool = True) -> None:
        """Backward of every phase's loss on one micro-batch; adds each part of the losses to `totals`.

        last: whether it is the step's last one, in which gradients are averaged over the processes.
        """
        self.files += batch.names
        with self.mixed(), torch.no_grad():
            self.stage.prepare(batch)
        for player in self.players:
            for other in self.players:
                other.requires_grad(other is player)
            with player.averaging(last):
                with self.mixed():
                    losses = player.module(batch, self.step)
                (losses["loss"] / self.micro_batches).backward()
            for name, value in losses.items():
                key = f"{player.name}/{name}"
                totals[key] = totals.get(key, 0.0) + value.detach() / self.micro_batches

    def update(self, totals: dict[str, Tensor | float]) -> None:
        """Step every phase's optimiser in order, move the averages, and agree with the others on going on."""
        if not self.signalled and self.processes.orphaned():
            self.signalled = "its launcher's end"
        for player in self.players:
            rate = learning_rate(player.phase.optimizer, self.step, self.config.steps)
            totals[f"{player.name}/grad_norm"] = player.step(rate)
            totals[f"{player.name}/lr"] = rate
        self.average.update(self.step)
        watched = [f"{player.name}/{what}" for what in ("loss", "grad_norm") for player in self.players]
        bad = [~torch.isfinite(totals[name]) for name in watched]
        self.flags.post((self.step, self.files, watched, totals), [float(bool(self.signalled)), *bad])
        self.files = []
        self.check_flags()

    def check_flags(self, all_of_them: bool = False) -> None:
        """Prepare to stop where any process was asked to; a step that was not finite ends the run, or is counted."""
        for (step, files, watched, totals), (stop, *bad) in self.flags.collect(all_of_them):
            self.stopping |= stop > 0
            if not any(bad):
                continue
            if self.config.skip_not_finite:
                self.not_finite += 1
                continue
            name = next(name for name, count in zip(watched, bad, strict=True) if count)
            self.writer.finish()  # what is told of the last good checkpoint is then true
            raise not_finite(self.config, self.processes, step, name, files, totals)

    # --- the run ------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to `config.steps`, checkpointing on the way; returns the output folder with the exported result.

        Raises UserError for what the run cannot go on from: a loss that is not finite, a full disk, too little memory,
        a signal to stop. KeyboardInterrupt: Ctrl-C was pressed again.
        """
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        heard = [number for number in SIGNALS if previous[number] is not signal.SIG_IGN]  # as jobs in background do
        for number in heard:
            signal.signal(number, self.on_signal)
        self.log = None
        try:
            lines = step_errors_in_one_line(self.config, lambda: self.step, self.world)
            with self.processes.one_line(), lines, closing(self.writer):
                self.log = RunLog(self.config, self.step, self.describe()) if self.rank == 0 else None
                self.train()
                return self.finish()
        finally:
            for number in heard:
                signal.signal(number, previous[number])
            self.processes.close()
            if self.log:
                self.log.close()

    def train(self) -> None:
        """Steps, lines, validations and checkpoints up to `config.steps`."""
        c = self.config
        if self.to_validate():
            self.validate_if_due()  # the last run stopped between checkpoint and validation
        begun = self.step
        self.window.restart(begun)
        with closing(self.batches()) as batches:
            while self.step < c.steps:
                totals: dict[str, Tensor | float] = {}
                for micro in range(self.micro_batches):
                    waiting = time.perf_counter()
                    batch = next(batches)
                    if self.step > begun or micro:  # the first wait fills the feed
                        self.window.waited += time.perf_counter() - waiting
                    accumulate = partial(self.accumulate, batch, totals, last=micro == self.micro_batches - 1)
                    if self.window.work:
                        accumulate()
                    else:  # once in a run: counting does without compiled networks, whose last bits are others
                        self.window.work = counted(accumulate) / c.micro_batch
                self.update(totals)
                self.step += 1
                self.window.add(totals, finite_only=c.skip_not_finite)
                if self.log:
                    self.log.bar.update()
                    self.writer.check()
                if self.step % c.log_every == 0 or self.step == c.steps:
                    self.tell()
                if self.step % c.checkpoint_every == 0 or self.step == c.steps or self.stopping:
                    self.save(wait=self.step == c.steps or self.stopping)
                if self.stopping:
                    by = self.signalled or "a signal to another process"
                    raise UserError(f"stopped by {by} after step {self.step}, which is saved: use --resume latest")
                with self.window.paused():
                    self.validate_if_due()

    def tell(self) -> None:
        """A log line on the steps since the last one."""
        self.window.share(self.processes)
        values = {"step": self.step, "images": self.step * self.config.batch, **self.window.close(self.step)}
        peaks, skipped = zip(*self.processes.gathered((peak_memory_mb(), len(self.feed.dataset.skipped))), strict=True)
        values |= {"peak_mb": max(peaks), "skipped": sum(skipped)}
        if self.config.skip_not_finite:
            values["not_finite"] = self.not_finite
        if self.log:
            self.log.means(values)

    def describe(self) -> dict[str, Any]:
        """What the run is, for run.json."""
        return {
            "device": str(self.device),
            "processes": self.world,
            "engine": self.config.engine,
            "autocast": "bf16" if self.autocast else "fp32",
            "global_batch": self.config.batch,
            "micro_batches": self.micro_batches,
            "workers": self.feed.workers,
        }

    def on_signal(self, number: int, _: object) -> None:
        """Finish the current step, save, stop. Another Ctrl-C, after AGAIN seconds, stops at once."""
        if not self.signalled:
            self.signalled, self.signalled_at = signal.Signals(number).name, time.monotonic()
            if self.rank == 0:
                os.write(2, f"\n{self.signalled}: finishing this step and saving it first\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self.signalled_at > AGAIN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt

    def to_validate(self) -> bool:
        """Whether an earlier run's log does not tell of this step's validation yet."""
        return self.processes.first(bool(self.log and self.step not in self.log.validated))

    def validate_if_due(self) -> None:
        """After the checkpoint of the same step, which a validation that fails then costs nothing."""
        every = self.config.validate_every
        if self.config.data.validation and every and self.step % every == 0 and 0 < self.step < self.config.steps:
            self.validate()

    def validate(self) -> None:
        """Images and PSNR/SSIM on the fixed set, with the averaged weights if there are any."""
        with self.average.swapped(), self.mixed(), torch.compiler.set_stance("force_eager"):
            metrics = self.validation.run(self.stage, self.step)
        if self.log:
            self.log.validation(metrics, self.step, self.validation.picture(self.step))

    def finish(self) -> Path:
        """Validate once more and export the result: the averaged weights, if there are any."""
        if self.validation and self.to_validate():
            self.validate()
        if self.rank == 0:
            for player in self.players:
                player.free()  # its memory goes to the weights in full precision
            self.frozen.restore()
            with self.average.swapped(), torch.compiler.set_stance("force_eager"):
                self.stage.export(self.output_dir)
        self.processes.leave()
        self.accelerator.end_training()
        return self.output_dir

    # --- state --------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """Trained tensors of all phases by 'phase/name'."""
        return {f"{p.name}/{n}": v for p in self.stage.phases for n, v in p.parameters.items()}

    def save(self, wait: bool) -> None:
        """Checkpoint of the current step, by the first process, while training goes on unless it is to `wait`."""
        self.check_flags(all_of_them=True)
        wait = wait or self.stopping  # asked for in the last step: what is told of this checkpoint must be true
        self.window.share(self.processes)
        optimizers = {player.name: player.optimizer_state() for player in self.players}
        if self.rank == 0:
            state = {
                "step": self.step,
                "weights": self.weights(),
                "buffers": self.stage.buffers,
                "optimizers": optimizers,
                "ema": self.average.values,
                "not_finite": self.not_finite,
                **self.window.state(),
            }
            self.writer.save(self.step, state)
            if wait:
                self.writer.finish()
        if wait:
            self.processes.wait()

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = load_checkpoint(path)
        if bool(state["ema"]) != bool(self.average.values):  # turned off, or on: then they begin here
            state["ema"] = {name: state["weights"][name] for name in self.average.values}
        current = {"weights": self.weights(), "buffers": self.stage.buffers, "ema": self.average.values}
        for part, tensors in current.items():
            shapes = [{name: tuple(value.shape) for name, value in one.items()} for one in (tensors, state[part])]
            if shapes[0] != shapes[1]:
                raise UserError(f"{path} is of another configuration: its {part} differ from this run's")
            with torch.no_grad():
                for name, value in tensors.items():
                    value.copy_(state[part][name])
        for player in self.players:
            load_optimizer(player.optimizer, state["optimizers"][player.name], player.phase)
        self.step = state["step"]
        self.window.load(state)
        self.not_finite = state["not_finite"]
