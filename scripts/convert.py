"""Turn a model that the papers' authors published into a model folder that scripts/infer.py runs.

  python scripts/convert.py ConsisSR.ckpt models/consissr       ConsisSR's file
  python scripts/convert.py preset/models models/ccsr           CCSR v2: a folder with controlnet/ and vae/
  python scripts/convert.py real-world_ccsr.ckpt models/ccsr1   CCSR v1's file

Which of them SRC is, is read from its keys; every key is accounted for. Nothing stored in a file is executed. The base
model is referred to by name; --base own writes the checkpoint's own beside the result instead.
"""

import argparse
import shutil
import sys
from pathlib import Path

from consissr.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Parse, read, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the authors' checkpoint file, or CCSR v2's folder")
    parser.add_argument("target", type=Path, help="folder to write; must not exist")
    parser.add_argument("--base", default="sd21-base", help="name, folder or hub id, or 'own' (%(default)s)")
    parser.add_argument("--clip", type=Path, help="ConsisSR: open_clip's model config (JSON), if it is not ViT-H-14")
    parser.add_argument("--half", action="store_true", help="store weights in 16 bits")
    args, part = parser.parse_args(arguments), None
    try:
        if args.target.exists():
            raise UserError(f"{args.target} exists: remove it or name another folder")
        if not args.source.exists():
            raise UserError(f"{args.source} does not exist: give the authors' checkpoint file or folder")
        if args.clip is not None and not args.clip.is_file():
            raise UserError(f"--clip {args.clip} does not exist: give open_clip's JSON, or leave it out for ViT-H-14")
        from ccsr.conversion import read, write

        part = args.target.with_name(f".{args.target.name}.part")
        part.mkdir(parents=True)
        found = read(args.source, args.clip)
        write(found, part, args.target.name, args.base, args.half)
        part.rename(args.target)
    except (UserError, OSError, ValueError, KeyError) as error:
        reason = str(error) if isinstance(error, UserError) else f"{args.source}: {type(error).__name__}: {error}"
        print(f"error: {reason.splitlines()[0]}", file=sys.stderr)
        return 2
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
    print(f"{args.source} is {found.kind}")
    print("\n".join(found.report.lines()))
    print(f"written to {args.target}; base model: {args.base}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
