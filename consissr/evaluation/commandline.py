"""The flags of scripts/eval.py."""

import argparse
from pathlib import Path

from consissr.errors import UserError
from consissr.evaluation.folders import parse_methods
from consissr.evaluation.learned import check_device
from consissr.evaluation.workers import check_jobs


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def folder(name: str, text: str, **options) -> None:
        add(*name.split(), type=Path, metavar="DIR", help=text, **options)

    def several(name: str, metavar: str, text: str) -> None:
        add(name, nargs="+", default=[], metavar=metavar, help=text)

    add = made.add_argument_group("what to evaluate").add_argument
    several("--sr", "[NAME=]DIR", "result folders; sub-folders sample0, sample1, ... are repeated runs")
    folder("--hr", "high-resolution references of the same names")
    folder("--lr", "low-resolution inputs of the same names")
    several("--run", "[NAME=]MODEL", "restore --lr with infer.py first, to the size of --hr; --table: NAME is our row")
    add("--repeat", type=int, metavar="N", help="runs of --run with different noise (default: the table's, or one)")
    add("--infer-flags", default="", metavar="'...'", help="further flags for infer.py under --run")
    folder("-o --output", "where results go (%(default)s)", default=Path("evaluation"))

    add = made.add_argument_group("how").add_argument
    add("--metrics", metavar="A,B,...", help="default: psnr,ssim,niqe with --hr, niqe without; st-lpips is a learned "
        "distance that needs no download, flat the roughness of smooth areas")  # fmt: skip
    add("--protocol", metavar="NAME", help="conventions: ccsr (default), osediff, ccsr-v1, seesr, consissr-text or "
        "consissr-table")  # fmt: skip
    folder("--weights", "folder with weights of learned metrics (default: pyiqa's caches)")
    add("--device", default="cpu", help="device of learned metrics (cpu)")
    add("--jobs", type=int, metavar="N", help="processes (default: as many as there are cores and memory for)")
    several("--unranked", "NAME", "result folders left out of bold and rank, such as models of another size")
    add("--small-fid", action="store_true", help="compute FID of fewer than 50 images, too")
    add("--report-images", type=int, default=24, metavar="N", help="images whose pictures the HTML report embeds "
        "(%(default)s)")  # fmt: skip

    add = made.add_argument_group("the papers' tables and figures").add_argument
    add("--table", metavar="NAME", help="print published values beside measured ones, or draw a figure")
    add("--list-tables", action="store_true", help="list the names that --table knows")
    add("--dataset", default="", metavar="NAME", help="data set of the table, where it has several")
    several("--image", "NAME", "figures: images to show, by name without extension")
    add("--box", metavar="X,Y,W,H", help="figures: the crop, in pixels of the results")
    several("--prompts", "TEXT", "ConsisSR Fig. 4: candidate prompts of --image")

    add = made.add_argument_group("checks").add_argument
    add("--check", action="store_true", help="figures beside bicubic and bicubic plus grain (needs --hr and --lr)")
    several("--wrong-condition", "NAME=DIR", "with --check: the results of --sr's NAME, restored with another image's "
            "condition")  # fmt: skip
    add("--check-dataset", metavar="NAME", help="check --hr and --lr against a test set of the papers")
    add("--list-weights", action="store_true", help="list the weights of learned metrics: found, missing, from where")
    return made


FIXED = ("metrics", "protocol", "weights", "device", "unranked", "small_fid", "report_images", "table")
"""What --check has of its own."""


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for values that cannot be, and for flags that --check, or the want of it, would pass over."""
    if args.output.is_file():
        raise UserError(f"--output {args.output} is a file: name a folder")
    writes_images = args.run or args.check or "figure" in (args.table or "")
    places = [("--hr", args.hr), ("--lr", args.lr)]
    for flag, words in (("--sr", args.sr), ("--wrong-condition", args.wrong_condition)):
        places += [(flag, folder) for folder in parse_methods(words).values()]
    for flag, place in places:
        if writes_images and place and args.output.resolve().is_relative_to(place.resolve()):
            raise UserError(f"--output {args.output} lies in {flag} {place}, where results would count as its images: "
                            "name a folder elsewhere")  # fmt: skip
    if args.repeat is not None and args.repeat < 1:
        raise UserError(f"--repeat must be at least 1, not {args.repeat}")
    if args.report_images < 0:
        raise UserError(f"--report-images must be at least 0, not {args.report_images}")
    check_jobs(args.jobs)
    check_device(args.device)
    if args.check:
        refuse(args, "--check", *FIXED)
    else:
        refuse(args, "an evaluation without --check", "wrong_condition")


def refuse(args: argparse.Namespace, what: str, *names: str) -> None:
    """Raises UserError where one of these flags was given, which `what` would pass over."""
    plain = parser(None).get_default
    if given := [name for name in names if getattr(args, name) != plain(name)]:
        raise UserError(f"{what} takes no --{given[0].replace('_', '-')}: leave it out")


def parse_box(text: str | None) -> tuple[int, int, int, int] | None:
    """ "X,Y,W,H" -> four integers."""
    if text is None:
        return None
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box {text} is not X,Y,W,H in whole pixels") from None
    return x, y, width, height
