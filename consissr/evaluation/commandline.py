"""The flags of scripts/eval.py."""

import argparse
from pathlib import Path


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    group = made.add_argument_group("what to evaluate")
    add = group.add_argument
    add(
        "--sr",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR",
        help="result folders; sub-folders sample0, sample1, ... are repeated runs",
    )
    add("--hr", type=Path, metavar="DIR", help="high-resolution references of the same names")
    add("--lr", type=Path, metavar="DIR", help="low-resolution inputs of the same names")
    add("-o", "--output", type=Path, default=Path("evaluation"), metavar="DIR", help="where results go (evaluation)")

    group = made.add_argument_group("how")
    add = group.add_argument
    add(
        "--metrics",
        metavar="A,B,...",
        help="default: psnr,ssim,niqe with --hr, niqe without; st-lpips is a learned distance that needs no download",
    )
    add(
        "--protocol",
        metavar="NAME",
        help="conventions: ccsr (default), osediff, ccsr-v1, seesr, consissr-text or consissr-table",
    )
    add("--weights", type=Path, metavar="DIR", help="folder with weights of learned metrics (default: pyiqa's caches)")
    add("--device", default="cpu", help="device of learned metrics (cpu)")
    add("--jobs", type=int, metavar="N", help="processes (default: as many as there are cores and memory for)")
    add(
        "--unranked",
        nargs="+",
        default=[],
        metavar="NAME",
        help="result folders left out of bold and rank, such as models of another size",
    )
    add("--small-fid", action="store_true", help="compute FID of fewer than 50 images, too")
    pictures = "images whose pictures the HTML report embeds (%(default)s)"
    add("--report-images", type=int, default=24, metavar="N", help=pictures)

    group = made.add_argument_group("the papers' tables and figures")
    add = group.add_argument
    add("--table", metavar="NAME", help="print published values beside measured ones, or draw a figure")
    add("--list-tables", action="store_true", help="list the names that --table knows")
    add("--dataset", default="", metavar="NAME", help="data set of the table, where it has several")
    add("--run", nargs="+", default=[], metavar="[ROW=]MODEL", help="restore --lr with infer.py first, for our rows")
    add("--repeat", type=int, metavar="N", help="runs of --run (default: the paper's)")
    add("--infer-flags", default="", metavar="'...'", help="further flags for infer.py under --run")
    add("--image", nargs="+", default=[], metavar="NAME", help="figures: images to show, by name without extension")
    add("--box", metavar="X,Y,W,H", help="figures: the crop, in pixels of the results")
    add("--prompts", nargs="+", default=[], metavar="TEXT", help="ConsisSR Fig. 4: candidate prompts of --image")

    group = made.add_argument_group("checks")
    add = group.add_argument
    add("--check", action="store_true", help="figures beside bicubic and bicubic plus grain (needs --hr and --lr)")
    add(
        "--wrong-condition",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="with --check: the results of --sr's NAME, restored with another image's condition",
    )
    add("--check-dataset", metavar="NAME", help="check --hr and --lr against a test set of the papers")
    add("--list-weights", action="store_true", help="list the weights of learned metrics: found, missing, from where")
    return made  # fmt: skip


def parse_box(text: str | None) -> tuple[int, int, int, int] | None:
    """ "X,Y,W,H" -> four integers."""
    from consissr.errors import UserError

    if text is None:
        return None
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box {text} is not X,Y,W,H in whole pixels") from None
    return x, y, width, height
