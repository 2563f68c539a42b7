"""Reproduce the papers' ablations with the small model: train, restore, measure, compare.

  python scripts/study.py ccsr --photos PHOTOS --realsr REALSR                  one study, whole
  python scripts/study.py ccsr consissr --photos PHOTOS --realsr REALSR --train-only
  python scripts/study.py ccsr --photos PHOTOS --realsr REALSR --report-only    tables and pictures of what is there

Studies: configs/nano/studies. PHOTOS holds train/ and val/, REALSR holds LR/ and HR/. What is done is not done again,
and an interrupted training goes on from its checkpoint. Exit status: 0 all done, 1 something failed or is missing, 2 a
mistake.
"""

import argparse
import signal
import sys
from pathlib import Path

from consissr.errors import UserError, exit_status
from consissr.studies.run import Work, run_commands, stages
from consissr.studies.spec import available, load_study

SCRIPTS = Path(__file__).resolve().parent
NANO, TABLES = SCRIPTS.parent / "configs" / "nano", SCRIPTS.parent / "configs" / "tables"
STUDIES = NANO / "studies"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("studies", nargs="+", metavar="STUDY", help=", ".join(available(STUDIES)))
    add("-o", "--output", type=Path, default=Path("runs/studies"), metavar="DIR", help="%(default)s")
    add("--photos", type=Path, required=True, metavar="DIR", help="photographs: train/ to train on, val/ to degrade")
    add("--realsr", type=Path, required=True, metavar="DIR", help="real pairs: LR/ and HR/")
    add("--only", nargs="+", default=[], metavar="ROW", help="rows of the studies")
    add("--jobs", type=int, default=2, metavar="N", help="processes side by side (%(default)s)")
    part = made.add_mutually_exclusive_group()
    part.add_argument("--train-only", action="store_true", help="train and stop")
    part.add_argument("--report-only", action="store_true", help="neither train nor restore")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change every training (trials)")
    return made


def study(args: argparse.Namespace) -> int:
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: it must be at least 1")
    for folder in (args.photos / "train", args.photos / "val", args.realsr / "LR", args.realsr / "HR"):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: --photos holds train/ and val/, --realsr holds LR/ and HR/")
    places = {"out": args.output, "photos": args.photos, "realsr": args.realsr, "parents": NANO, "scripts": SCRIPTS}
    how = {name: path.resolve() for name, path in places.items()} | {"jobs": args.jobs, "lines": tuple(args.set)}
    chosen = {name: load_study(name, STUDIES) for name in dict.fromkeys(args.studies)}
    known = {row for one in chosen.values() for row in one.rows}
    if unknown := [row for row in args.only if row not in known]:
        raise UserError(f"--only {unknown[0]}: no study that was asked for has that row; known: {', '.join(known)}")
    problems = []
    for name, one in chosen.items():
        work, rows = Work(study=one, **how), [row for row in one.rows if not args.only or row in args.only]
        if not args.report_only:
            for commands in stages(work, rows, restoring=not args.train_only):
                problems += [f"failed: {name}: {text}" for name, text in run_commands(commands, args.jobs).items()]
        if not args.train_only:
            from consissr.studies.report import report

            problems += report(work, TABLES)
            print((work.out / name / "summary.md").read_text())
    sys.stderr.writelines(f"{line}\n" for line in problems)
    return 1 if problems else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the studies; returns the exit status."""
    args = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that children are ended, too
    return exit_status(lambda: study(args), "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
