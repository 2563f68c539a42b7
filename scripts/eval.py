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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from consissr.errors import UserError
from consissr.evaluation import check as checks
from consissr.evaluation import evaluate, folders, output, produce, protocols, tables
from consissr.evaluation.commandline import parse_box, parser
from consissr.weights.files import find_model

ROOT = Path(__file__).resolve().parent.parent
TABLES, INFER = ROOT / "configs" / "tables", ROOT / "scripts" / "infer.py"


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that moves a bar on the terminal."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("scoring", total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def measure(args: argparse.Namespace, results: dict, metrics: list[str], protocol: str) -> evaluate.Evaluation:
    """Pair, score, write every output file."""
    choice = protocols.get_measures(metrics), protocols.get_protocol(protocol)
    pairs, cache = folders.pair(results, args.hr, args.lr), args.output / "scores.jsonl"
    with progress_bar() as progress:
        done = evaluate.evaluate(pairs, *choice, cache, args.weights, args.device, args.jobs, progress)
    files = output.write_all(done, args.output, args.report_images)
    print(f"wrote {', '.join(file.name for file in files)} to {args.output}", file=sys.stderr)
    return done


def evaluate_folders(args: argparse.Namespace) -> None:
    if not args.sr:
        raise UserError("nothing to evaluate: give result folders with --sr (or --table, --check, --list-weights)")
    metrics = (args.metrics or ("psnr,ssim,niqe" if args.hr else "niqe")).split(",")
    print(output.markdown(measure(args, folders.parse_methods(args.sr), metrics, args.protocol or "ccsr")))


def print_table(args: argparse.Namespace) -> None:
    table, results = tables.load_table(args.table, TABLES), folders.parse_methods(args.sr)
    if table.kind == "figure":
        from consissr.evaluation import figures

        print("\n".join(map(str, figures.draw(table, results, args, parse_box(args.box)))))
        return
    dataset, measured, notes = table.dataset(args.dataset), {}, []
    if table.kind == "complexity":
        from consissr.evaluation import complexity

        text = complexity.comparison(table, dataset, produce.timer(table, args.run, INFER))
    else:
        if results := results | produce.ours(table, args, INFER, find_model):
            metrics = args.metrics.split(",") if args.metrics else table.metrics
            done = measure(args, results, metrics, args.protocol or table.protocol)
            measured, notes = tables.measured_cells(done, table), tables.run_notes(done, table)
        text = tables.comparison(table, dataset, measured, notes)
    output.write_text(args.output / f"{args.table.replace('/', '_')}.md", text)
    print(text)


def check(args: argparse.Namespace) -> None:
    if not (args.hr and args.lr):
        raise UserError("--check compares with --hr and builds its baselines from --lr: give both folders")
    results, wrong = folders.parse_methods(args.sr), folders.parse_methods(args.wrong_condition)
    with progress_bar() as progress:
        rows = checks.check(results, args.hr, args.lr, args.output, wrong, args.jobs, progress)
    output.write_text(args.output / "check.md", checks.as_text(rows) + "\n")
    print(checks.as_text(rows))


def main(arguments: list[str] | None = None) -> int:
    """Parse, do what was asked; one line per mistake and exit status 2."""
    args = parser(__doc__).parse_args(arguments)
    try:
        if args.output.is_file():
            raise UserError(f"--output {args.output} is a file: name a folder")
        if args.list_tables or args.list_weights or args.check_dataset:
            from consissr.evaluation import listings

            print(listings.text(args, TABLES))
        elif args.table:
            print_table(args)
        else:
            (check if args.check else evaluate_folders)(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
