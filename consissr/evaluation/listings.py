"""What scripts/eval.py can tell without evaluating: tables, weights, and whether a test set is complete."""

import argparse
from pathlib import Path

from consissr.errors import UserError
from consissr.evaluation.datasets import TEST_SETS, check_test_set
from consissr.evaluation.protocols import MEASURES
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
    """A line per metric and weight file: found where, or missing, where to get it and where to put it."""
    from consissr.evaluation import learned, stlpips

    advice = "pip install stlpips-pytorch==0.0.2"
    rows = [("st-lpips", Path(stlpips.FILE).name, stlpips.weights_file(), f"it with {advice}")]
    for metric, files in learned.WEIGHTS.items():
        for file in files if metric in MEASURES else ():
            advice = f"{file.url} -> {learned.hub() / file.folder}, or any folder given as --weights"
            rows.append((metric, file.name, learned.find(file, folder), advice))
    return "\n".join(f"{metric:13} {name:38} {path or 'missing'}" + ("" if path else f"\n{'':14}get {advice}")
                     for metric, name, path, advice in rows)  # fmt: skip
