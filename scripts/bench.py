"""Measure speed and memory: `python scripts/bench.py inference` (more sub-commands: --help)."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from consissr.bench import report
from consissr.bench.commandline import check, parser
from consissr.errors import exit_status


def inference(args: argparse.Namespace) -> tuple[Any, Iterable]:
    """Restoring images beside a plain reference written with stock diffusers components"""
    from ccsr.methods import method
    from consissr.bench.inference import Question, compare, memory

    wanted = {name: vars(args)[name] for name in ("size", "pixels", "batch", "runs", "device", "precision", "compile")}
    question = Question(method=method(args.method, args.steps), **wanted)
    measured = compare(question, tuple(args.paths), lambda line: print(line, file=sys.stderr))
    if args.memory:
        measured["memory_mb"] = memory(question, tuple(args.paths))
    return measured, report.inference(measured)


def tiles(args: argparse.Namespace) -> tuple[Any, Iterable]:
    """CPU seconds and memory per megapixel of results from small to very large"""
    from consissr.bench.tiles import table

    where = {"device": args.device, "precision": args.precision}
    rows = table(args.model, args.megapixels, where, args.scale)
    return rows, [report.plain(rows, f"{args.model}, {args.scale:g} times larger")]


def fidelity(args: argparse.Namespace) -> tuple[Any, Iterable]:
    """PSNR against NIQE along the fidelity dial, and a strip of pictures"""
    from consissr.bench.fidelity import curve

    rows = [asdict(point) for point in curve(args.model, args.lr, args.hr, args.values, args.images, args.strip)]
    return rows, [report.plain(rows, f"{args.model}: PSNR (dB) and NIQE by --fidelity")]


def training(args: argparse.Namespace) -> tuple[Any, Iterable]:
    """Images per second of training's data path alone"""
    from consissr.bench.feeding import measure

    rows = measure(args.data, args.set, args.workers, args.images)
    return rows, [report.plain(rows, "images per second")]


def sizes(args: argparse.Namespace) -> tuple[Any, Iterable]:
    """Parameters and multiply-accumulates at SD2.1's size"""
    from consissr.bench.sizes import rows

    title = "512x512 pixels, MACs of convolutions and linear layers, and with attention"
    return (measured := rows()), [report.plain(measured, title)]


def degradation(args: argparse.Namespace) -> tuple[Any, Iterable]:
    """Training's data path beside basicsr's own"""
    from consissr.bench.data import compare
    from consissr.data.settings import preset

    rows = [vars(s) | {"images_per_second": s.rate} for s in compare(preset(args.preset), args.images, args.input)]
    return rows, report.degradation(rows, args.preset)


def gpu(args: argparse.Namespace) -> tuple[Any, Iterable]:
    """A GPU in a few minutes, most valuable first (rehearsal: --size tiny --device cpu)"""
    from ccsr.methods import method, stages
    from consissr.bench.gpu import measure
    from consissr.bench.gpu_tasks import tasks

    trained = stages(Path(__file__).parents[1] / "configs")
    if args.counts:
        from consissr.bench.launches import rows

        measured = rows(args.size, method("ccsr-1", 1), trained)
        return measured, [
            report.plain(measured, "operations that a GPU is given, and times that the host waits for it")
        ]
    listed = tasks(args.size, args.device, method, trained)
    return measure(listed, args.minutes, args.json, lambda line: print(line, flush=True)), []


def main(arguments: list[str] | None = None) -> int:
    measurements = (inference, gpu, tiles, fidelity, training, sizes, degradation)
    commands = {function.__name__.replace("_", "-"): function for function in measurements}
    args = parser(__doc__, commands).parse_args(arguments)

    def bench() -> int:
        check(args)
        measured, shown = args.run(args)
        report.show(shown, measured, args.json)
        return 0

    return exit_status(bench, "nothing is kept of a measurement that was stopped")


if __name__ == "__main__":
    sys.exit(main())
