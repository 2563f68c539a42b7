"""Figures that a learned restoration must reach and a simple trick cannot fake, beside two baselines.

1. PSNR-Y, SSIM-Y and NIQE. Bicubic has the PSNR without the detail; bicubic plus grain has the NIQE without it.
   ST-LPIPS, a learned distance to HR (not the LPIPS of tables), tells detail from either.
2. Flat-block ratio: roughness where the photograph is smooth, which grain and hallucination raise. Of all 16x16 blocks
   of the set, the tenth in which HR's Y has the least standard deviation; mean deviation of the result over HR's.
3. Wrong-condition drop: the PSNR lost when the model is fed another image's condition (0 for a model that ignores it).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from consissr.errors import UserError
from consissr.evaluation import folders
from consissr.evaluation.metrics import gaussian_blur, luma
from consissr.evaluation.protocols import get_measures, get_protocol
from consissr.images import codec

BLOCK = 16  # pixels per side
FLATTEST = 0.1  # share of all blocks
BICUBIC, GRAINY = "bicubic", "bicubic+grain"  # names of the baselines' rows
METRICS = ["psnr", "ssim", "niqe", "st-lpips"]
GRAIN = 3.0  # standard deviation in 8-bit levels
GRAIN_BLUR = 0.7  # pixels: at these two, grain brings bicubic's NIQE from 9.0 to 5.9 for 0.2 dB


@dataclass(frozen=True)
class Row:
    """One line of the check; `wrong_drop` in dB is NaN where no wrong-condition results were given."""

    name: str
    psnr: float
    ssim: float
    niqe: float
    st_lpips: float
    """NaN where its weights are not installed."""
    flat_ratio: float
    wrong_drop: float = float("nan")


def block_std(image: torch.Tensor) -> np.ndarray:
    """Standard deviation (population) of Y in each 16x16 block: (N, 3, H, W) in [0, 1] -> (N x blocks,), levels."""
    gray = luma(image.double())[:, 0] * 255
    height, width = (side // BLOCK * BLOCK for side in gray.shape[-2:])
    blocks = gray[:, :height, :width].unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK)
    return blocks.flatten(3).std(dim=-1, correction=0).flatten().numpy()


def flat_block_ratio(sr: Iterable[torch.Tensor], hr: Iterable[torch.Tensor]) -> float:
    """Roughness of results where the photographs are smooth, 1 for the photographs themselves.

    All 16x16 blocks of all HR images are pooled; the tenth of them with the smallest standard deviation of Y (in HR)
    is kept; the ratio is the mean of the results' standard deviations in those blocks over the mean of HR's.
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


def bicubic_plus_grain(lr: torch.Tensor, scale: int = 4, sigma: float = GRAIN, seed: int = 0) -> torch.Tensor:
    """Bicubic upscaling plus grey grain of `sigma` 8-bit levels: what NIQE alone cannot tell from detail.

    The grain is Gaussian noise blurred by 0.7 pixels, as film's is; white noise would raise NIQE instead.
    """
    upscaled = bicubic_baseline(lr, scale)
    shape = (upscaled.shape[0], 1, upscaled.shape[-2] + 8, upscaled.shape[-1] + 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    grain = gaussian_blur(noise, 9, GRAIN_BLUR)
    return ((upscaled + grain / grain.std() * sigma / 255).clamp(0, 1) * 255).round() / 255


def write_baselines(lr: Path, output: Path, scale: int = 4) -> dict[str, Path]:
    """Write both baselines of the LR folder as PNG; return their folders by name.

    What is there may be of other images of the same names: it is written anew, and PNG files of other names go.
    """
    makers = {BICUBIC: bicubic_baseline, GRAINY: bicubic_plus_grain}
    written, files = {}, folders.list_images(lr)
    for name, maker in makers.items():
        written[name] = output / name.replace("+", "-plus-")
        for seed, (stem, path) in enumerate(files.items()):
            options = {"seed": seed} if maker is bicubic_plus_grain else {}
            result = maker(folders.read_image(path), scale, **options)
            picture = codec.Photo(result[0] * 2 - 1, None, codec.read(path).form)
            codec.write(written[name] / f"{stem}.png", picture)
        for path in written[name].rglob("*.png"):
            if path.relative_to(written[name]).with_suffix("").as_posix() not in files:
                path.unlink()
    return written


def check(
    results: dict[str, Path],
    hr: Path,
    lr: Path,
    output: Path,
    wrong: dict[str, Path] | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """The check's rows: bicubic, bicubic plus grain, then each result folder.

    `wrong` maps names of `results` to folders restored with another image's condition under the image's own name.
    """
    from consissr.evaluation.evaluate import evaluate

    wrong = wrong or {}
    for name in wrong.keys() - results.keys():
        raise UserError(f"--wrong-condition {name}: no --sr folder of that name; write NAME=DIR")
    for name in (BICUBIC, GRAINY):
        if name in results:
            raise UserError(
                f"--sr {results[name]}: '{name}' names a row of the check itself; write NAME={results[name]}"
            )
    given = folders.pair({"HR": hr}, hr, lr)
    first = given.images[0]
    scale = round(given.sizes[first][0] / folders.image_sizes({first: given.lr[first]})[first][0])
    named = write_baselines(lr, output / "baselines", scale) | results
    pairs = folders.pair(named, hr, None)
    cache = output / "scores.jsonl"
    scores = evaluate(pairs, get_measures(METRICS), get_protocol("ccsr"), cache, jobs=jobs,
                      progress=progress)  # fmt: skip
    drops = {}
    for name, folder in wrong.items():
        mismatched = folders.pair({name: folder}, hr, None)
        found = evaluate(mismatched, get_measures(["psnr"]), get_protocol("ccsr"), cache, jobs=jobs)
        drops[name] = scores.mean(name, "psnr") - found.mean(name, "psnr")
    photographs = [folders.read_image(pairs.hr[image]) for image in pairs.images]
    return [
        Row(
            method.name,
            *(scores.mean(method.name, metric) for metric in METRICS),
            flat_block_ratio((folders.read_image(method.runs[0][i]) for i in pairs.images), photographs),
            drops.get(method.name, float("nan")),
        )
        for method in pairs.methods
    ]


def as_text(rows: list[Row]) -> str:
    """The rows as a Markdown table, with the definitions of the figures below it."""
    titles = ("", "PSNR-Y dB", "SSIM-Y", "NIQE", "ST-LPIPS", "flat-block ratio", "wrong-condition drop dB")
    lines = [f"| {' | '.join(titles)} |", "|---" + "|--:" * (len(titles) - 1) + "|"]
    for row in rows:
        drop = f"{row.wrong_drop:.2f}" if row.wrong_drop == row.wrong_drop else "-"
        niqe = f"{row.niqe:.2f}" if row.niqe == row.niqe else "-"
        distance = f"{row.st_lpips:.3f}" if row.st_lpips == row.st_lpips else "-"
        figures = f"{row.psnr:.2f} | {row.ssim:.4f} | {niqe} | {distance} | {row.flat_ratio:.2f} | {drop}"
        lines.append(f"| {row.name} | {figures} |")
    grain = f"Grain: {GRAIN:g} levels, blurred by {GRAIN_BLUR:g} pixels. PSNR, SSIM: protocol ccsr."
    if all(row.st_lpips != row.st_lpips for row in rows):
        grain += " ST-LPIPS needs the weights in the package stlpips-pytorch 0.0.2."
    return "\n".join([*lines, "", __doc__.split("\n\n", 1)[1].strip(), grain])
