"""Figures that a learned restoration must reach and a simple trick cannot fake, beside two baselines.

1. PSNR-Y, SSIM-Y and NIQE. Bicubic has the PSNR without the detail; bicubic plus grain has the NIQE without it.
   ST-LPIPS, a learned distance to HR (not the LPIPS of tables), tells detail from either.
2. Flat-block ratio (flat.py): roughness where the photograph is smooth, which grain and hallucination raise.
3. Wrong-condition drop: the PSNR lost when the model is fed another image's condition (0 for a model that ignores it).
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from consissr.errors import UserError
from consissr.evaluation import folders, provenance
from consissr.evaluation.evaluate import Evaluation, evaluate
from consissr.evaluation.markdown import escaped, table_lines
from consissr.evaluation.metrics import gaussian_blur
from consissr.evaluation.progress import track
from consissr.evaluation.protocols import get_measures, get_protocol
from consissr.images import codec
from consissr.images.resize import resize

BICUBIC, GRAINY = "bicubic", "bicubic+grain"  # names of the baselines' rows
METRICS = ("psnr", "ssim", "niqe", "st-lpips", "flat")
TITLES = ("PSNR-Y dB", "SSIM-Y", "NIQE", "ST-LPIPS", "flat-block ratio", "wrong-condition drop dB")
DIGITS = (2, 4, 2, 3, 2, 2)
GRAIN = 3.0  # standard deviation in 8-bit levels
GRAIN_BLUR = 0.7  # pixels: at these two, grain brings bicubic's NIQE from 9.0 to 5.9 for 0.2 dB


def mean_change(one: Path, other: Path) -> float:
    """Mean absolute difference of two folders' images of the same names, in 8-bit levels over pixels and channels."""
    files, others = folders.list_images(one), folders.list_images(other)
    pairs = ((folders.read_image(path), folders.read_image(others[name])) for name, path in files.items())
    return float(np.mean([(a - b).abs().mean().item() * 255 for a, b in pairs]))


def bicubic_baseline(lr: torch.Tensor, scale: int = 4) -> torch.Tensor:
    """Bicubic upscaling rounded to 8 bits: (N, 3, h, w) in [0, 1] -> (N, 3, scale h, scale w) in [0, 1]."""
    size = (lr.shape[-2] * scale, lr.shape[-1] * scale)
    return codec.to_uint8(resize(lr * 2 - 1, size)).float() / 255


def bicubic_plus_grain(lr: torch.Tensor, scale: int = 4, seed: int = 0) -> torch.Tensor:
    """Bicubic upscaling plus grey grain of GRAIN 8-bit levels: what NIQE alone cannot tell from detail.

    The grain is Gaussian noise blurred by 0.7 pixels, as film's is; white noise would raise NIQE instead.
    """
    upscaled = bicubic_baseline(lr, scale)
    shape = (upscaled.shape[0], 1, upscaled.shape[-2] + 8, upscaled.shape[-1] + 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    grain = gaussian_blur(noise, 9, GRAIN_BLUR)
    return ((upscaled + grain / grain.std() * GRAIN / 255).clamp(0, 1) * 255).round() / 255


def scale_between(lr: Path, hr: Path) -> int:
    """How many times as large as LR's the HR images are. UserError where they do not pair, or where that differs."""
    pairs, small = folders.pair({"HR": hr}, hr, lr), folders.Listing(lr).sizes
    first = pairs.images[0]
    scale = max(1, round(pairs.sizes[first][0] / small[first][0]))
    folders.check_exchanged(hr, lr, pairs.sizes, small)
    if odd := [name for name in pairs.images if pairs.sizes[name] != tuple(scale * side for side in small[name])]:
        own, size = ("x".join(map(str, sizes[odd[0]])) for sizes in (small, pairs.sizes))
        raise UserError(f"HR {hr}: {folders.some(odd)} has size {size}, LR's is {own}: not {scale} times as large")
    return scale


def write_baselines(lr: Path, output: Path, scale: int = 4) -> dict[str, Path]:
    """Both baselines of the LR folder as PNG: their folders by name. What is there of the same images is kept."""
    written, files = {}, folders.list_images(lr)
    images = provenance.fingerprint(lr, folders.EXTENSIONS)
    for name in (BICUBIC, GRAINY):
        written[name] = provenance.folder_of(output, name.replace("+", "-plus-"), images=images, scale=scale)
        for seed, (stem, path) in enumerate(track(name, files.items(), len(files))):
            if (target := written[name] / f"{stem}.png").is_file():
                continue
            image = folders.read_image(path)
            result = bicubic_baseline(image, scale) if name == BICUBIC else bicubic_plus_grain(image, scale, seed=seed)
            codec.write(target, codec.opaque(result[0] * 2 - 1, codec.read(path).form))
    return written


def check_names(names: Collection[str], wrong: dict[str, Path], hr: Path) -> None:
    """Raises UserError where a result has the name of a baseline, and where one of `wrong` is no result's or does not
    pair with HR."""
    if taken := [name for name in names if name in (BICUBIC, GRAINY)]:
        raise UserError(f"'{taken[0]}' names a row of the check itself: write another NAME=DIR")
    if unknown := [name for name in wrong if name not in names]:
        raise UserError(f"--wrong-condition {unknown[0]}: no --sr folder of that name; write NAME=DIR")
    folders.pair(wrong, hr, None)


def check(
    results: dict[str, Path],
    hr: Path,
    lr: Path,
    output: Path,
    wrong: dict[str, Path] | None = None,
    jobs: int | None = None,
) -> dict[str, list[float]]:
    """The values of TITLES by row: bicubic, bicubic plus grain, then each result folder; NaN for what is not known.

    `wrong` maps names of `results` to folders restored with another image's condition under the image's own name.
    """
    wrong = wrong or {}
    check_names(results, wrong, hr)
    baselines = write_baselines(lr, output / "baselines", scale_between(lr, hr))
    protocol, cache = get_protocol("ccsr"), output / "scores.jsonl"

    def scores(sets: dict[str, Path], metrics: Sequence[str]) -> Evaluation:
        return evaluate(folders.pair(sets, hr, None), get_measures(metrics), protocol, cache, jobs=jobs)

    whole = scores(baselines | results, METRICS)
    rows = {m.name: [whole.mean(m.name, metric) for metric in METRICS] for m in whole.pairs.methods}
    for name, row in rows.items():
        drop = row[0] - scores({name: wrong[name]}, ["psnr"]).mean(name, "psnr") if name in wrong else math.nan
        row.append(drop)
    return rows


def as_text(rows: dict[str, list[float]]) -> str:
    """The rows as a Markdown table, with the definitions of the figures below it; unknown columns are left out."""
    known = [i for i in range(len(TITLES)) if not all(math.isnan(row[i]) for row in rows.values())]

    def text(value: float, digits: int) -> str:
        return "-" if math.isnan(value) else f"{value:.{digits}f}"

    cells = [[escaped(name), *(text(row[i], DIGITS[i]) for i in known)] for name, row in rows.items()]
    told = f"Grain: {GRAIN:g} levels, blurred by {GRAIN_BLUR:g} pixels. PSNR, SSIM: protocol ccsr."
    if METRICS.index("st-lpips") not in known:
        told += " ST-LPIPS needs the weights in the package stlpips-pytorch 0.0.2."
    lines = table_lines(["", *(TITLES[i] for i in known)], cells)
    return "\n".join([*lines, "", __doc__.split("\n\n", 1)[1].strip(), told])
