"""What `scripts/bench.py gpu` measures, most valuable first: does it agree, how fast is restoring, how fast training.

Networks have SD2.1's sizes and random weights, made on the device (nothing is downloaded); 'tiny' takes the bundled
models' sizes instead, for a rehearsal on any machine.
"""

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from consissr.bench import gpu_training
from consissr.bench.clock import Clock, ceiling
from consissr.bench.gpu import Task
from consissr.bench.inference import Question, compare, pictures
from consissr.bench.models import SD21, SamplingMethod, build
from consissr.bench.process import MB, peak, start_peak
from consissr.images import codec
from consissr.inference import batch, jobs
from consissr.models.fast import set_kernels
from consissr.restorer import Restorer

BUNDLED = ("nano-ccsr", "nano-consissr")
LEVELS = 127.5
"""8-bit levels per unit of [-1, 1]."""


def tasks(size: str, device: str, methods: Callable[[str, int], SamplingMethod], stages: dict[str, Any]) -> list[Task]:
    """All tasks in their order. methods: (name, steps) -> how it samples; stages: (config file, class) by name."""
    tiny = size == "tiny"
    pixels, steps, count = (64, 2, 8) if tiny else (512, 50, 64)

    def question(name: str, steps: int = steps, **more: Any) -> Question:
        method = methods(name, steps)
        where = BUNDLED[method.networks == "consissr"] if tiny else SD21
        given = {"size": where, "pixels": pixels, "runs": 2 if tiny else 4, "device": device, "precision": "bf16"}
        return Question(method=method, **given | more)

    def took(seconds: float) -> float:
        return min(seconds, 10) if tiny else seconds

    ccsr = [question(name) for name in ("ccsr-1", "ccsr-2")]
    guided = question("consissr")
    listed = [Task("machine", took(15), machine, {"device": device})]
    listed += [Task(f"agreement of {m}", took(20), agreement, {"model": m, "device": device}) for m in BUNDLED]
    for asked in (*ccsr, question("consissr", 4)):
        listed.append(Task(f"bf16 beside fp32, {asked.method.name}", took(20), precisions, {"question": asked}))
    listed.append(Task("tests", 60, tests, {"device": device}))
    for asked in (*ccsr, guided):
        listed.append(Task(f"one image, {asked.method.name}", took(30), one_image, {"question": asked}))
    big = replace(ccsr[0], pixels=4 * pixels)
    listed.append(Task("in tiles, ccsr-1", took(20), in_tiles, {"question": big, "tile": pixels}))
    folders = {"question": ccsr[0], "count": count}
    listed.append(Task("folder, ccsr-1", took(40), folder, folders | {"batches": [1, 8]}))
    compiled = [replace(asked, compile=True) for asked in (*ccsr, guided)]
    trainings = []
    for name, (config, builder) in stages.items():
        words = gpu_training.TINY if tiny else []
        given = {"config": config, "builder": builder, "words": words, "device": device}
        trainings.append(Task(f"training, {name}", took(60), gpu_training.stage, given))
    listed += trainings[:2]
    listed.append(Task("one image, compiled, ccsr-1", 10 * took(15), one_image, {"question": compiled[0]}))
    listed.append(Task("folder, compiled, ccsr-1", 10 * took(15), folder, folders | {"question": compiled[0]}))
    listed += trainings[2:]
    for asked in compiled[1:]:
        name = f"one image, compiled, {asked.method.name}"
        listed.append(Task(name, 10 * took(15), one_image, {"question": asked}))
    return listed


def machine(device: str) -> dict[str, Any]:
    """What was measured on, and its ceilings."""
    place = torch.device(device)
    side = 8192 if place.type == "cuda" else 512
    rates = {name: 2e-12 * ceiling(place, kind).wall for name, kind in
             (("bf16 product, TFLOP/s", torch.bfloat16), ("fp32 product, TFLOP/s", torch.float32))}  # fmt: skip
    there, here = torch.zeros(side, side, device=place), torch.zeros(side, side)
    here = here.pin_memory() if place.type == "cuda" else here
    copies = {"copy on the device, GB/s": (there.clone(), there, 2), "copy to the device, GB/s": (there, here, 1)}
    for name, (target, source, passes) in copies.items():
        clocks = [Clock(place) for _ in range(4)]
        for clock in clocks:
            with clock.part("copy"):
                target.copy_(source, non_blocking=True)
        seconds = min(clock.parts["copy"].wall for clock in clocks[1:])
        rates[name] = 1e-9 * passes * source.numel() * source.itemsize / max(seconds, 1e-9)
    card = torch.cuda.get_device_properties(place) if place.type == "cuda" else None
    return {
        "card": card.name if card else platform.processor() or platform.machine(),
        "memory, GB": card.total_memory / 2**30 if card else None,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        **rates,
    }


