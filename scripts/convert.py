"""Published models: list them, fetch them, turn the authors' files into model folders, publish your own.

  python scripts/convert.py --list                              published models, and which are on this machine
  python scripts/convert.py --prefetch ccsr-v2                  fetch and convert now, to be offline later
  python scripts/convert.py ConsisSR.ckpt models/consissr       the authors' file, or for CCSR v2 their folder
  python scripts/convert.py --push owner/name runs/deft         upload a model folder with its card

Which release a file is, is read from its keys; every key is accounted for. Nothing stored in a file is executed. The
base model is the file's own where it has all of it (--base own), else a name that is looked up when the model is used.
"""

import argparse
import sys
from pathlib import Path

from consissr.errors import UserError, exit_status


def main(arguments: list[str] | None = None) -> int:
    """Convert, list, fetch or publish; returns the exit status, 2 and one line for a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="the authors' checkpoint or folder; --push: model folder")
    parser.add_argument("target", type=Path, nargs="?", help="folder to write; must not exist")
    parser.add_argument("--list", action="store_true", help="published models: size, licence, steps, where they are")
    parser.add_argument("--prefetch", metavar="NAME", help="fetch a published model or hub id with its base")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the model folder SOURCE to the hub")
    parser.add_argument("--private", action="store_true", help="--push: into a private repository")
    parser.add_argument("--base", default="auto", help="name, folder, hub id, 'own' (the source's) or 'auto'")
    parser.add_argument("--clip", type=Path, help="ConsisSR: open_clip's model config (JSON), if it is not ViT-H-14")
    parser.add_argument("--half", action="store_true", help="store weights, or fetch them, in 16 bits")
    args = parser.parse_args(arguments)
    return exit_status(lambda: work(args), "what is whole is kept, and the same command goes on")


def work(args: argparse.Namespace) -> int:
    """What the flags ask for."""
    if args.list:
        from consissr.weights.find import listing

        print("\n\n".join("\n".join(f"{key:9} {text}" for key, text in row.items()) for row in listing()))
    elif args.prefetch:
        from consissr.weights.find import prefetch

        print(f"{args.prefetch} is in {prefetch(args.prefetch, args.half)}")
    elif args.push:
        from consissr.weights.publish import push

        print(f"uploaded to {push(args.source, args.push, args.private)}")
    elif args.source is None or args.target is None:
        raise UserError("give SOURCE and TARGET, or --list, --prefetch NAME or --push OWNER/NAME SOURCE")
    else:
        convert(args)
    return 0


def convert(args: argparse.Namespace) -> None:
    """SOURCE to TARGET, and what became of every key."""
    from consissr.weights.conversion import convert
    from consissr.weights.files import read_config

    model = convert(args.source, args.target, args.base, args.clip, args.half)
    print(f"{args.source} is {model.kind}")
    print("\n".join(model.report.lines()))
    print(f"written to {args.target}; base model: {read_config(args.target).model.base}")


if __name__ == "__main__":
    sys.exit(main())
