"""Write a fixed synthetic test set: `python scripts/make_testset.py -i DIV2K_valid_HR -o testset --count 3000`.

HR/ holds the crops, LR/ their degraded partners of the same names, testset.json the seed, settings and sources.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from consissr.errors import UserError


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    root.add_argument(
        "-i", "--input", nargs="+", required=True, help="folders, text lists or tar shards of photographs"
    )
    root.add_argument("-o", "--output", type=Path, required=True, help="new folder")
    root.add_argument("--count", type=int, default=0, help="number of crops; 0: one of each photograph")
    root.add_argument("--crop", type=int, default=512, help="side of the HR crops in pixels")
    root.add_argument("--preset", default="ccsr", help="degradation: ccsr or consissr (the papers' settings)")
    root.add_argument("--seed", type=int, default=0, help="seed of crops and degradations")
    return root


def main() -> None:
    from consissr.data.testset import write_testset

    args = parser().parse_args()
    console = Console(stderr=True)

    def progress(numbers):
        return track(numbers, "crops", console=console)

    try:
        if args.count < 0 or args.seed < 0:
            raise UserError(f"--count {args.count}, --seed {args.seed}: use whole numbers from 0")
        record = write_testset(args.input, args.output, args.count, args.crop, args.preset, args.seed, progress)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    skipped = f", {len(record['unusable'])} photographs unusable (see testset.json)" if record["unusable"] else ""
    print(f"{len(record['images'])} pairs in {args.output}{skipped}")


if __name__ == "__main__":
    main()
