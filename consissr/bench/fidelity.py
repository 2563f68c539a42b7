"""The fidelity dial's curve: PSNR against NIQE of results from free to faithful, and a strip of them to look at."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consissr.errors import UserError

PATCH = 160
"""Pixels of each result that a strip shows."""


@dataclass
class Point:
    """Averages over the images at one setting of the dial."""

    fidelity: float
    psnr: float
    """On Y, in dB."""
    niqe: float
    """Lower is more natural."""
    images: int


def curve(
    model: str, lq: Path, hq: Path, values: list[float], limit: int, strip: Path | None, **load: Any
) -> list[Point]:
    """One point per value for the first `limit` images of `lq`, whose originals stand in `hq` in the same order.

    strip: where to write rows of input, results and original, in the middle, of the first six. load: more arguments
    of Restorer.load. UserError if the folders do not fit.
    """
    import torch

    from consissr.evaluation.folders import list_images, pair
    from consissr.evaluation.metrics import psnr
    from consissr.evaluation.niqe import niqe
    from consissr.evaluation.progress import track
    from consissr.images import codec
    from consissr.images.resize import resize
    from consissr.restorer import Restorer

    names = pair({"HR": Path(hq)}, Path(hq), Path(lq)).images[:limit]
    files = [list_images(Path(folder)) for folder in (lq, hq)]
    paths = [tuple(folder[name] for folder in files) for name in names]
    restorer = Restorer.load(model, **load)
    rows, scores = [], {value: [] for value in values}
    for low, high in track("restoring", paths, len(paths)):
        small, original = (codec.read(path).pixels[None] for path in (low, high))
        scale = original.shape[2] / small.shape[2]
        pictures = [resize(small, tuple(original.shape[2:]))]
        for value in values:
            result = restorer(small, scale, keys=[low.name], fidelity=value)
            if result.shape != original.shape:
                raise UserError(f"{low.name} and {high.name} are not the same picture: name folders in the same order")
            pictures.append(result)
            whole = codec.to_uint8(result).float() / 255  # as a file would hold it
            scores[value].append((float(psnr(whole, original / 2 + 0.5)), float(niqe(whole))))
        top, left = ((side - PATCH) // 2 for side in original.shape[2:])
        rows.append(torch.cat([x[..., top : top + PATCH, left : left + PATCH] for x in (*pictures, original)], 3))
    if strip:
        codec.write(strip, codec.Photo(torch.cat(rows[:6], 2)[0], None, codec.Form()))
    means = {value: torch.tensor(pairs).mean(0).tolist() for value, pairs in scores.items()}
    return [Point(value, *mean, len(paths)) for value, mean in means.items()]
