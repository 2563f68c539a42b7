"""The training loop, the only one. A stage (see stage.py) says what is trained and by which loss.

One optimiser step sees the global batch: images number step * batch ... + batch - 1 of an endless sequence that
depends on the seed alone, split over processes and accumulated in micro-batches. Gradients are summed over
micro-batches and averaged over processes in one flat all-reduce just before the step, so stages call their networks
freely and need no wrapper, and the result depends on the process count by rounding only.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.models.memory import is_out_of_memory
from consissr.training.checkpoints import find_checkpoint, last_good, load_checkpoint, save_checkpoint
from consissr.training.checks import check_run, launched
from consissr.training.feed import Feed
from consissr.training.optimisers import Averaged, build_optimizer, learning_rate
from consissr.training.precision import Frozen, use_autocast
from consissr.training.report import Report
from consissr.training.stage import Batch, Stage, seed_of
from consissr.training.validation import Validation

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What asks a run to stop: a scheduler, and Ctrl-C."""
AGAIN = 1.0
"""Seconds within which a second Ctrl-C counts as the first, which launchers pass on to processes that had it."""
PATIENCE = timedelta(hours=6)
"""How long processes wait for the first one, which alone validates, saves and exports; NCCL's own limit, 10 minutes,
would end a run whose validation takes longer."""


