"""Does a model restore, or does it only look so?  python scripts/check_model.py nano-ccsr --realsr DIR --photos DIR

Restores real pairs (DIR/LR, DIR/HR) in one and two steps, and degraded photographs (fixed seed) in one step with and
without the tuned decoder, and prints PSNR, SSIM, NIQE, the flat-block ratio and the loss under another image's
condition beside bicubic and bicubic plus grain. Results and scores are kept in the output folder.
"""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track

from consissr.errors import UserError

STEPS = {"S=1": (6, 2 / 3, 2 / 3), "S=2": (6, 2 / 3, 1 / 2)}  # (T, t_max, t_min)


def restore(restorer, lr: Path, folder: Path, steps: str, batch: int = 1) -> Path:
    """Every image of `lr` restored into `folder` in the given steps; what is there is kept."""
    import torch

    from ccsr import nuts_plan
    from consissr import images
    from consissr.evaluation import folders

    listed = [(name, path) for name, path in folders.list_images(lr).items() if not (folder / f"{name}.png").is_file()]
    groups = [listed[i : i + batch] for i in range(0, len(listed), batch)]
    for group in track(groups, f"{folder.name} {steps}", console=Console(stderr=True)):
        photos = [images.read(path) for _, path in group]
        x = torch.stack([photo.pixels for photo in photos])
        keys = [name for name, _ in group]
        y = restorer(x, keys=keys, plan=nuts_plan(*STEPS[steps]), batch_size=batch)
        for name, photo, result in zip(keys, photos, y, strict=True):
            images.write(folder / f"{name}.png", images.Photo(result, None, photo.form))
    return folder


def another_condition(latents):
    """The autoencoder, giving each image of a batch the next one's latent: the condition of the wrong image."""
    from torch import nn

    class Swapped(nn.Module):
        def encode(self, x):
            return latents.encode(x.roll(1, 0))

    return Swapped()


def main() -> int:
    """Restore, check, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bundled name or model folder of CCSR's kind")
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

        def load() -> Restorer:
            return Restorer.load(args.model, base=args.base)

        base = read_config(find_model(args.model)).model.base
        restorer, swapped = load(), load()
        swapped.hint_latents = another_condition(swapped.latents)
        if args.realsr:
            lr, out = args.realsr / "LR", args.output / "realsr"
            began = time.perf_counter()
            results = {f"{args.model} {s}": restore(restorer, lr, out / s.replace("=", ""), s) for s in STEPS}
            wrong = {}
            for s in STEPS:
                wrong[f"{args.model} {s}"] = restore(swapped, lr, out / f"{s.replace('=', '')}-wrong", s, batch=2)
            print(f"\n## Real pairs ({args.realsr.name}, {time.perf_counter() - began:.0f} s)\n")
            print(as_text(check(results, args.realsr / "HR", lr, out, wrong)))
        if args.photos:
            out = args.output / "photos"
            if not (out / "testset" / "LR").is_dir():
                write_testset([args.photos], out / "testset", 0, 256, "ccsr", 0)
            lr = out / "testset" / "LR"
            results = {f"{args.model} S=1": restore(restorer, lr, out / "deft", "S=1")}
            plain = load()
            plain.latents = plain.hint_latents = load_base(args.base or base, text=False).latents.eval()
            results["S=1 before DeFT"] = restore(plain, lr, out / "before-deft", "S=1")
            print("\n## Photographs degraded with seed 0, 256-pixel crops\n")
            print(as_text(check(results, out / "testset" / "HR", lr, out)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