def agreement(model: str, device: str) -> dict[str, Any]:
    """A bundled model's result on the device beside the CPU's, in 8-bit levels, pixels included."""
    set_kernels(one_size=False)
    lq = pictures(Question(model, None, pixels=256))
    exact = Restorer.load(model, "cpu", "fp32")(lq)
    figures = {}
    for precision in ("fp32", "bf16"):
        off = LEVELS * (Restorer.load(model, device, precision)(lq) - exact).abs()
        figures[f"{precision}, levels off at most"] = off.max().item()
        figures[f"{precision}, levels off in the mean"] = off.mean().item()
    return figures


def precisions(question: Question) -> dict[str, Any]:
    """The same weights and the same noise in fp32 and in the question's precision."""
    set_kernels(one_size=False)
    device = torch.device(question.device)
    networks, config = build(question.size, question.method, device, torch.float32, keep_text=False)
    lq, plan, results = pictures(question), question.method.plan, []
    for dtype in (torch.float32, question.dtype):
        results.append(replace(networks, dtype=dtype).restorer(config)(lq, plan=plan).double())
    exact, rounded = results
    return {
        "relative difference": ((rounded - exact).norm() / exact.norm()).item(),
        "levels off at most": LEVELS * (rounded - exact).abs().max().item(),
        "levels off in the mean": LEVELS * (rounded - exact).abs().mean().item(),
    }


def tests(device: str) -> dict[str, Any]:
    """The repository's own tests of GPUs."""
    root = Path(__file__).parents[2]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if device.startswith("cuda") else ""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": shown}
    call = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    done = subprocess.run(call, cwd=root, env=environment, capture_output=True, text=True, timeout=240, check=False)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    failed = [line for line in lines if re.match("FAILED|ERROR", line)]
    if done.returncode:
        raise RuntimeError("; ".join([lines[-1], *failed]))
    return {"result": lines[-1]}


def one_image(question: Question) -> dict[str, Any]:
    """Ours beside the plain reference, from an image in memory to a written file."""
    set_kernels(one_size=True)
    paths = ("ours",) if question.compile else ("reference", "ours")  # the reference was measured uncompiled
    measured = compare(question, paths)
    seconds = {path: measured[path].get("undivided", measured[path]["total"]["wall"])["median"] for path in paths}
    figures = {"seconds": seconds["ours"]}
    if "reference" in paths:
        figures["times as fast as the reference"] = seconds["reference"] / seconds["ours"]
        figures["relative difference"] = measured["relative_difference"]
    for name in ("prepare", "encode", "step", "decode", "colour", "write"):
        if name in measured["ours"]:
            figures[f"{name}, seconds"] = measured["ours"][name]["wall"]["median"]
    figures["share of the ceiling"] = measured["ours"]["total"]["ceiling_wall"]
    figures |= {f"{p}, working memory, MB": measured[p]["working_mb"] for p in paths if "working_mb" in measured[p]}
    return figures | {"all": measured}


def restorer_of(question: Question) -> Restorer:
    """Our path, as the question has it."""
    set_kernels(one_size=True)
    networks, config = build(question.size, question.method, torch.device(question.device), question.dtype, False)
    restorer = networks.restorer(config)
    if question.compile:
        restorer.compile(one_size=True)
    return restorer


def folder(question: Question, count: int, batches: list[int] | None = None) -> dict[str, Any]:
    """Images per second of a folder of `count` files, read and written, as `scripts/infer.py` does it."""
    restorer, figures = restorer_of(question), {}
    with tempfile.TemporaryDirectory() as scratch:
        (inputs := Path(scratch) / "in").mkdir()
        for i, image in enumerate(pictures(replace(question, batch=count))):
            codec.write(inputs / f"{i:03}.png", codec.Photo(image, None, codec.Form()))
        for size in batches or [8]:
            for number in range(2):  # the first warms up
                output = Path(scratch) / f"out{size}-{number}"
                listed = jobs.plan([str(inputs)], jobs.Naming(output=output))
                settings = batch.Settings(batch_size=size, plan=question.method.plan)
                report, clock = batch.Report(), Clock(restorer.device)
                with clock.part("folder"):
                    batch.run(restorer, listed, settings, report)
            if report.counts["done"] != count:
                raise RuntimeError(f"only {report.counts['done']} of {count} images were restored")
            figures[f"images/s, {size} at once"] = count / clock.parts["folder"].wall
    return figures


def in_tiles(question: Question, tile: int) -> dict[str, Any]:
    """A large image in tiles beside an image of one tile: seconds and memory."""
    restorer, plan, figures = restorer_of(question), question.method.plan, {}
    loaded = sum(p.numel() * p.itemsize for network in restorer.networks() for p in network.parameters())
    for side in (tile, question.pixels):
        lq = pictures(replace(question, pixels=side))
        for _ in range(2):
            before, clock = start_peak(question.device), Clock(restorer.device)
            with clock.part("image"):
                restorer(lq, plan=plan, tile=tile, vae_tile=tile)
        figures[f"{side} px, seconds"] = clock.parts["image"].wall
        figures[f"{side} px, MB with the weights"] = (peak(question.device) - before + loaded) / MB
    small, large = (figures[f"{side} px, MB with the weights"] for side in (tile, question.pixels))
    return figures | {"memory ratio": large / small}
