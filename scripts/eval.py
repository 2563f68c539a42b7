"""Evaluate folders of restored images: metrics, stability, the papers' tables and figures.

  python scripts/eval.py --sr results --hr HR --protocol ccsr -o evaluation
  python scripts/eval.py --sr A=dirA B=dirB --hr HR --lr LR --metrics psnr,ssim,lpips,niqe
  python scripts/eval.py --table ccsr/table6 --dataset RealSR --hr HR --lr LR --sr OSEDiff-S1=dir --run nano-ccsr
  python scripts/eval.py --check --sr results --hr HR --lr LR

Writes per_image.csv, summary.json, table.md, table.tex, report.html and summary.svg into the output folder. Scores are
kept in scores.jsonl there, so an interrupted or repeated evaluation computes only what is new. Exit status: 1 when a
metric that --metrics asks for was not computed, 2 for a mistake.
"""

import argparse
import sys
from pathlib import Path

from consissr.errors import UserError
from consissr.evaluation import check as checks
from consissr.evaluation import figures, folders, listings, output, produce, protocols, summary, tables
from consissr.evaluation.commandline import parse_box, parser
from consissr.evaluation.evaluate import Evaluation, evaluate
from consissr.evaluation.progress import progress
from consissr.weights.find import BUNDLED, find_model

ROOT = Path(__file__).resolve().parent.parent
TABLES, INFER = ROOT / "configs" / "tables", ROOT / "scripts" / "infer.py"


def measure(args: argparse.Namespace, results: dict, metrics: list[str], protocol: str, small=()) -> Evaluation:
    """Pair, score, write every output file. small: rows of models of another size than the others'."""
    choice = protocols.get_measures(metrics), protocols.get_protocol(protocol)
    pairs = folders.pair(results, args.hr, args.lr, {*args.unranked, *small})
    how = {"weights": args.weights, "device": args.device, "jobs": args.jobs, "small_fid": args.small_fid}
    with progress("scoring") as tell:
        done = evaluate(pairs, *choice, args.output / "scores.jsonl", progress=tell, **how)
    files = output.write_all(done, args.output, args.report_images)
    sys.stderr.write(f"wrote {', '.join(file.name for file in files)} to {args.output}\n")
    return done


def status(problems: list[str]) -> int:
    """Say what is missing; the exit status that tells it."""
    sys.stderr.writelines(f"{line}\n" for line in problems)
    return 1 if problems else 0


def evaluate_folders(args: argparse.Namespace) -> int:
    if not args.sr:
        raise UserError("nothing to evaluate: give result folders with --sr (or --table, --check, --list-weights)")
    metrics = (args.metrics or ("psnr,ssim,niqe" if args.hr else "niqe")).split(",")
    done = measure(args, folders.parse_methods(args.sr), metrics, args.protocol or "ccsr")
    print(output.markdown(done))
    return status(summary.lacking(done, args.metrics))


def print_table(args: argparse.Namespace) -> int:
    table, results = tables.load_table(args.table, TABLES), folders.parse_methods(args.sr)
    if table.kind == "figure":
        print("\n".join(map(str, figures.draw(table, results, args, parse_box(args.box)))))
        return 0
    dataset, measured, notes, lacking = table.dataset(args.dataset), {}, [], []
    if table.kind == "complexity":
        from consissr.evaluation import complexity

        text = complexity.comparison(table, dataset, produce.timer(table, args.run, INFER))
    else:
        if results := results | produce.ours(table, args, INFER, find_model):
            metrics = args.metrics.split(",") if args.metrics else list(table.metrics)
            small = [row for row, model in produce.plan(table, args.run).items() if model in BUNDLED]
            metrics += ["st-lpips"] * bool(small)  # PSNR, SSIM and NIQE flatter a model that draws little
            done = measure(args, results, metrics, args.protocol or table.protocol, small)
            measured, lacking = tables.measured_cells(done, table), summary.lacking(done, args.metrics)
            notes = tables.measured_notes(done, table, dataset, args.hr)
        text = tables.comparison(table, dataset, measured, notes)
    output.write_text(args.output / f"{args.table.replace('/', '_')}.md", text)
    print(text)
    return status(lacking)


def check(args: argparse.Namespace) -> int:
    if not (args.hr and args.lr):
        raise UserError("--check compares with --hr and builds its baselines from --lr: give both folders")
    results, wrong = folders.parse_methods(args.sr), folders.parse_methods(args.wrong_condition)
    with progress("scoring") as tell:
        rows = checks.check(results, args.hr, args.lr, args.output, wrong, args.jobs, tell)
    output.write_text(args.output / "check.md", checks.as_text(rows) + "\n")
    print(checks.as_text(rows))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parse, do what was asked; one line per mistake and exit status 2."""
    args = parser(__doc__).parse_args(arguments)
    try:
        if args.output.is_file():
            raise UserError(f"--output {args.output} is a file: name a folder")
        if args.list_tables or args.list_weights or args.check_dataset:
            print(listings.text(args, TABLES))
            return 0
        return (print_table if args.table else check if args.check else evaluate_folders)(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
