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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consissr.data.degradation import degrade, preset
from consissr.errors import UserError
from consissr.train_config import OptimizerConfig, TrainConfig
from consissr.training.checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
from consissr.training.report import Report
from consissr.training.stage import Batch, Phase, Stage, photographs, seed_of
from consissr.training.validation import Validation


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based) of `steps`: linear warm-up, then constant or cosine."""
    if step < config.warmup:
        return config.lr * (config.final + (1 - config.final) * step / config.warmup)
    if config.decay == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def accumulation(config: TrainConfig, processes: int) -> int:
    """Micro-batches per optimiser step and process. Raises UserError if the global batch does not divide."""
    if config.processes and config.processes != processes:
        raise UserError(
            f"{processes} process(es) run but processes={config.processes} was asked for: "
            "launch with `accelerate launch --num_processes N` (GPUs) or `torchrun --nproc_per_node N` (CPU)"
        )
    share = config.micro_batch * processes
    if config.batch % share:
        raise UserError(
            f"batch {config.batch} is not a multiple of micro_batch {config.micro_batch} x {processes} process(es): "
            f"use batch={max(1, round(config.batch / share)) * share}"
        )
    return config.batch // share


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are native on `device` (on CPUs without the instructions they crawl)."""
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class Loop:
    """State of one run: `run()` trains to the end, saves, and exports the result."""

    def __init__(self, config: TrainConfig, build: Callable[[TrainConfig], Stage], resume: str = "") -> None:
        from accelerate import Accelerator

        self.config = config
        self.output_dir = Path(config.output_dir)
        self.check_edges(resume)
        # Without `cpu`, several processes on CPUs would each train alone.
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if asked != self.world:
            raise UserError(f"{asked} processes were launched but {self.world} joined: check the launcher's settings")
        self.micro_batches = accumulation(config, self.world)
        self.autocast = config.precision == "bf16" or (config.precision == "auto" and fast_bf16(self.device))

        # 1. Networks: initial weights depend on the seed alone, and are the same in every process.
        torch.manual_seed(seed_of(config.seed, "init"))
        self.stage = build(config)
        self.stage.networks.to(self.device, memory_format=torch.channels_last)
        trained = {id(p) for phase in self.stage.phases for p in phase.parameters.values()}
        for parameter in self.stage.networks.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        for network in self.stage.hot if config.compile else ():
            network.compile()
        self.optimizers = {p.name: self.build_optimizer(p) for p in self.stage.phases}
        self.ema: dict[str, Tensor] = {k: v.detach().clone() for k, v in self.weights().items()} if config.ema else {}
        self.step = 0
        if resume:
            self.load(find_checkpoint(self.output_dir, resume))

        # 2. Data
        self.dataset = photographs(config.data, config.seed)
        self.degradation = preset(config.data.degradation)
        if config.data.enlarge:
            self.degradation = replace(self.degradation, enlarge=list(config.data.enlarge))
        self.validation = Validation(config, self.make_batch) if config.data.validation and self.rank == 0 else None
        self.stopping = False

    def check_edges(self, resume: str) -> None:
        """Everything that can be wrong before a single weight is loaded."""
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise UserError("FSDP and DeepSpeed are not supported: use ordinary multi-GPU settings (--multi_gpu)")
        if resume:
            find_checkpoint(self.output_dir, resume)
        elif (self.output_dir / "log.jsonl").exists():
            raise UserError(f"{self.output_dir} holds a run: go on with --resume latest, or choose another output_dir")

    def build_optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        """Fused AdamW over fp32 parameters."""
        wrong = [name for name, p in phase.parameters.items() if p.dtype != torch.float32]
        if wrong:
            raise ValueError(f"trained parameters must be float32: {wrong[0]} is not")
        c = phase.optimizer
        return torch.optim.AdamW(
            list(phase.parameters.values()), lr=c.lr, betas=tuple(c.betas), weight_decay=c.weight_decay, fused=True
        )

    # --- batches ------------------------------------------------------------------------------------------------

    def make_batch(self, samples: list[dict[str, Any]]) -> Batch:
        """Samples of the dataset on the device, degraded there if the stage needs low-quality partners."""
        batch = Batch(
            hq=torch.stack([s["hq"] for s in samples]).to(self.device, non_blocking=True),
            names=[s["name"] for s in samples],
            generators=[torch.Generator().manual_seed(seed_of(s["seed"], "loss")) for s in samples],
        )
        if self.stage.needs_lq:
            if "lq" in samples[0]:
                batch.lq = torch.stack([s["lq"] for s in samples]).to(self.device, non_blocking=True)
            else:
                _, batch.lq = degrade(batch.hq, self.degradation, seeds=[s["seed"] for s in samples])
        batch.hq = batch.hq.contiguous(memory_format=torch.channels_last)
        return batch

    def batches(self) -> Iterator[Batch]:
        """Micro-batches of this process from the current step on, prepared ahead in threads."""
        c = self.config
        with ThreadPoolExecutor(max_workers=max(1, c.workers)) as pool:
            pending = []
            for step in range(self.step, c.steps):
                for micro in range(self.micro_batches):
                    first = step * c.batch + (micro * self.world + self.rank) * c.micro_batch
                    numbers = range(first, first + c.micro_batch)
                    pending.append(pool.submit(lambda n: self.make_batch([self.dataset[i] for i in n]), numbers))
                    if len(pending) > max(1, c.workers):
                        yield pending.pop(0).result()
            for future in pending:
                yield future.result()

    # --- one optimiser step -------------------------------------------------------------------------------------

    def accumulate(self, batch: Batch, totals: dict[str, Tensor]) -> None:
        """Backward of every phase's loss on one micro-batch; adds each part of the losses to `totals`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                self.stage.prepare(batch)
            for phase in self.stage.phases:
                for other in self.stage.phases:
                    for parameter in other.parameters.values():
                        parameter.requires_grad_(other is phase)
                parts = phase.loss(batch, self.step)
                if not torch.isfinite(parts["loss"]):
                    self.fail_nan(phase, parts, batch)
                (parts["loss"] / self.micro_batches).backward()
                for name, value in parts.items():
                    key = f"{phase.name}/{name}"
                    totals[key] = totals.get(key, 0) + value.detach() / self.micro_batches

    def fail_nan(self, phase: Phase, parts: dict[str, Tensor], batch: Batch) -> None:
        """Stop on a loss that is not finite, naming all that is needed to find out why."""
        values = {name: float(value.detach()) for name, value in parts.items()}
        raise UserError(
            f"step {self.step}: loss of '{phase.name}' is not finite ({values}); files: {', '.join(batch.names)}; "
            f"continue from the last checkpoint in {self.output_dir} with a lower learning rate"
        )

    def update(self, totals: dict[str, Tensor]) -> None:
        """Average gradients (and what is logged) over processes, clip, and step every phase's optimiser in order."""
        if self.world > 1:
            means = self.accelerator.reduce(torch.stack([v.float() for v in totals.values()]), reduction="mean")
            totals.update(zip(totals, means, strict=True))
        for phase in self.stage.phases:
            parameters = [p for p in phase.parameters.values() if p.grad is not None]
            if self.world > 1:
                flat = torch.cat([p.grad.flatten() for p in parameters])
                flat = self.accelerator.reduce(flat, reduction="mean")
                for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                    p.grad.copy_(g.view_as(p))
            clip = phase.optimizer.clip or math.inf
            totals[f"{phase.name}/grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer = self.optimizers[phase.name]
            rate = learning_rate(phase.optimizer, self.step, self.config.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            totals[f"{phase.name}/lr"] = torch.tensor(rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, value in self.weights().items() if self.ema else ():
            self.ema[name].lerp_(value.detach(), 1 - self.config.ema)

    # --- the run ------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to `config.steps`, checkpointing on the way; returns the output folder with the exported result."""
        c = self.config
        signal.signal(signal.SIGTERM, self.on_sigterm)
        report = self.report = Report(c, self.step, self.describe()) if self.rank == 0 else None
        batches = self.batches()
        totals: dict[str, Tensor] = {}
        window: dict[str, float] = {}
        data_time, started, since = 0.0, time.perf_counter(), self.step
        while self.step < c.steps and not self.stopping:
            for _ in range(self.micro_batches):
                waiting = time.perf_counter()
                batch = next(batches)
                data_time += time.perf_counter() - waiting
                self.accumulate(batch, totals)
            self.update(totals)
            self.step += 1
            if report:
                report.bar.update()
            for name, value in totals.items():
                window[name] = window.get(name, 0.0) + float(value)
            totals = {}
            if self.step % c.log_every == 0 or self.step == c.steps:
                elapsed = time.perf_counter() - started
                count = self.step - since
                means = {k: v / count for k, v in window.items()}
                if report:
                    report.means(means, self.step, elapsed / count, data_time / elapsed)
                window, data_time, started, since = {}, 0.0, time.perf_counter(), self.step
            if self.validation and c.validate_every and self.step % c.validate_every == 0:
                self.validate()
            if self.step % c.checkpoint_every == 0 or self.step == c.steps:
                self.save()
        if report:
            report.bar.close()
        if self.stopping:
            self.save()
            raise UserError(f"stopped by SIGTERM after step {self.step}, which is saved: continue with --resume latest")
        return self.finish()

    def describe(self) -> dict[str, Any]:
        """What the run is, for run.json."""
        return {
            "device": str(self.device),
            "processes": self.world,
            "autocast": "bf16" if self.autocast else "fp32",
            "global_batch": self.config.batch,
            "micro_batches": self.micro_batches,
        }

    def on_sigterm(self, *_: object) -> None:
        """Finish the current step, save, stop."""
        self.stopping = True

    def validate(self) -> None:
        """Images and PSNR/SSIM on the fixed set, with the averaged weights if there are any."""
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
        with self.averaged(), autocast, torch.compiler.set_stance("force_eager"):
            metrics = self.validation.run(self.stage, self.step)
        self.report.line({"step": self.step, **metrics})

    def finish(self) -> Path:
        """Validate once more and export the result."""
        with self.averaged():
            if self.rank == 0:
                if self.validation:
                    self.validate()
                self.stage.export(self.output_dir)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.output_dir

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
            }
            save_checkpoint(self.output_dir, self.step, state, self.config.checkpoint_limit)
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = load_checkpoint(path)
        weights = self.weights()
        if weights.keys() != state["weights"].keys():
            raise UserError(f"{path} is of another configuration: its trained tensors differ from this run's")
        with torch.no_grad():
            for name, value in weights.items():
                value.copy_(state["weights"][name])
            for name, value in self.stage.buffers.items():
                value.copy_(state["buffers"][name])
            for name, value in self.ema.items():
                value.copy_(state["ema"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.step = state["step"]


class Averaged:
    """Swap averaged weights in, and the trained ones back on leaving."""

    def __init__(self, weights: dict[str, Tensor], ema: dict[str, Tensor]) -> None:
        self.weights, self.ema = weights, ema

    def swap(self) -> None:
        """Exchange the two sets in place."""
        with torch.no_grad():
            for name, averaged in self.ema.items():
                trained = self.weights[name].detach().clone()
                self.weights[name].copy_(averaged)
                averaged.copy_(trained)

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *_: object) -> None:
        self.swap()
