"""Does a model restore, or does it only look so?  python scripts/check_model.py nano-ccsr --realsr DIR --photos DIR

Restores real pairs in one and two steps or by the model's own plan (RealSR guided choices of the bundled models: others
tell more), and degraded photographs with and without the tuned decoder. Prints PSNR, SSIM, NIQE, ST-LPIPS, flat-block
ratio and the loss under another image's condition beside bicubic and bicubic plus grain. Results are kept.
"""

import argparse
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from consissr.errors import UserError, exit_status


def plans_of(config) -> dict:
    """Plans to check a model with, by name: one and two steps of NUTS, as `--steps` makes them, and its own (None)."""
    from ccsr.timesteps import plan_of, sampler_plan

    own, plans = sampler_plan(config), {}
    if config.plan == "nuts":
        grid = "" if config.grid == "trailing" else f" {config.grid}"
        for s in (1, 2):
            with suppress(UserError):  # a grid of one step has no room for two
                plans[f"S={s}{grid}"] = plan_of(config, s)
    return plans if own in plans.values() else plans | {f"{len(own)} steps": None}


def check_pairs(args: argparse.Namespace, weights: list[Path], plans: dict) -> str:
    """The table of real pairs: by every plan, under another image's condition, and without image tokens."""
    from consissr.evaluation.check import as_text, check, mean_change, scale_between
    from consissr.evaluation.restorations import companions, restore, results_folder, told_otherwise
    from consissr.restorer import Restorer

    lr, hr, out = args.realsr / "LR", args.realsr / "HR", args.output / "realsr"
    scale = scale_between(lr, hr)  # what does not pair is said before anything is restored
    groups, folder = companions(lr), results_folder(out, args.model, weights, lr, scale)
    restore = partial(restore, scale=scale)
    restorer, swapped, blind = (Restorer.load(args.model, base=args.base) for _ in range(3))
    told_otherwise(swapped, hint=lambda z: z.roll(1, 0), image=lambda tokens: tokens.roll(1, 0))  # the next image's
    told_otherwise(blind, image=lambda tokens: 0 * tokens)
    results, wrong, without = {}, {}, ""
    for s, plan in plans.items():
        name = s.replace("=", "").replace(" ", "-")
        results[f"{args.model} {s}"] = restore(restorer, lr, folder / name, plan)
        wrong[f"{args.model} {s}"] = restore(swapped, lr, folder / f"{name}-wrong", plan, groups)
        if restorer.image_prompt is not None:
            zeroed = results[f"{s}, image tokens zeroed"] = restore(blind, lr, folder / f"{name}-blind", plan)
            change = mean_change(folder / name, zeroed)
            without += f"\n{s}: zeroing the image tokens changes results by {change:.3f} of 255 levels on average.\n"
    return f"\n## Real pairs ({args.realsr.name})\n\n{as_text(check(results, hr, lr, out, wrong))}\n{without}"


def check_photos(args: argparse.Namespace, weights: list[Path], plans: dict, base: str) -> str:
    """The table of degraded photographs: by the first plan, with the model's decoder and with that of its base."""
    from consissr.data.testset import write_testset
    from consissr.evaluation.check import as_text, check
    from consissr.evaluation.restorations import restore, results_folder, testset_folder
    from consissr.restorer import Restorer
    from consissr.weights.base import load_base

    out = args.output / "photos"
    testset = testset_folder(out, args.photos, lambda folder: write_testset([args.photos], folder, 0, 256, "ccsr", 0))
    lr, (name, plan) = testset / "LR", next(iter(plans.items()))
    folder = results_folder(out, args.model, weights, lr)
    restorer, plain = (Restorer.load(args.model, base=args.base) for _ in range(2))
    shared, bare = plain.hint_latents is plain.latents, load_base(base).latents.eval().to(plain.device, plain.dtype)
    plain.latents, plain.hint_latents = bare, bare if shared else plain.hint_latents
    results = {f"{args.model} {name}": restore(restorer, lr, folder / "restored", plan)}
    results[f"{name}, base's decoder"] = restore(plain, lr, folder / "base-decoder", plan)
    table = as_text(check(results, testset / "HR", lr, out))
    return f"\n## Photographs degraded with seed 0, 256-pixel crops\n\n{table}"


def check_model(args: argparse.Namespace) -> int:
    """Restore, check, print two tables."""
    if not args.realsr and not args.photos:
        raise UserError("nothing to check: give --realsr DIR (with LR/ and HR/), --photos DIR, or both")
    if args.photos:
        from consissr.data.listing import list_photos

        list_photos(args.photos)  # what is not there is told before real pairs are restored
    from consissr.weights.find import base_of, places, read_config

    model, *_ = weights = places(args.model, args.base)
    config = read_config(model)
    plans = plans_of(config.sampler)
    if args.realsr:
        print(check_pairs(args, weights, plans))
    if args.photos:
        print(check_photos(args, weights, plans, args.base or base_of(model, config)))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Restore, measure and compare with the limits; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bundled name or model folder")
    parser.add_argument("--realsr", type=Path, help="folder with LR/ and HR/ of real pairs, RealSR's or others")
    parser.add_argument("--photos", help="folder of photographs to degrade")
    parser.add_argument("--base", help="another place of the base model")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/check"))
    args = parser.parse_args(arguments)
    return exit_status(lambda: check_model(args))


if __name__ == "__main__":
    sys.exit(main())