class Loop:
    """State of one run: `run()` trains to the end, saves, and exports the result."""

    def __init__(self, config: TrainConfig, build: type[Stage], resume: str = "") -> None:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        self.config = config
        self.output_dir = Path(config.output_dir)
        check_run(config, resume)
        # Without `cpu`, several processes on CPUs would each train alone.
        patience = InitProcessGroupKwargs(timeout=PATIENCE)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if launched() != self.world:
            raise UserError(f"{launched()} processes were launched, {self.world} joined: check the launcher's settings")
        self.autocast = use_autocast(config, self.device)

        # 1. Data
        self.feed = Feed(config, self.device, self.rank, self.world, build.needs_lq)
        self.micro_batches = self.feed.micro_batches
        self.validation = None
        if config.data.validation and self.rank == 0:
            self.validation = Validation(config, self.feed.make_batch)
        self.files: list[str] = []
        """This process's images of the step that is being computed."""
        self.signalled: signal.Signals | None = None
        self.stopping = False
        self.step = 0
        self.window: dict[str, float] = {}
        """Sums of what is logged since the last line, at step `since`."""
        self.since = 0

        # 2. Networks
        with self.out_of_memory_in_one_line(
            "out of memory while the networks were built (--dry-run estimates what they need)"
        ):
            self.build(build)
            if resume:
                self.load(find_checkpoint(self.output_dir, resume))

    def build(self, build: type[Stage]) -> None:
        """Networks, optimisers, averages. Initial weights depend on the seed alone: they are equal in all processes."""
        config = self.config
        torch.manual_seed(seed_of(config.seed, "init"))
        self.stage = build(config)
        trained = {id(p) for phase in self.stage.phases for p in phase.parameters.values()}
        low = config.frozen_precision == "bf16" or (config.frozen_precision == "auto" and self.device.type == "cuda")
        self.frozen = Frozen(self.stage.networks, trained, low and self.autocast, keep=self.rank == 0)
        self.stage.networks.to(self.device, memory_format=torch.channels_last)
        if config.compile:
            from torch._functorch import config as functorch

            functorch.donated_buffer = False  # deft's adaptive weight goes backward through one graph several times
            for network in self.stage.compile_modules:
                network.compile()
        self.optimizers = {p.name: build_optimizer(p) for p in self.stage.phases}
        self.ema: dict[str, Tensor] = {k: v.detach().clone() for k, v in self.weights().items()} if config.ema else {}

    def batches(self) -> Iterator[Batch]:
        """Micro-batches of this process from the current step on."""
        return self.feed.batches(self.step)

    def mixed(self) -> torch.autocast:
        """Context of forward passes; backward ones take each operation's precision from there."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    @contextmanager
    def out_of_memory_in_one_line(self, message: str = "") -> Iterator[None]:
        """Makes a UserError of running out of memory: `message`, or what was done and what needs less."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(message or self.memory_remedy()) from error

    def memory_remedy(self) -> str:
        """A line on a step that ran out of memory."""
        c, ways = self.config, []
        if c.micro_batch > 1:
            shared = c.stage == "clip" or c.data.draws == "per_batch"  # else images of a micro-batch share nothing
            ways.append("a smaller one" + ("" if shared else " (same result)"))
        if c.stage in ("tala", "nuts") and not c.gradient_checkpointing:
            ways.append("gradient_checkpointing=true")
        remedy = " or ".join(ways) or "a smaller data.crop, or a device with more memory"
        where = f"step {self.step}: out of memory with micro_batch={c.micro_batch}"
        return f"{where}: use {remedy}; {last_good(self.output_dir)}"

    # --- one optimiser step -------------------------------------------------------------------------------------

    def accumulate(self, batch: Batch, totals: dict[str, Tensor]) -> None:
        """Backward of every phase's loss on one micro-batch; adds each part of the losses to `totals`."""
        self.files += batch.names
        with self.mixed(), torch.no_grad():
            self.stage.prepare(batch)
        for phase in self.stage.phases:
            for other in self.stage.phases:
                for parameter in other.parameters.values():
                    parameter.requires_grad_(other is phase)
            with self.mixed():
                parts = phase.loss(batch, self.step)
            if not torch.isfinite(parts["loss"]):
                self.stop_not_finite(f"loss of '{phase.name}'", {k: float(v.detach()) for k, v in parts.items()})
            (parts["loss"] / self.micro_batches).backward()
            for name, value in parts.items():
                key = f"{phase.name}/{name}"
                totals[key] = totals.get(key, 0) + value.detach() / self.micro_batches

    def stop_not_finite(self, what: str, value: object) -> None:
        """Stop, before it gets into a checkpoint, naming all that is needed to find out why."""
        raise UserError(
            f"step {self.step}: {what} is not finite ({value}); files: {', '.join(self.files)}; "
            f"{last_good(self.output_dir)}: resume it with a lower learning rate"
        )

    def update(self, totals: dict[str, Tensor]) -> None:
        """Average gradients (and what is logged) over processes, clip, and step every phase's optimiser in order."""
        self.stopping = self.signalled is not None
        if self.world > 1:  # a signal may reach one process a step before another: they agree here
            totals["signalled"] = torch.tensor(float(self.stopping), device=self.device)
            means = self.accelerator.reduce(torch.stack([v.float() for v in totals.values()]), reduction="mean")
            totals.update(zip(totals, means, strict=True))
            self.stopping = bool(totals.pop("signalled") > 0)
        for phase in self.stage.phases:
            parameters = [p for p in phase.parameters.values() if p.grad is not None]
            if self.world > 1:
                flat = torch.cat([p.grad.flatten() for p in parameters])
                flat = self.accelerator.reduce(flat, reduction="mean")
                for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                    p.grad.copy_(g.view_as(p))
            clip = phase.optimizer.clip or math.inf
            norm = totals[f"{phase.name}/grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, clip)
            if not torch.isfinite(norm):
                self.stop_not_finite(f"gradient of '{phase.name}'", float(norm))
            optimizer = self.optimizers[phase.name]
            rate = learning_rate(phase.optimizer, self.step, self.config.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            totals[f"{phase.name}/lr"] = torch.tensor(rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, value in self.weights().items() if self.ema else ():
            self.ema[name].lerp_(value.detach(), 1 - self.config.ema)
        self.files = []

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
        self.report = None
        try:
            self.report = Report(self.config, self.step, self.describe()) if self.rank == 0 else None
            with self.out_of_memory_in_one_line():
                self.train()
                return self.finish()
        except OSError as error:
            raise UserError(
                f"step {self.step}: {error}; {last_good(self.output_dir)}; mend this and use --resume latest"
            ) from error
        finally:
            for number in heard:
                signal.signal(number, previous[number])
            if self.report:
                self.report.close()

    def train(self) -> None:
        """Steps, lines, validations and checkpoints up to `config.steps`."""
        c = self.config
        batches = self.batches()
        if self.report and not self.report.validated:  # the last run stopped between checkpoint and validation
            self.validate_if_due()
        data_time, started, first = 0.0, time.perf_counter(), self.step
        while self.step < c.steps:
            totals: dict[str, Tensor] = {}
            for _ in range(self.micro_batches):
                waiting = time.perf_counter()
                batch = next(batches)
                data_time += time.perf_counter() - waiting
                self.accumulate(batch, totals)
            self.update(totals)
            self.step += 1
            for name, value in totals.items():
                self.window[name] = self.window.get(name, 0.0) + float(value)
            if self.report:
                self.report.bar.update()
            last = self.step == c.steps
            if self.step % c.log_every == 0 or last:
                if self.report:
                    means = {k: v / (self.step - self.since) for k, v in self.window.items()}
                    times = [seconds / (self.step - first) for seconds in (time.perf_counter() - started, data_time)]
                    self.report.means(means, self.step, *times, len(self.feed.dataset.skipped))
                self.window, self.since = {}, self.step
                data_time, started, first = 0.0, time.perf_counter(), self.step
            if self.step % c.checkpoint_every == 0 or last or self.stopping:
                self.save()
            if self.stopping:
                by = self.signalled.name if self.signalled else "a signal to another process"
                raise UserError(f"stopped by {by} after step {self.step}, which is saved: use --resume latest")
            self.validate_if_due()

    def describe(self) -> dict[str, Any]:
        """What the run is, for run.json."""
        return {
            "device": str(self.device),
            "processes": self.world,
            "autocast": "bf16" if self.autocast else "fp32",
            "global_batch": self.config.batch,
            "micro_batches": self.micro_batches,
        }

    def on_signal(self, number: int, _: object) -> None:
        """Finish the current step, save, stop. Another Ctrl-C, after AGAIN seconds, stops at once."""
        if self.signalled is None:
            self.signalled, self.signalled_at = signal.Signals(number), time.monotonic()
            os.write(2, f"\n{self.signalled.name}: finishing this step and saving it first\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self.signalled_at > AGAIN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt

    def validate_if_due(self) -> None:
        """After the checkpoint of the same step, which a validation that fails then costs nothing."""
        every = self.config.validate_every
        if self.validation and every and self.step % every == 0 and 0 < self.step < self.config.steps:
            self.validate()

    def validate(self) -> None:
        """Images and PSNR/SSIM on the fixed set, with the averaged weights if there are any."""
        with self.averaged(), self.mixed(), torch.compiler.set_stance("force_eager"):
            metrics = self.validation.run(self.stage, self.step)
        self.report.line({"step": self.step, **metrics})

    def finish(self) -> Path:
        """Validate once more and export the result: the averaged weights, if there are any."""
        if self.rank == 0:
            if self.validation:
                self.validate()
            self.optimizers.clear()  # their memory goes to the weights in full precision
            self.frozen.restore()
            with self.averaged(), torch.compiler.set_stance("force_eager"):
                self.export()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.output_dir

    def export(self) -> None:
        """Write the stage's result; a disk that is full is an OSError, whichever library met it."""
        from safetensors import SafetensorError

        try:
            self.stage.export(self.output_dir)
        except SafetensorError as error:
            raise OSError(f"the result could not be written to {self.output_dir} ({error})") from error

    # --- state --------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """Trained tensors of all phases by 'phase/name'."""
        return {f"{p.name}/{n}": v for p in self.stage.phases for n, v in p.parameters.items()}

    def averaged(self) -> Averaged:
        """Context in which the stage holds the averaged weights (a no-op without EMA)."""
        return Averaged(self.weights(), self.ema)

    def save(self) -> None:
        """Checkpoint of the current step, by the first process."""
        if self.rank == 0:
            state = {
                "step": self.step,
                "weights": {k: v.detach().cpu().contiguous() for k, v in self.weights().items()},
                "buffers": {k: v.cpu() for k, v in self.stage.buffers.items()},
                "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
                "ema": {k: v.cpu() for k, v in self.ema.items()},
                "window": self.window,
                "since": self.since,
            }
            save_checkpoint(self.output_dir, self.step, state, self.config.checkpoint_limit)
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = load_checkpoint(path)
        current = {"weights": self.weights(), "buffers": self.stage.buffers, "ema": self.ema}
        for part, tensors in current.items():
            shapes = [{name: tuple(value.shape) for name, value in one.items()} for one in (tensors, state[part])]
            if shapes[0] != shapes[1]:
                raise UserError(f"{path} is of another configuration: its {part} differ from this run's")
            with torch.no_grad():
                for name, value in tensors.items():
                    value.copy_(state[part][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.step = state["step"]
        self.window, self.since = state.get("window", {}), state.get("since", self.step)
