"""What scripts/eval.py can tell without evaluating: tables, weights, and whether a test set is complete."""

import argparse
from pathlib import Path

from consissr.errors import UserError
from consissr.evaluation.datasets import TEST_SETS, check_test_set
from consissr.evaluation.tables import available, load_table


def text(args: argparse.Namespace, tables: Path) -> str:
    """The listing that was asked for."""
    if args.list_tables:
        return "\n".join(f"{name:20} {load_table(name, tables).title}" for name in available(tables))
    if args.list_weights:
        return weights_text(args.weights)
    test_set = TEST_SETS.get(args.check_dataset)
    problems = check_test_set(args.check_dataset, args.hr, args.lr)
    if problems:
        raise UserError("\n".join([*problems, f"{test_set.name} comes from {test_set.source}"]))
    return f"{test_set.name} is complete: {test_set.count} {test_set.about}; source: {test_set.source}"


def weights_text(folder: Path | None) -> str:
    """One line per weight file of the learned metrics: found where, or missing and where to get it."""
    from consissr.evaluation import stlpips
    from consissr.evaluation.learned import listing

    path = stlpips.weights_file()
    lines = [f"{'st-lpips':13} {Path(stlpips.FILE).name:38} {path or 'missing'}"]
    if path is None:
        lines.append(f"{'':14}get it with pip install stlpips-pytorch==0.0.2")
    for metric, name, place, advice in listing(folder):
        lines.append(f"{metric:13} {name:38} {place}" + (f"\n{'':14}get {advice}" if advice else ""))
    return "\n".join(lines)
