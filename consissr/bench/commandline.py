"""The flags of `scripts/bench.py`. Nothing heavy is imported here."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from consissr.errors import UserError

METHODS = ("ccsr-1", "ccsr-2", "ccsr-2-guided", "consissr")


def parser(description: str, commands: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """One sub-command per thing that is measured; `commands` has the functions, each becomes `run`."""
    root = argparse.ArgumentParser(description=description)
    subs = root.add_subparsers(required=True, metavar="WHAT")

    def sub(name: str) -> Callable:
        run = commands[name]
        made = subs.add_parser(name, help=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        made.set_defaults(run=run)
        made.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
        return made.add_argument

    inference(sub("inference"))
    add = sub("gpu")
    add("--minutes", type=float, default=5.0, help="when to stop")
    add("--size", default="sd21", choices=("sd21", "tiny"), help="SD2.1's sizes, or the bundled models'")
    add("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    add("--counts", action="store_true", help="instead: count launches on tensors without values; needs no GPU")
    add = sub("tiles")
    add("-m", "--model", default="nano-ccsr", help="bundled name or model folder")
    add("--megapixels", type=float, nargs="+", default=[0.25, 1, 3, 12, 48], help="sizes of results")
    add("--scale", type=float, default=2.0, help="how many times larger than the input")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="of the weights")
    add("--device", default="cpu", help="cpu or cuda")
    add = sub("fidelity")
    add("-m", "--model", default="nano-ccsr", help="bundled name or model folder")
    add("--lr", type=Path, required=True, help="folder of low-quality images, such as RealSR's test_LR")
    add("--hr", type=Path, required=True, help="folder of their originals, in the same order")
    add("--values", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 0.9, 1], help="settings of the dial")
    add("--images", type=int, default=12, help="how many images")
    add("--strip", type=Path, metavar="PNG", help="also write a strip of pictures here")
    add = sub("training")
    add("--data", nargs="+", required=True, metavar="PATHS", help="photographs to read and degrade")
    add("--workers", type=int, nargs="*", default=[], help="numbers of threads to compare; none: 1, 2 and the default")
    add("--images", type=int, default=200, help="images to read for each")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to a run's config, such as data.crop=512")
    sub("sizes")
    add = sub("degradation")
    add("-i", "--input", default="", help="folder of photographs; empty: made-up pictures")
    add("--preset", default="ccsr", help="settings: ccsr, consissr or heavy")
    add("--images", type=int, default=48, help="images per path")
    return root


def check(args: argparse.Namespace) -> None:
    """UserError for numbers out of range, and a place where --json cannot be written."""
    for name in ("runs", "steps", "pixels", "batch", "images"):
        if vars(args).get(name, 1) < 1:
            raise UserError(f"--{name} {vars(args)[name]} is out of range: use at least 1")
    if any(count < 1 for count in vars(args).get("workers", [])):
        raise UserError(f"--workers {min(args.workers)} is out of range: use at least 1")
    if "random_weights" in vars(args) and (args.size == "sd21") != args.random_weights:
        raise UserError("--size sd21 and --random-weights belong together: give both, or name a model")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise UserError(f"--json {args.json} is no file in a folder that exists: name another")


def inference(add: Callable) -> None:
    """Flags of the comparison with the plain reference."""
    add("--size", default="nano-ccsr", help="sd21 (needs --random-weights), a bundled name or a model folder")
    add("--random-weights", action="store_true", help="full-size networks with randomly drawn weights, no downloads")
    add("--method", default="ccsr-2", choices=METHODS, help="networks, timesteps and guidance")
    add("--steps", type=int, default=2, help="evaluations of method consissr (its own: 50)")
    add("--pixels", type=int, default=512, help="side of the result; the input's is a quarter")
    add("--batch", type=int, default=1, help="images at once in our path")
    add("--runs", type=int, default=5, help="counted rounds, after one that warms up; 1: a single one")
    add("--paths", nargs="+", default=["reference", "ours"], choices=("reference", "ours"), help="what to run")
    add("--memory", action="store_true", help="also peak memory, each path in a process of its own")
    add("--compile", action="store_true", help="torch.compile the networks of our path")
    add("--device", default="cpu", help="cpu or cuda")
    add("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the weights")
