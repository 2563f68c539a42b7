"""One image's scores, and many images' scores: cached by content, resumable, spread over processes."""

import contextlib
import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from consissr.config.machine import cores
from consissr.errors import UserError
from consissr.evaluation import flat, learned, metrics, niqe, stability, stlpips
from consissr.evaluation.folders import read_image
from consissr.evaluation.progress import track
from consissr.evaluation.protocols import Measure, Protocol
from consissr.evaluation.workers import results

REVISION = "2"
"""Of our own metrics: raise it whenever a value may change."""
PACKAGES = {
    "own": ("torch",),
    "stlpips": ("torch", "stlpips-pytorch"),
    "pyiqa": ("torch", "pyiqa", "timm"),
    "clip": ("torch", "open_clip_torch"),
}


@dataclass(frozen=True)
class Scoring:
    """How scores are computed."""

    protocol: Protocol
    weights: Path | None
    device: str


class ScoreCache:
    """Scores by key in a JSON-lines file. Each score is written as it arrives, so a killed run resumes where it was.

    A score that does not exist (NIQE of a flat image) is NaN here and null in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores: dict[str, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a score cache: remove it") from None
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a killed run left half a line
            path.write_text(whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                key, value = json.loads(line)
                self.scores[key] = math.nan if value is None else float(value)
            except (ValueError, TypeError):
                raise UserError(f"{path} is not a score cache (line {number}): remove it") from None

    def __contains__(self, key: str) -> bool:
        return key in self.scores

    def __getitem__(self, key: str) -> float:
        return self.scores[key]

    def put(self, scores: dict[str, float]) -> None:
        self.scores.update(scores)
        lines = [json.dumps([key, None if math.isnan(value) else value]) for key, value in scores.items()]
        with self.path.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))


def file_hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """Content hash of every file (SHA-256, 32 hexadecimal digits)."""
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(cores()) as pool:
        digests = pool.map(lambda path: hashlib.sha256(path.read_bytes()).hexdigest()[:32], paths)
        return dict(zip(paths, digests, strict=True))


@lru_cache
def package_versions(source: str) -> dict[str, str]:
    """Versions of the packages behind one source of metrics."""
    versions = dict.fromkeys(PACKAGES[source], "absent")
    for package in versions:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def score_key(measure: Measure, protocol: Protocol, contents: list[str], weights: str = "") -> str:
    """Where a score is kept: metric, our revision, the packages behind it, weights, conventions, the files' contents.

    It leaves out what is not expected to change a value by more than rounding: Pillow (which decodes JPEG files), the
    device, and the numbers that NIQE compares with, of which one version exists.
    """
    choices = f"crop{protocol.crop}" if measure.cropped else ""
    choices += protocol.psnr_space if measure.name == "psnr" else ""
    versions = ",".join(f"{name}-{number}" for name, number in package_versions(measure.source).items())
    return "|".join([measure.name, f"r{REVISION}", versions, weights, choices, *contents])


# --- tasks: each returns scores by key ---


def image_scores(measures: dict[str, Measure], files: dict[str, Path], scoring: Scoring) -> dict[str, float]:
    """One image by several measures, given by key; files: by role ('sr', 'hr', 'lr')."""
    images = {role: read_image(files[role]) for role in {role for m in measures.values() for role in m.needs}}
    scores = {}
    for key, measure in measures.items():
        border = scoring.protocol.crop if measure.cropped else 0
        scorer = get_scorer(measure.name, scoring)
        scores[key] = scorer(*(metrics.crop_border(images[role], border) for role in measure.needs))
    return scores


def spread_scores(key: str, files: list[Path], protocol: Protocol) -> dict[str, float]:
    """L-STD of one image from its runs."""
    return {key: stability.local_std_of_files(files, protocol.local_std_crop)}


def set_scores(key: str, metric: str, sr: list[Path], hr: list[Path], scoring: Scoring) -> dict[str, float]:
    """FID or the flat-block ratio of two sets of images."""
    if metric == "flat":
        return {key: flat.flat_block_ratio(map(read_image, sr), map(read_image, hr))}
    return {key: learned.frechet_distance(sr, hr, scoring.weights, scoring.device)}


def score_all(tasks: list[Callable[[], dict[str, float]]], cache: ScoreCache, jobs: int) -> None:
    """Run every task into the cache, over `jobs` processes (in this one when `jobs` is 1)."""
    alone = jobs == 1 or len(tasks) < 2
    done = (task() for task in tasks) if alone else results(operator.call, tasks, jobs)
    for scores in track("scoring", done, len(tasks)):
        cache.put(scores)


@lru_cache
def get_scorer(metric: str, scoring: Scoring) -> Callable[..., float]:
    """Callable on images (1, 3, H, W) in [0, 1]; learned metrics are loaded once per process."""
    if metric == "psnr":
        return lambda sr, hr: metrics.psnr(sr, hr, space=scoring.protocol.psnr_space).item()
    if metric == "ssim":
        return lambda sr, hr: metrics.ssim(sr, hr).item()
    if metric == "niqe":
        return lambda sr: niqe.niqe(sr).item()
    if metric == "st-lpips":
        return stlpips.ShiftTolerantLpips(stlpips.weights_file(), scoring.device)
    return learned.load(metric, scoring.weights, scoring.device)
