"""How much a film flickers: `python -m consissr.bench.flicker PHOTO`, frames with one noise against one per name.

Two films are cut from a photograph: one that stands still, and one that pans by STEP pixels a frame. Results of
neighbouring frames are compared where they show the same place, so that nothing but flicker is left.
"""

import argparse
import sys
from pathlib import Path

from torch import Tensor

from consissr.errors import UserError, exit_status
from consissr.images import codec
from consissr.images.resize import resize
from consissr.restorer import Restorer

SIDE, FRAMES, STEP, SCALE = 96, 6, 2, 4
"""Pixels of a frame, how many there are, pixels of panning, and how much larger results are."""


def film(photo: Tensor, step: int) -> list[Tensor]:
    """Frames (1,3,SIDE,SIDE) from the middle of a photograph (3,H,W), each `step` pixels further right."""
    top, left = ((side - SIDE) // 2 for side in photo.shape[1:])
    lefts = [left + step * i for i in range(FRAMES)]
    return [photo[None, :, top : top + SIDE, at : at + SIDE].contiguous() for at in lefts]


def flicker(frames: list[Tensor], step: int) -> float:
    """Mean absolute difference of neighbouring frames (1,3,H,W), the next one moved left by `step`, in levels."""
    width = frames[0].shape[3] - step
    pairs = zip(frames, frames[1:], strict=False)
    return 127.5 * sum((a[..., step:] - b[..., :width]).abs().mean().item() for a, b in pairs) / (len(frames) - 1)


def measure(restorer: Restorer, photo: Tensor) -> list[tuple[str, float, float, float]]:
    """(film, its inputs' own flicker after enlarging, results' with one noise, with one per name), in levels."""
    rows = []
    for name, step in (("static", 0), (f"panning by {STEP} px", STEP)):
        frames = film(photo, step)
        films = [[resize(frame, (SIDE * SCALE, SIDE * SCALE)) for frame in frames]]
        for keys in (["frame"] * FRAMES, [f"{i:04d}.png" for i in range(FRAMES)]):
            films.append([restorer(x, SCALE, keys=[key]) for x, key in zip(frames, keys, strict=True)])
        rows.append((name, *(flicker(one, step * SCALE) for one in films)))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("-m", "--model", default="nano-ccsr")
    args = parser.parse_args(arguments)

    def films() -> int:
        photo = codec.read(args.photo).pixels
        if min(photo.shape[1:]) < (least := SIDE + 2 * STEP * FRAMES):
            raise UserError(f"{args.photo} is too small: give a photograph of at least {least}x{least} pixels")
        for name, enlarged, one_noise, by_name in measure(Restorer.load(args.model), photo):
            sys.stdout.write(
                f"{name}: {enlarged:.2f} enlarged, {one_noise:.2f} one noise, {by_name:.2f} by name (levels)\n"
            )
        return 0

    return exit_status(films, "nothing is kept of a measurement that was stopped")


if __name__ == "__main__":
    sys.exit(main())
