"""Evaluate folders of restored images: metrics, stability, the papers' tables and figures.

  python scripts/eval.py --sr results B=dirB --hr HR --lr LR --metrics psnr,ssim,st-lpips --protocol ccsr -o evaluation
  python scripts/eval.py --table ccsr/table6 --dataset RealSR --hr HR --lr LR --sr OSEDiff-S1=dir --run nano-ccsr
  python scripts/eval.py --check --sr OSEDiff=osediff --run nano-ccsr --hr HR --lr LR

Writes per_image.csv, summary.json, table.md, table.tex, report.html and summary.svg into the output folder. Scores are
kept in scores.jsonl there, so an interrupted or repeated evaluation computes only what is new. Exit status: 1 when a
metric that --metrics asks for was not computed (2 when none was), 2 for a mistake.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from consissr.errors import UserError, exit_status
from consissr.evaluation import check as checks
from consissr.evaluation import complexity, figures, folders, listings, output, produce, protocols, summary, tables
from consissr.evaluation.commandline import check_flags, parse_box, parser, refuse
from consissr.evaluation.evaluate import Evaluation, evaluate
from consissr.weights.find import BUNDLED, places

TABLES, INFER = (Path(__file__).resolve().parents[1] / place for place in ("configs/tables", "scripts/infer.py"))


def measure(args: argparse.Namespace, results: dict, metrics: list[str], protocol: str, small=()) -> Evaluation:
    """Pair, score, write every output file. small: rows of models of another size than the others'."""
    choice = protocols.get_measures(metrics), protocols.get_protocol(protocol), args.output / "scores.jsonl"
    pairs = folders.pair(results, args.hr, args.lr, {*args.unranked, *small})
    done = evaluate(pairs, *choice, args.weights, args.device, args.jobs, args.small_fid)
    files = output.write_all(done, args.output, args.report_images)
    sys.stderr.write(f"wrote {', '.join(file.name for file in files)} to {args.output}\n")
    return done


def tell_lacking(done: Evaluation, asked: str | None) -> int:
    """Say which metrics of --metrics are missing; the exit status that tells it."""
    problems = summary.lacking(done, (asked or "").split(","))
    sys.stderr.writelines(f"{line}\n" for line in problems)
    return 1 if problems else 0


def evaluate_folders(args: argparse.Namespace) -> int:
    if not (args.sr or args.run):
        raise UserError("nothing to evaluate: give result folders with --sr or models with --run (or --table)")
    metrics = (args.metrics or ("psnr,ssim,niqe" if args.hr else "niqe")).split(",")
    results, small = produce.results_of(args, None, INFER, places, BUNDLED)
    done = measure(args, results, metrics, args.protocol or "ccsr", small)
    print(output.markdown(done))
    return tell_lacking(done, args.metrics)


def print_table(args: argparse.Namespace) -> int:
    table = tables.load_table(args.table, TABLES)
    if table.kind == "figure":
        args.repeat, box = args.repeat or table.runs, parse_box(args.box)
        results, _ = produce.results_of(args, None, INFER, places, paired=table.figure != "steps")
        print("\n".join(map(str, figures.draw(table, results, args, box))))
        return 0
    dataset, status = table.dataset(args.dataset), 0
    if table.kind == "complexity":
        refuse(args, f"--table {args.table}", "sr", "repeat", *["run"] * ("seconds" not in table.metrics))
        text = complexity.comparison(table, dataset, produce.timings(table, args, INFER))
    elif args.sr or args.run:
        metrics = args.metrics.split(",") if args.metrics else list(table.metrics)
        results, small = produce.results_of(args, table, INFER, places, BUNDLED)
        metrics += ["st-lpips"] * bool(small)  # PSNR, SSIM and NIQE flatter a model that draws little
        done = measure(args, results, metrics, args.protocol or table.protocol, small)
        cells, notes = summary.measured_cells(done, table.metrics), summary.table_notes(done, table, dataset, args.hr)
        wider = replace(table, metrics=list(dict.fromkeys(table.metrics + metrics)))
        text = tables.comparison(wider, dataset, cells, notes)
        status = tell_lacking(done, args.metrics)
    else:
        text = tables.comparison(table, dataset, {})
    output.write_text(args.output / f"{args.table.replace('/', '_')}.md", text)
    print(text)
    return status


def check(args: argparse.Namespace) -> int:
    if not (args.hr and args.lr):
        raise UserError("--check compares with --hr and builds its baselines from --lr: give both folders")
    wrong = folders.parse_methods(args.wrong_condition)
    checks.check_names({**folders.parse_methods(args.sr), **produce.models_by_row(None, args.run)}, wrong, args.hr)
    checks.scale_between(args.lr, args.hr)  # pairs that the check refuses, before models run
    results, _ = produce.results_of(args, None, INFER, places)
    rows = checks.check(results, args.hr, args.lr, args.output, wrong, args.jobs)
    output.write_text(args.output / "check.md", checks.as_text(rows) + "\n")
    print(checks.as_text(rows))
    return 0


def evaluation(args: argparse.Namespace) -> int:
    check_flags(args)
    protocols.get_measures((args.metrics or "psnr").split(",")), protocols.get_protocol(args.protocol or "ccsr")
    if args.list_tables or args.list_weights or args.check_dataset:
        print(listings.text(args, TABLES))
        return 0
    return (print_table if args.table else check if args.check else evaluate_folders)(args)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate; returns the exit status."""
    args = parser(__doc__).parse_args(arguments)
    return exit_status(lambda: evaluation(args))


if __name__ == "__main__":
    sys.exit(main())
