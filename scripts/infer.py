"""Restore photographs: one file, several, a list, a pattern or a folder; or a film, where ffmpeg is installed.

  python scripts/infer.py -i photos -o results                 a folder, 4 times larger
  python scripts/infer.py -i a.png -o b.png -s 2.5             one file, 2.5 times larger
  torchrun --nproc_per_node 4 scripts/infer.py -i photos       a folder, shared by four processes

Results keep names, sub-folders, grey or colour, bit depth, transparency, colour profile and the way up. Use PNG where
metrics will be measured. Exit status: 0 all restored, 1 a file failed (the others are done), 2 nothing was begun.
"""

import argparse
import json
import logging
import os
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial

from rich.console import Console

import consissr
from consissr.errors import compile_errors_in_one_line, exit_status
from consissr.inference import film, jobs, processes
from consissr.inference.flags import MADE_WITH, PLAN_FLAGS, SETTINGS, check, given, parser, sampler_settings


def restore(args: argparse.Namespace) -> int:
    """Plan everything, then load the model, then restore."""
    check(args)
    # 1. which files, and under which names; every mistake that can show before the model loads shows here
    rank, local_rank, world = processes.numbers()
    sizes = {"scale": args.scale, "longest": args.longest_side}
    naming = jobs.Naming(output=args.output, suffix=args.suffix, ext=args.ext, repeat=args.repeat, **sizes)
    mine = jobs.plan(args.input, naming, args.recursive, args.skip_existing)[rank::world]
    missing, existing = jobs.drop_existing(mine, args.skip_existing, args.overwrite)
    plain = {"soft_wrap": True, "highlight": False, "emoji": False}  # names are told as they are
    out, err = Console(**plain), Console(stderr=True, **plain)
    if args.dry_run:
        out.print_json(json.dumps(vars(args), default=str))
        for job in missing:
            result = job.error or f"{job.target} ({job.out_width}x{job.out_height})"
            out.print(f"{job.source} -> {result}", markup=False)
        out.print(f"{len(missing)} to restore, {len(existing)} exist", markup=False)
        return 0

    # 2. the model
    quiet = args.quiet or rank > 0
    if err.is_terminal and not quiet and not all(job.error for job in missing):  # importing torch alone takes seconds
        err.print(f"loading {args.model} ...", markup=False)
    from consissr.inference import batch, progress

    made_with = sampler_settings(args) | given(args, MADE_WITH)
    settings = batch.Settings(**sizes, **given(args, SETTINGS), made_with=made_with)
    log, restorer = batch.open_log(args.json, vars(args), mine) if args.json else None, None
    if sizes := {(job.out_height, job.out_width) for job in missing if not job.error}:
        restorer = load(args, local_rank, one_size=len(sizes) == 1)
        missing = batch.memory_checked_again(missing, restorer.sampler)
        if (changes := given(args, PLAN_FLAGS)) or args.config:
            from ccsr.timesteps import changed_plan

            settings = replace(settings, plan=changed_plan(restorer.sampler, changes))

    # 3. the files
    remark = progress.overlooked(args.input, args.recursive, args.output)
    with progress.Terminal(err, len(missing), quiet, remark) as terminal:
        ran = {"precision": restorer.precision, "device": str(restorer.device)} if restorer else {}
        report = batch.Report(terminal.tell, terminal.on_tile, log, {"seed": args.seed} | ran)
        for job in existing:
            report.add(batch.Outcome(job, "skipped"))
        with compile_errors_in_one_line("leave out --compile"):
            batch.run(restorer, missing, settings, report)
    process = f"process {rank + 1} of {world}: " if world > 1 else ""
    if not args.quiet:
        with suppress(OSError, SystemExit):  # everything is written, whether or not this can be said
            out.print(process + terminal.summary(report.counts, restorer.precision if restorer else ""), markup=False)
    failed = report.counts["failed"] > 0
    processes.finish(failed, world)
    return 1 if failed else 0


def load(args: argparse.Namespace, local_rank: int, one_size: bool) -> "consissr.Restorer":
    """The model on its device, with the sampler's flags applied. one_size: whether all results have the same size."""
    from consissr.models import fast, memory

    memory.set_heap()
    fast.set_kernels(one_size)
    too_large = f"{args.model} does not fit into the free memory of --device {args.device}"
    with memory.out_of_memory_in_one_line(f"{too_large}: free some, or use another --device or --precision bf16"):
        device = processes.choose_device(args.device, local_rank)
        restorer = consissr.Restorer.load(args.model, device, args.precision, args.base, **sampler_settings(args))
    restorer.tiles(restorer.sampler, (4096, 4096), 1)  # tiles that cannot be are told once, not for each image
    if args.compile:
        restorer.compile(one_size)
    return restorer


def main(arguments: list[str] | None = None) -> int:
    """Parse, restore; one line and exit status 2 for a mistake in the call."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Its warnings are about code, not about images; and what Apple's GPUs cannot compute the CPU may.
    os.environ.update({"DIFFUSERS_VERBOSITY": "error", "PYTORCH_ENABLE_MPS_FALLBACK": "1"} | os.environ)
    args = parser(__doc__).parse_args(arguments)
    work = partial(film.restored, args, restore) if film.is_film(args.input) else partial(restore, args)
    return exit_status(work, "what is written is whole, and --skip-existing continues")


if __name__ == "__main__":
    sys.exit(main())
