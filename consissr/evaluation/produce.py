"""Results that scripts/infer.py restores before they are measured."""

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

from consissr.config.loading import find_config, nearest
from consissr.errors import UserError
from consissr.evaluation import provenance, stlpips
from consissr.evaluation.folders import (
    EXTENSIONS,
    Listing,
    check_exchanged,
    check_images,
    check_unranked,
    list_images,
    named,
    pair,
    parse_methods,
    some,
)
from consissr.evaluation.tables import Table
from consissr.evaluation.workers import end_with_parent
from consissr.images.formats import output_size


class KnownFlags(argparse.ArgumentParser):
    """Those of infer.py's flags that evaluation looks at itself. A mistake among them is a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"--infer-flags: {message}; see python scripts/infer.py --help")


FILE_FLAGS = KnownFlags(add_help=False)
FILE_FLAGS.add_argument("--base")  # its weights count as the model's own do
FILE_FLAGS.add_argument("--config", type=find_config)  # its text counts as other flags do
SIZE_FLAGS = KnownFlags(add_help=False)
SIZE_FLAGS.add_argument("-s", "--scale", "--outscale", "--upscale", type=float)
SIZE_FLAGS.add_argument("--longest-side", type=int)


def results_of(
    args: argparse.Namespace,
    table: Table | None,
    script: Path,
    find: Callable[[str, str | None], list[Path]] = lambda name, base: [Path(name)],
    bundled: Collection[str] = (),
    paired: bool = True,
) -> tuple[dict[str, Path], list[str]]:
    """Result folders by row: those of --sr, then what --run restores from --lr; and which rows are not to be ranked.

    find: model name, and base where another is asked for -> where the weights lie (`weights.find.places`); by default
    names are folders. bundled: the small models, which are not ranked beside others or a table's. paired: whether rows
    are compared, and so must have the same images and HR's sizes.
    """
    results, models, flags = parse_methods(args.sr), models_by_row(table, args.run), infer_flags(args)
    if not models:
        return results, []
    if args.lr is None:
        raise UserError("--run restores the images of --lr: give that folder")
    if twice := models.keys() & results.keys():
        raise UserError(f"'{min(twice)}' names a result folder and a model to run: write another NAME=")
    small = [row for row, model in models.items() if model in bundled]
    if table and small and stlpips.weights_file() is None:
        raise UserError(f"{models[small[0]]} is small: beside published values it is shown with a learned distance, "
                        "which needs pip install stlpips-pytorch==0.0.2")  # fmt: skip
    # what does not pair, or is not there, is told before anything is restored
    check_images(args.image, list_images(args.lr))
    check_unranked(args.unranked, results | models)
    if results and paired:
        pair(results, args.hr, args.lr)
    chosen = SIZE_FLAGS.parse_known_args(flags)[0]
    if args.hr and not any(vars(chosen).values()):
        flags = [*scale_flags(args.hr, args.lr), *flags]
    elif args.hr and paired:
        check_sizes(args.hr, args.lr, chosen)
    repeat = args.repeat or (table.runs if table else 1)
    results |= produce(table, models, args.lr, args.output, script, repeat, flags, find)
    return results, small if table or len(small) < len(results) else []


def check_sizes(hr: Path, lr: Path, chosen: argparse.Namespace) -> None:
    """Raises UserError where the scale and longest_side that the user's flags choose do not give HR's sizes."""
    if not math.isfinite(chosen.scale or 0):
        return  # which infer.py refuses
    large, small = pair({"HR": hr}, hr, lr).sizes, Listing(lr).sizes
    made = {name: output_size(*small[name], chosen.scale or 4, chosen.longest_side) for name in large}
    if odd := [name for name in large if made[name] != large[name]]:
        own, size = ("x".join(map(str, sizes[odd[0]])) for sizes in (made, large))
        raise UserError(f"--infer-flags: {some(odd)} would be made {own}, but is {size} in HR {hr}: choose another "
                        "size, or none")  # fmt: skip


def scale_flags(hr: Path, lr: Path) -> list[str]:
    """infer.py's --scale that makes every LR image as large as its HR image, other than its own four times.

    Raises UserError, before anything is restored, where the images do not pair, and where no factor does it.
    """
    large, small = pair({"HR": hr}, hr, lr).sizes, Listing(lr).sizes
    check_exchanged(hr, lr, large, small)
    fitting = {name: factors(large[name], small[name]) for name in large}
    middle = (max(low for low, _ in fitting.values()) + min(high for _, high in fitting.values())) / 2
    for word in ("4", *(f"{middle:.{digits}g}" for digits in range(1, 9))):
        if all(output_size(*small[name], float(word)) == size for name, size in large.items()):
            return ["--scale", word] if word != "4" else []
    name = next(name for name, size in large.items() if output_size(*small[name], 4) != size)
    own, size = ("x".join(map(str, sizes[name])) for sizes in (small, large))
    told = f"HR {hr}: no one factor makes all images of LR {lr} as large ({name} is {size}, LR's {own})"
    longest = max(large[name])
    if all(output_size(*small[name], 4, longest) == size for name, size in large.items()):
        raise UserError(f"{told}: give --infer-flags '--longest-side {longest}'")
    if name := next((name for name, (low, high) in fitting.items() if low > high), ""):
        raise UserError(f"{told}: the sides of {name} differ by different factors, so crop its HR or LR image")
    raise UserError(f"{told}: split them by factor")


def factors(sides: tuple[int, int], own: tuple[int, int]) -> tuple[float, float]:
    """The least and the largest factor that make `own` sides as large as `sides`; crossed where there is none."""
    pairs = list(zip(sides, own, strict=True))
    return max((a - 0.5) / b for a, b in pairs), min((a + 0.5) / b for a, b in pairs)


def infer_flags(args: argparse.Namespace) -> list[str]:
    """The words of --infer-flags, split as a shell does."""
    try:
        return shlex.split(args.infer_flags)
    except ValueError as error:
        raise UserError(f"--infer-flags {args.infer_flags} cannot be split into words ({error})") from error


def models_by_row(table: Table | None, requests: list[str]) -> dict[str, str]:
    """`MODEL` (every row of ours that one model gives, or without a table its name) or `ROW=MODEL` -> model by row."""
    models: dict[str, str] = {}
    for request in requests:
        row, model = named(request)
        if table is None:
            rows = [row or Path(model).name]
        elif row:
            if row not in table.ours:
                raise UserError(f"{table.name} has no row of ours called '{row}'{nearest(row, list(table.ours))}")
            rows = [row]
        else:
            rows = [name for name, entry in table.ours.items() if not entry.get("variant")]
        if twice := [name for name in rows if name in models]:
            raise UserError(f"two models to run are called '{twice[0]}': write NAME=MODEL")
        models |= dict.fromkeys(rows, model)
    return models


def produce(
    table: Table | None,
    models: dict[str, str],
    lr: Path,
    output: Path,
    script: Path,
    repeat: int,
    flags: list[str],
    find: Callable[[str, str | None], list[Path]] = lambda name, base: [Path(name)],
) -> dict[str, Path]:
    """Restore the LR folder once per row, `repeat` times with different noise; files of the same origin are kept.

    Raises UserError where infer.py fails.
    """
    results, images = {}, provenance.fingerprint(lr, EXTENSIONS)
    for row, model in models.items():
        words = [*(table.ours[row].get("flags", []) if table else []), *flags]
        files = FILE_FLAGS.parse_known_args(words)[0]
        weights = "-".join(provenance.contents(place, provenance.MODEL_FILES) for place in find(model, files.base))
        made_of = {"model": model, "weights": weights, "images": images, "flags": words, "repeat": repeat}
        made_of |= {"config": provenance.contents(files.config)} if files.config else {}
        folder = provenance.folder_of(output / "results", re.sub(r"[^A-Za-z0-9.]+", "-", row).strip("-"), **made_of)
        call = [script, "-i", lr, "-o", folder, "-m", model, "--skip-existing", "--repeat", repeat]
        call += ["--ext", "png", "--recursive", *words]  # as pairs are found, and without JPEG's loss
        run_script(call, f"{row} could not be restored")
        results[row] = folder
    return results


@dataclass(frozen=True)
class Timing:
    """How long a model takes for an image, and what it ran on."""

    seconds: float
    told: str


def timings(table: Table, args: argparse.Namespace, script: Path) -> dict[str, Timing]:
    """The rows of ours for which --run names a model."""
    flags, models = infer_flags(args), models_by_row(table, args.run)
    return {row: time_model(model, table.ours[row]["flags"], flags, script) for row, model in models.items()}


def time_model(model: str, plan: list[str], flags: list[str], script: Path) -> Timing:
    """The fastest of four restorations of a 128x128 image to 512x512 on this machine, by infer.py.

    plan: a row's flags of infer.py; flags: the user's, which the text names, too.
    """
    with tempfile.TemporaryDirectory() as scratch:
        noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
        image, log = Path(scratch) / "lq.png", Path(scratch) / "log.jsonl"
        Image.fromarray(noise).save(image)
        call = [script, "-i", image, "-o", f"{scratch}/results", "-m", model, "-s", 4, *plan, *flags]
        run_script([*call, "--repeat", 4, "--json", log, "--quiet"], f"{model} could not be timed")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    fastest = min((line for line in lines if line.get("status") == "done"), key=lambda line: line["seconds"])
    told = f"{shlex.join([model, *flags])} in {fastest['precision']} on {fastest['device']}"
    return Timing(fastest["seconds"], told)


def run_script(words: list, failure: str) -> None:
    """Run a script of this project; where it fails, a UserError that begins with `failure`."""
    command = [sys.executable, *map(str, words)]
    before = end_with_parent if sys.platform == "linux" else None  # Windows takes none
    if subprocess.run(command, preexec_fn=before).returncode != 0:
        raise UserError(f"{failure}; the command was: {' '.join(command)}")
