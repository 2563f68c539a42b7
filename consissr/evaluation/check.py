"""Figures that a learned restoration must reach and a simple trick cannot fake, beside two baselines.

1. PSNR-Y, SSIM-Y and NIQE. Bicubic has the PSNR without the detail; bicubic plus grain has the NIQE without it.
   ST-LPIPS, a learned distance to HR (not the LPIPS of tables), tells detail from either.
2. Flat-block ratio: roughness where the photograph is smooth, which grain and hallucination raise. Of all 16x16 blocks
   of the set, the tenth in which HR's Y has the least standard deviation; mean deviation of the result over HR's.
3. Wrong-condition drop: the PSNR lost when the model is fed another image's condition (0 for a model that ignores it).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from consissr.errors import UserError
from consissr.evaluation import folders, provenance
from consissr.evaluation.markdown import escaped, table_lines
from consissr.evaluation.metrics import gaussian_blur, luma
from consissr.evaluation.progress import track
from consissr.evaluation.protocols import get_measures, get_protocol
from consissr.images import codec

BLOCK = 16  # pixels per side
FLATTEST = 0.1  # share of all blocks
BICUBIC, GRAINY = "bicubic", "bicubic+grain"  # names of the baselines' rows
METRICS = ["psnr", "ssim", "niqe", "st-lpips"]
COLUMNS = {"psnr": "PSNR-Y dB", "ssim": "SSIM-Y", "niqe": "NIQE", "st_lpips": "ST-LPIPS",
           "flat_ratio": "flat-block ratio", "wrong_drop": "wrong-condition drop dB"}  # fmt: skip
DIGITS = {"ssim": 4, "st_lpips": 3}  # of other columns 2
GRAIN = 3.0  # standard deviation in 8-bit levels
GRAIN_BLUR = 0.7  # pixels: at these two, grain brings bicubic's NIQE from 9.0 to 5.9 for 0.2 dB


@dataclass(frozen=True)
class CheckRow:
    """One line of the check; what is not known is NaN."""

    name: str
    psnr: float
    ssim: float
    niqe: float
    st_lpips: float
    flat_ratio: float
    wrong_drop: float = math.nan
    """dB."""


def block_std(image: torch.Tensor) -> np.ndarray:
    """Standard deviation (population) of Y in each 16x16 block: (N, 3, H, W) in [0, 1] -> (N x blocks,), levels."""
    gray = luma(image.double())[:, 0] * 255
    height, width = (side // BLOCK * BLOCK for side in gray.shape[-2:])
    blocks = gray[:, :height, :width].unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK)
    return blocks.flatten(3).std(dim=-1, correction=0).flatten().numpy()


def flat_block_ratio(sr: Iterable[torch.Tensor], hr: Iterable[torch.Tensor]) -> float:
    """Roughness of results where the photographs are smooth, 1 for the photographs themselves (see above).

    `sr` and `hr` yield images (N, 3, H, W) in [0, 1] in the same order.
    """
    result = np.concatenate([block_std(image) for image in sr])
    photograph = np.concatenate([block_std(image) for image in hr])
    if result.shape != photograph.shape:
        raise UserError(f"{result.size} blocks of results do not match {photograph.size} blocks of HR images")
    flat = np.argsort(photograph, kind="stable")[: max(1, round(FLATTEST * photograph.size))]
    return float(result[flat].mean() / photograph[flat].mean())


def mean_change(one: Path, other: Path) -> float:
    """Mean absolute difference of two folders' images of the same names, in 8-bit levels over pixels and channels."""
    files, others = folders.list_images(one), folders.list_images(other)
    pairs = ((folders.read_image(path), folders.read_image(others[name])) for name, path in files.items())
    return float(np.mean([(a - b).abs().mean().item() * 255 for a, b in pairs]))


def bicubic_baseline(lr: torch.Tensor, scale: int = 4) -> torch.Tensor:
    """Bicubic upscaling rounded to 8 bits: (N, 3, h, w) in [0, 1] -> (N, 3, scale h, scale w) in [0, 1]."""
    size = (lr.shape[-2] * scale, lr.shape[-1] * scale)
    return codec.to_uint8(codec.resize(lr * 2 - 1, size)).float() / 255


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
    """How many times as wide as LR's the HR images are. UserError where they do not pair."""
    pairs = folders.pair({"HR": hr}, hr, lr)
    first = pairs.images[0]
    return round(pairs.sizes[first][0] / folders.Listing(lr).sizes[first][0])


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
            codec.write(target, codec.Photo(result[0] * 2 - 1, None, codec.read(path).form))
    return written


def check_names(names: Iterable[str]) -> None:
    """Raises UserError where a result has the name of a baseline."""
    if taken := [name for name in names if name in (BICUBIC, GRAINY)]:
        raise UserError(f"'{taken[0]}' names a row of the check itself: write another NAME=DIR")


def check(
    results: dict[str, Path],
    hr: Path,
    lr: Path,
    output: Path,
    wrong: dict[str, Path] | None = None,
    jobs: int | None = None,
) -> list[CheckRow]:
    """The check's rows: bicubic, bicubic plus grain, then each result folder.

    `wrong` maps names of `results` to folders restored with another image's condition under the image's own name.
    """
    from consissr.evaluation.evaluate import evaluate

    wrong = wrong or {}
    for name in wrong.keys() - results.keys():
        raise UserError(f"--wrong-condition {name}: no --sr folder of that name; write NAME=DIR")
    check_names(results)
    baselines = write_baselines(lr, output / "baselines", scale_between(lr, hr))
    pairs = folders.pair(baselines | results, hr, None)
    protocol, cache = get_protocol("ccsr"), output / "scores.jsonl"
    scores = evaluate(pairs, get_measures(METRICS), protocol, cache, jobs=jobs)
    drops = {}
    for name, folder in wrong.items():
        swapped = evaluate(folders.pair({name: folder}, hr, None), get_measures(["psnr"]), protocol, cache, jobs=jobs)
        drops[name] = scores.mean(name, "psnr") - swapped.mean(name, "psnr")
    photographs = [folders.read_image(pairs.hr[image]) for image in pairs.images]
    return [
        CheckRow(
            method.name,
            *(scores.mean(method.name, metric) for metric in METRICS),
            flat_block_ratio((folders.read_image(method.runs[0][i]) for i in pairs.images), photographs),
            drops.get(method.name, math.nan),
        )
        for method in track("flat blocks", pairs.methods, len(pairs.methods))
    ]


def as_text(rows: list[CheckRow]) -> str:
    """The rows as a Markdown table, with the definitions of the figures below it; unknown columns are left out."""
    columns = [c for c in COLUMNS if not all(math.isnan(getattr(row, c)) for row in rows)]

    def text(row: CheckRow, column: str) -> str:
        value = getattr(row, column)
        return "-" if math.isnan(value) else f"{value:.{DIGITS.get(column, 2)}f}"

    lines = table_lines(
        ["", *(COLUMNS[c] for c in columns)], [[escaped(row.name), *(text(row, c) for c in columns)] for row in rows]
    )
    told = f"Grain: {GRAIN:g} levels, blurred by {GRAIN_BLUR:g} pixels. PSNR, SSIM: protocol ccsr."
    if "st_lpips" not in columns:
        told += " ST-LPIPS needs the weights in the package stlpips-pytorch 0.0.2."
    return "\n".join([*lines, "", __doc__.split("\n\n", 1)[1].strip(), told])
