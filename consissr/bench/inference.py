"""Our path (Restorer) beside the plain reference: seconds of each part, work, share of the ceiling, memory, results."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from consissr.bench.clock import Clock, ceiling, spread
from consissr.bench.models import SamplingMethod, build
from consissr.bench.process import MB, apart, peak, start_peak
from consissr.bench.reference import Reference
from consissr.bench.report import PARTS, PATHS
from consissr.bench.work import macs_of
from consissr.diffusion.plans import Step
from consissr.diffusion.sampler import seeded_draw
from consissr.images import codec
from consissr.images.geometry import finish, prepare, to_pil
from consissr.images.inputs import network_input
from consissr.models.memory import GLIBC_KEEPS, HEAP_KEEPS, set_heap
from consissr.weights.precision import PRECISIONS


@dataclass
class Question:
    """What to measure."""

    size: str
    """'sd21' (random weights), or a bundled model or model folder."""
    method: SamplingMethod
    pixels: int = 512
    """Side of the result; the input's is a quarter."""
    batch: int = 1
    """Images at once in our path; the releases know one."""
    runs: int = 5
    device: str = "cpu"
    precision: str = "fp32"
    compile: bool = False
    """Whether our path's networks are compiled."""

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


class Paths:
    """Both ways, or one of them, from a low-quality image in memory to a written file."""

    def __init__(self, question: Question, wanted: tuple[str, ...], scratch: Path) -> None:
        self.question, self.scratch = question, scratch
        self.device = torch.device(question.device)
        keep_text = "reference" in wanted  # the releases encode the prompts for every image
        networks, self.config = build(question.size, question.method, self.device, question.dtype, keep_text)
        self.work = macs_of(networks, self.config, question.method, question.pixels)
        self.multiple = networks.latents.factor * 2 ** (len(networks.denoiser.unet.config.block_out_channels) - 1)
        made: dict[str, Any] = {}
        if "reference" in wanted:  # before Restorer puts the weights into another order
            made["reference"] = Reference(networks, networks.model, networks.text, question.method.sequential)
        if "ours" in wanted:
            made["ours"] = networks.restorer(self.config)
            if question.compile:
                made["ours"].compile(one_size=True)
        self.made = made

    def run(self, path: str, clock: Clock) -> Tensor:
        """One batch, timed; the decoded images (B,3,H,W)."""
        lq, plan = pictures(self.question), self.question.method.plan
        if self.device.type == "cpu":  # a process's heap has one setting, and the releases leave it alone
            set_heap(HEAP_KEEPS if path == "ours" else GLIBC_KEEPS)
        with clock.part("total"):
            with clock.part("prepare"):
                rule = (self.config.geometry, self.multiple, None, self.config.short_side, self.config.margin)
                if path == "ours":
                    jobs = [self.made[path].prepared(one, 4, self.config, None) for one in lq.split(1)]
                else:
                    jobs = [prepare(one, 4, *rule) for one in lq.split(1)]
                x = network_input(jobs, torch.float32)
            if path == "ours":
                y = self.ours(x, plan, clock)
            else:
                rows = [
                    self.made[path].restore(
                        one.to(self.device, self.question.dtype), seeded_draw(0, [i]), self.config, plan, clock
                    )
                    for i, one in enumerate(x.split(1))
                ]
                y = torch.cat(rows)
            for i, (job, decoded) in enumerate(zip(jobs, y.split(1), strict=True)):
                with clock.part("colour"):
                    done = finish(job, decoded.clone(), self.config.geometry, self.config.color_fix)
                with clock.part("write"):
                    file = self.scratch / f"{path}{i}.png"
                    if path == "ours":
                        codec.write(file, codec.Photo(done[0], None, codec.Form()))
                    else:
                        to_pil(done).save(file)  # both releases: Pillow's own settings for PNG
        return y

    def undivided(self, path: str) -> dict[str, Any]:
        """Seconds per image where nothing waits between the parts, and MB above what is loaded."""
        before, clocks = start_peak(self.question.device), []
        for _ in range(self.question.runs + 1):
            clocks.append(Clock(self.device, only="total"))
            self.run(path, clocks[-1])
        seconds = spread([clock.parts["total"].wall / self.question.batch for clock in clocks[1:]])
        return {"undivided": seconds, "working_mb": (peak(self.question.device) - before) / MB}

    def ours(self, x: Tensor, plan: list[Step], clock: Clock) -> Tensor:
        """Restorer's result, with the time of its parts."""
        restorer = self.made["ours"]
        watched = [
            (restorer.denoiser, "prepare", "prompt"),
            (restorer.latents, "moments", "encode"),
            (restorer.denoiser, "forward", "step"),
            (restorer.latents, "decode", "decode"),
        ]
        with ExitStack() as stack:
            for owner, name, part in watched:
                timed = clock.timed(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            return restorer.restore_tensor(x, list(range(len(x))), plan=plan)


def pictures(question: Question) -> Tensor:
    """Made-up low-quality images (B,3,side,side) in [-1, 1]: smooth shapes with some noise."""
    generator, side = torch.Generator().manual_seed(0), question.pixels // 4
    coarse = torch.randn(question.batch, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic") / 2
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(-1, 1)


def compare(question: Question, paths: tuple[str, ...] = PATHS, tell: Callable[[str], None] = str) -> dict[str, Any]:
    """The paths in turn, `runs` times after one round that warms up (none for a single run)."""
    device = torch.device(question.device)
    with tempfile.TemporaryDirectory() as scratch:
        ways = Paths(question, paths, Path(scratch))
        rounds: dict[str, list[Clock]] = {path: [] for path in paths}
        results, rates = {}, []
        for number in range(question.runs + (question.runs > 1)):
            rates.append(ceiling(device, question.dtype))
            for path in paths:
                clock = Clock(device)
                results[path] = ways.run(path, clock)
                if number or question.runs == 1:
                    rounds[path].append(clock)
                tell(f"{path}: {clock.parts['total'].wall:.2f} s, {clock.parts['total'].cpu:.2f} CPU seconds")
        more = {path: ways.undivided(path) for path in paths} if device.type == "cuda" else {}
    best = {"wall": max(rate.wall for rate in rates), "cpu": max(rate.cpu for rate in rates)}
    measured: dict[str, Any] = {"question": asdict(question), "macs": ways.work, "ceiling_macs_per_second": best}
    measured["threads"] = torch.get_num_threads()
    for path in paths:
        measured[path] = summary(rounds[path], question, ways.work[path], best) | more.get(path, {})
    if len(paths) == 2:
        plain, fast = results["reference"].double(), results["ours"].double()
        measured["relative_difference"] = ((fast - plain).norm() / plain.norm()).item()
        measured["speed_ratio"] = {
            part: {kind: ratio(measured, part, kind) for kind in ("wall", "cpu")} for part in ("total", *PARTS)
        }
    return measured


def summary(clocks: list[Clock], question: Question, work: dict[str, int], best: dict[str, float]) -> dict[str, Any]:
    """Seconds per image of each part (a step: per evaluation), work done, share of the ceiling."""
    measured: dict[str, Any] = {}
    for part in ("total", *PARTS):
        if not clocks[0].calls.get(part):
            continue
        share = question.batch if part != "step" else question.batch * len(question.method.plan)
        measured[part] = {
            kind: spread([getattr(clock.parts[part], kind) / share for clock in clocks]) for kind in ("wall", "cpu")
        }
    for part in ("total", "encode", "step", "decode"):
        for kind in ("wall", "cpu"):
            seconds = measured[part][kind]["median"]
            measured[part][f"ceiling_{kind}"] = work[part] / seconds / best[kind] if seconds else None
    return measured


def ratio(measured: dict[str, Any], part: str, kind: str) -> float | None:
    """How many times as fast ours is."""
    if part not in measured["reference"] or part not in measured["ours"] or not measured["ours"][part][kind]["median"]:
        return None
    return measured["reference"][part][kind]["median"] / measured["ours"][part][kind]["median"]


def memory(question: Question, paths: tuple[str, ...] = PATHS) -> dict[str, float]:
    """Peak MB of each path above what a process has in use after imports, each in a process of its own."""
    return {path: apart(f"measuring the memory of '{path}'", peak_of, question=question, path=path) for path in paths}


def peak_of(question: Question, path: str) -> float:
    """MB used at most by building a path and restoring one batch, above what imports take."""
    import diffusers.models.controlnets.controlnet  # noqa: F401
    import transformers.models.clip.modeling_clip  # noqa: F401

    before = start_peak(question.device)
    with tempfile.TemporaryDirectory() as scratch:
        Paths(question, (path,), Path(scratch)).run(path, Clock(torch.device(question.device)))
    return (peak(question.device) - before) / MB
