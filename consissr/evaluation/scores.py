"""One image's scores, and many images' scores: cached by content, resumable, spread over processes."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from consissr.errors import UserError
from consissr.evaluation.protocols import MEASURES, Protocol
from consissr.evaluation.workers import cores, results

REVISION = "2"  # of our own metrics: raise it whenever a value may change
PACKAGES = {
    "own": ("torch",),
    "stlpips": ("torch", "stlpips-pytorch"),
    "pyiqa": ("torch", "pyiqa", "timm"),
    "clip": ("torch", "open_clip_torch"),
}
LR_CLIP = "clip-i-lr"  # CLIP-I(LR, HR), the denominator of delta-CLIP-I


@dataclass(frozen=True)
class Task:
    """One image to score. `keys` holds, for each metric still to compute, the name of its place in the cache."""

    keys: tuple[tuple[str, str], ...]
    sr: Path
    hr: Path | None
    lr: Path | None


@dataclass(frozen=True)
class Setting:
    """What a worker needs beside the task."""

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
    found = {}
    for package in PACKAGES[source]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def score_key(metric: str, protocol: Protocol, contents: list[str], weights: str = "") -> str:
    """Where a score is kept: metric, our revision, the packages behind it, weights, conventions, the files' contents.

    It leaves out what is not expected to change a value by more than rounding: Pillow (which decodes JPEG files), the
    device, and the numbers that NIQE compares with, of which one version exists.
    """
    source = "clip" if metric == LR_CLIP else MEASURES[metric].source
    measure = MEASURES.get(metric)
    choices = ""
    if measure and measure.needs == "hr" and source != "clip":
        choices = f"crop{protocol.crop}" + (protocol.psnr_space if metric == "psnr" else "")
    versions = ",".join(f"{name}-{number}" for name, number in package_versions(source).items())
    return "|".join([metric, f"r{REVISION}", versions, weights, choices, *contents])


def score(task: Task, setting: Setting) -> dict[str, float]:
    """The scores of one image by cache key."""
    from consissr.evaluation.folders import read_image
    from consissr.evaluation.metrics import crop_border

    sr = read_image(task.sr)
    hr = read_image(task.hr) if task.hr else None
    lr = read_image(task.lr) if task.lr else None
    scores = {}
    for metric, key in task.keys:
        scorer = get_scorer(metric, setting)
        if metric == LR_CLIP:
            scores[key] = scorer(lr, hr)
        elif MEASURES[metric].needs == "none":
            scores[key] = scorer(sr)
        elif MEASURES[metric].source == "clip":
            scores[key] = scorer(sr, hr)
        else:
            crop = setting.protocol.crop
            scores[key] = scorer(crop_border(sr, crop), crop_border(hr, crop))
    return scores


@lru_cache
def get_scorer(metric: str, setting: Setting) -> Callable[..., float]:
    """Callable on images (1, 3, H, W) in [0, 1]; learned metrics are loaded once per process."""
    from consissr.evaluation import learned, metrics, niqe, stlpips

    if metric == "psnr":
        return lambda sr, hr: metrics.psnr(sr, hr, space=setting.protocol.psnr_space).item()
    if metric == "ssim":
        return lambda sr, hr: metrics.ssim(sr, hr).item()
    if metric == "niqe":
        return lambda sr: niqe.niqe(sr).item()
    if metric == "st-lpips":
        return stlpips.ShiftTolerantLpips(stlpips.weights_file(), setting.device)
    return learned.load(metric, setting.weights, setting.device)


def score_all(
    tasks: list[Task],
    setting: Setting,
    cache: ScoreCache,
    jobs: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Score every task into the cache, over `jobs` processes (in this one when `jobs` is 1)."""
    if not tasks:
        return
    measure = partial(score, setting=setting)
    alone = jobs == 1 or len(tasks) == 1
    for done, scores in enumerate(map(measure, tasks) if alone else results(measure, tasks, jobs), 1):
        cache.put(scores)
        progress(done, len(tasks))
