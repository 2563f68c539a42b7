"""Write a fixed synthetic test set: `python scripts/make_testset.py -i DIV2K_valid_HR -o testset --count 3000`.

HR/ holds the crops, LR/ their degraded partners of the same names, testset.json the seed, settings and sources.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from consissr.errors import UserError, exit_status


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    root.add_argument(
        "-i", "--input", nargs="+", required=True, help="folders, text lists or tar shards of photographs"
    )
    root.add_argument("-o", "--output", type=Path, required=True, help="new folder")
    root.add_argument("--count", type=int, default=0, help="number of crops; 0: one of each photograph")
    root.add_argument("--crop", type=int, default=512, help="side of the HR crops in pixels")
    root.add_argument("--preset", default="ccsr", help="degradation: ccsr, consissr (as released) or heavy (ours)")
    root.add_argument("--seed", type=int, default=0, help="seed of crops and degradations")
    return root


def make_testset(args: argparse.Namespace) -> int:
    from consissr.data.testset import write_testset

    if args.count < 0 or args.seed < 0:
        raise UserError(f"--count {args.count}, --seed {args.seed}: use whole numbers from 0")
    console = Console(stderr=True)
    record = write_testset(args.input, args.output, args.count, args.crop, args.preset, args.seed,
                           lambda numbers: track(numbers, "crops", console=console))  # fmt: skip
    skipped = f", {len(record['unusable'])} photographs unusable (see testset.json)" if record["unusable"] else ""
    print(f"{len(record['images'])} pairs in {args.output}{skipped}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Write the test set; returns the exit status."""
    args = parser().parse_args(arguments)
    return exit_status(lambda: make_testset(args), "start again with an --output that is not there yet")


if __name__ == "__main__":
    sys.exit(main())
