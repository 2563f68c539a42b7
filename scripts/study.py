"""Reproduce the papers' ablations with the small model: train, restore, measure, compare.

  python scripts/study.py consissr_table4 --photos PHOTOS --realsr REALSR       one study, whole
  python scripts/study.py all --photos PHOTOS --train-only --jobs 2             every study's models
  python scripts/study.py all --report-only                                     tables and pictures of what is there

Studies: configs/nano/studies. PHOTOS holds train/ and val/, REALSR holds LR/ and HR/. What is done is not done again,
and an interrupted training goes on from its checkpoint. Exit status: 0 all done, 1 something failed or is missing, 2 a
mistake.
"""

import argparse
import signal
import sys
from pathlib import Path

from consissr.errors import UserError
from consissr.evaluation.children import run_with_progress
from consissr.studies.run import Setting, data_jobs, restoring_jobs, training_jobs
from consissr.studies.spec import Plan, available

ROOT = Path(__file__).resolve().parent.parent
STUDIES, TABLES = ROOT / "configs" / "nano" / "studies", ROOT / "configs" / "tables"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("studies", nargs="+", metavar="STUDY", help=f"all, {', '.join(available(STUDIES))}")
    add("-o", "--output", type=Path, default=Path("runs/studies"), metavar="DIR", help="%(default)s")
    add("--photos", type=Path, metavar="DIR", help="photographs: train/ to train on, val/ to degrade and restore")
    add("--realsr", type=Path, metavar="DIR", help="real pairs: LR/ and HR/")
    add("--only", nargs="+", default=[], metavar="ROW", help="rows of the studies, by name or study/name")
    add("--jobs", type=int, default=2, metavar="N", help="processes side by side (%(default)s)")
    add("--repeats", type=int, metavar="N", help="noise seeds per image (10); more can be added later")
    part = made.add_mutually_exclusive_group()
    part.add_argument("--train-only", action="store_true", help="train and stop")
    part.add_argument("--report-only", action="store_true", help="neither train nor restore")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change every training (trials; use another -o)")
    add("--tables", type=Path, metavar="DIR", help="also write the results as data, e.g. to configs/tables/nano")
    return made


def bf16_is_fast() -> bool:
    """Whether the device that infer.py will choose computes bfloat16 fast."""
    import torch

    from consissr.inference.batch import choose_device
    from consissr.training.precision import fast_bf16

    return fast_bf16(torch.device(choose_device("auto")))


def study(args: argparse.Namespace) -> int:
    plan = Plan(STUDIES, args.output, args.repeats)
    names = available(STUDIES) if "all" in args.studies else list(dict.fromkeys(args.studies))
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: it must be at least 1")
    plan.check_only(names, args.only)
    rows = {name: plan.chosen(name, args.only) for name in names}
    restoring = not (args.train_only or args.report_only)
    setting = Setting(plan=plan, scripts=ROOT / "scripts", jobs=args.jobs, photos=args.photos, realsr=args.realsr,
                      fast_bf16=restoring and bf16_is_fast(), overrides=args.set)  # fmt: skip
    failed: dict[str, str] = {}
    if not args.report_only:
        trainings = {k: t for name in names for k, t in plan.trainings(name, args.only).items()}
        jobs = training_jobs(setting, trainings)
        if restoring:
            jobs = data_jobs(setting) + jobs
            known = [job.name for job in jobs]
            each = [job for name in names for job in restoring_jobs(setting, name, rows[name], known)]
            jobs += {job.name: job for job in each}.values()
        failed = run_with_progress(jobs, args.jobs)
    missing = []
    if not args.train_only:
        from consissr.studies.report import report

        for name in names:
            missing += report(setting, name, TABLES, args.tables)
            print((args.output / name / "summary.md").read_text())
    for line in [*(f"failed: {name}: {text}" for name, text in failed.items()), *missing]:
        print(line, file=sys.stderr)
    return 1 if failed or missing else 0


def main(arguments: list[str] | None = None) -> int:
    """Parse, do what was asked; one line per mistake and exit status 2."""
    args = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that children are ended, too
    try:
        return study(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
