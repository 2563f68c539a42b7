"""Measure speed: `python scripts/bench.py degradation` (more sub-commands: --help)."""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from consissr.errors import UserError


def degradation(args: argparse.Namespace) -> None:
    """Training's data path beside basicsr's own."""
    from consissr.data.bench import compare
    from consissr.data.settings import preset

    theirs, ours = compare(preset(args.preset), args.images, args.input)
    table = Table("path", "read, ms", "degrade, ms", "images/s and core", title=f"degradation '{args.preset}', 400x400")
    for speed in (theirs, ours):
        table.add_row(speed.name, f"{speed.read:.1f}", f"{speed.degrade:.1f}", f"{speed.rate:.1f}")
    Console().print(table)
    Console().print(f"ours is {ours.rate / theirs.rate:.2f} times as fast")


def parser() -> argparse.ArgumentParser:
    """One sub-command per thing that is measured; each names its function as `run`."""
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = root.add_subparsers(required=True, metavar="WHAT")

    command = commands.add_parser("degradation", help=degradation.__doc__, formatter_class=root.formatter_class)
    command.add_argument("-i", "--input", default="", help="folder of photographs; empty: made-up pictures")
    command.add_argument("--preset", default="ccsr", help="settings: ccsr or consissr")
    command.add_argument("--images", type=int, default=48, help="images per path")
    command.set_defaults(run=degradation)
    return root


def main() -> None:
    args = parser().parse_args()
    try:
        args.run(args)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
