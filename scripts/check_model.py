"""Does a model restore, or does it only look so?  python scripts/check_model.py nano-ccsr --realsr DIR --photos DIR

Restores real pairs (DIR/LR, DIR/HR) in one and two steps (or by the model's own plan), and degraded photographs (fixed
seed) with and without the tuned decoder. Prints PSNR, SSIM, NIQE, the flat-block ratio and the loss under another
image's condition beside bicubic and bicubic plus grain. Results and scores are kept in the output folder.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

from consissr.errors import UserError

STDERR = Console(stderr=True)
NUTS = {"S=1": (6, 2 / 3, 2 / 3), "S=2": (6, 2 / 3, 1 / 2)}  # (T, t_max, t_min)


def plans_of(config) -> dict:
    """The plans to check a model with, by name: one and two steps of NUTS, or its own where that is another."""
    from ccsr import nuts_plan

    return {s: nuts_plan(*f) for s, f in NUTS.items()} if config.plan == "nuts" else {f"{config.steps} steps": None}


def restore(restorer, lr: Path, folder: Path, plan, batch: int = 1) -> Path:
    """Every image of `lr` restored into `folder` by the given plan; what is there is kept."""
    import torch

    from consissr import images
    from consissr.evaluation import folders

    listed = [(name, path) for name, path in folders.list_images(lr).items() if not (folder / f"{name}.png").is_file()]
    for group in track([listed[i : i + batch] for i in range(0, len(listed), batch)], folder.name, console=STDERR):
        photos = [images.read(path) for _, path in group]
        x = torch.stack([photo.pixels for photo in photos])
        keys = [name for name, _ in group]
        y = restorer(x, keys=keys, plan=plan, batch_size=batch)
        for name, photo, result in zip(keys, photos, y, strict=True):
            images.write(folder / f"{name}.png", images.Photo(result, None, photo.form))
    return folder


def changed(part, change):
    """A part of a model (autoencoder or image prompt) whose `encode` is changed by `change`."""
    from torch import nn

    class Changed(nn.Module):
        def encode(self, x):
            return change(part.encode(x))

    return Changed()


def main() -> int:
    """Restore, check, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bundled name or model folder")
    parser.add_argument("--realsr", type=Path, help="folder with LR/ and HR/ of real pairs")
    parser.add_argument("--photos", help="folder of photographs to degrade")
    parser.add_argument("--base", help="another place of the base model")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/check"))
    args = parser.parse_args()
    try:
        from consissr.checkpoint import find_model, read_config
        from consissr.data.testset import write_testset
        from consissr.evaluation.check import as_text, check
        from consissr.models.base import load_base
        from consissr.restorer import Restorer

        config = read_config(find_model(args.model))
        plans = plans_of(config.sampler)
        restorer, swapped, blind, plain = (Restorer.load(args.model, base=args.base) for _ in range(4))
        swapped.hint_latents = changed(swapped.latents, lambda z: z.roll(1, 0))  # the next image's condition
        if restorer.image_prompt is not None:
            swapped.image_prompt = changed(swapped.image_prompt, lambda tokens: tokens.roll(1, 0))
            blind.image_prompt = changed(blind.image_prompt, lambda tokens: 0 * tokens)
        if args.realsr:
            lr, out = args.realsr / "LR", args.output / "realsr"
            results, wrong = {}, {}
            for s, plan in plans.items():
                place = s.replace("=", "").replace(" ", "-")
                results[f"{args.model} {s}"] = restore(restorer, lr, out / place, plan)
                wrong[f"{args.model} {s}"] = restore(swapped, lr, out / f"{place}-wrong", plan, batch=2)
                if restorer.image_prompt is not None:
                    results[f"{s}, image tokens zeroed"] = restore(blind, lr, out / f"{place}-blind", plan)
            print(f"\n## Real pairs ({args.realsr.name})\n")
            print(as_text(check(results, args.realsr / "HR", lr, out, wrong)))
        if args.photos:
            out = args.output / "photos"
            if not (out / "testset" / "LR").is_dir():
                write_testset([args.photos], out / "testset", 0, 256, "ccsr", 0)
            lr = out / "testset" / "LR"
            (name, plan), *_ = plans.items()
            results = {f"{args.model} {name}": restore(restorer, lr, out / "restored", plan)}
            plain.latents = plain.hint_latents = load_base(args.base or config.model.base).latents.eval()
            results[f"{name}, base's decoder"] = restore(plain, lr, out / "base-decoder", plan)
            print("\n## Photographs degraded with seed 0, 256-pixel crops\n")
            print(as_text(check(results, out / "testset" / "HR", lr, out)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
