"""Evaluate folders of restored images: metrics, stability, the papers' tables and figures.

  python scripts/eval.py --sr results --hr HR --protocol ccsr -o evaluation
  python scripts/eval.py --sr A=dirA B=dirB --hr HR --lr LR --metrics psnr,ssim,lpips,niqe
  python scripts/eval.py --table ccsr/table6 --dataset RealSR --hr HR --lr LR --sr OSEDiff-S1=dir --run nano-ccsr
  python scripts/eval.py --check --sr results --hr HR --lr LR

Writes per_image.csv, summary.json, table.md, table.tex and report.html into the output folder. Scores are kept in
scores.jsonl there, so an interrupted or repeated evaluation computes only what is new. Exit status 2 for a mistake.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from consissr.errors import UserError
from consissr.evaluation.commandline import parse_box, parser

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "configs" / "tables"


def measure(args: argparse.Namespace, results: dict[str, Path], metrics: list[str], protocol: str):
    """Pair, score with a progress bar, write every output; the evaluation."""
    from consissr.evaluation import evaluate, folders, output, protocols

    measures, convention = protocols.get_measures(metrics), protocols.get_protocol(protocol)
    pairs = folders.pair(results, args.hr, args.lr)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("scoring", total=None)
        done = evaluate.evaluate(
            pairs, measures, convention, args.output / "scores.jsonl", args.weights, args.device, args.jobs,
            lambda count, total: progress.update(bar, completed=count, total=total),
        )  # fmt: skip
    files = output.write_all(done, args.output, args.report_images)
    print(f"wrote {', '.join(file.name for file in files)} to {args.output}", file=sys.stderr)
    return done


def evaluate_folders(args: argparse.Namespace) -> None:
    from consissr.evaluation import output
    from consissr.evaluation.folders import parse_methods

    if not args.sr:
        raise UserError("nothing to evaluate: give result folders with --sr (or --table, --check, --list-weights)")
    metrics = (args.metrics or ("psnr,ssim,niqe" if args.hr else "niqe")).split(",")
    print(output.markdown(measure(args, parse_methods(args.sr), metrics, args.protocol or "ccsr")))


def print_table(args: argparse.Namespace) -> None:
    from consissr.evaluation import output, produce, tables
    from consissr.evaluation.folders import parse_methods

    table = tables.load_table(args.table, TABLES)
    if table.kind == "figure":
        from consissr.evaluation import figures

        for path in figures.draw(table, parse_methods(args.sr), args, parse_box(args.box)):
            print(path)
        return
    dataset, measured = table.dataset(args.dataset), {}
    if table.kind == "complexity":
        from consissr.evaluation import complexity

        measured = complexity.measured_rows(table, args.run[0] if args.run else None)
    else:
        results = parse_methods(args.sr)
        if args.run:
            if args.lr is None:
                raise UserError("--run restores the images of --lr: give that folder")
            repeat, script = args.repeat or table.runs, ROOT / "scripts" / "infer.py"
            models = produce.plan(table, args.run)
            results |= produce.produce(table, models, args.lr, args.output, script, repeat, args.infer_flags.split())
        if results:
            metrics = args.metrics.split(",") if args.metrics else table.metrics
            evaluation = measure(args, results, metrics, args.protocol or table.protocol)
            measured = tables.measured_cells(evaluation, table)
    text = tables.comparison(table, dataset, measured)
    output.write_text(args.output / f"{args.table.replace('/', '_')}.md", text)
    print(text)


def check(args: argparse.Namespace) -> None:
    from consissr.evaluation import check as checks
    from consissr.evaluation.folders import parse_methods

    if not (args.hr and args.lr):
        raise UserError("--check compares with --hr and builds its baselines from --lr: give both folders")
    rows = checks.check(parse_methods(args.sr), args.hr, args.lr, args.output, parse_methods(args.wrong_condition))
    print(checks.as_text(rows))


def main(arguments: list[str] | None = None) -> int:
    """Parse, do what was asked; one line per mistake and exit status 2."""
    args = parser(__doc__).parse_args(arguments)
    try:
        if args.list_tables or args.list_weights or args.check_dataset:
            from consissr.evaluation import listings

            print(listings.text(args, TABLES))
        elif args.table:
            print_table(args)
        else:
            (check if args.check else evaluate_folders)(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
