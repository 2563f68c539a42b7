"""Folders of results -> every metric of every image, and the averages that tables print.

pairs = folders.pair({"OSEDiff": Path("results")}, hr=Path("HR"), lr=None)
evaluation = evaluate(pairs, get_measures(["psnr", "ssim"]), get_protocol("ccsr"), cache=Path("scores.jsonl"))
evaluation.mean("OSEDiff", "psnr")
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from consissr.errors import UserError
from consissr.evaluation import stability, stlpips, workers
from consissr.evaluation.folders import Method, Pairs
from consissr.evaluation.protocols import FID_LEAST, MEASURES, PROCESS_GIGABYTES, Measure, Protocol
from consissr.evaluation.scores import (
    LR_CLIP,
    REVISION,
    ScoreCache,
    Setting,
    Task,
    file_hashes,
    package_versions,
    score_all,
    score_key,
)


@dataclass
class Evaluation:
    """Results of all methods. Per-image values: `values[method][metric]`, shape (runs, images)."""

    pairs: Pairs
    measures: list[Measure]
    protocol: Protocol
    values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    set_values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Metrics of a whole set (FID): `set_values[method][metric]`, shape (runs,)."""
    local_std: dict[str, np.ndarray] = field(default_factory=dict)
    """L-STD per image, shape (images,), for methods with repeated runs."""
    unavailable: dict[str, str] = field(default_factory=dict)
    """Why a metric has no values, by metric."""
    versions: dict[str, str] = field(default_factory=dict)
    lr_similarity: np.ndarray | None = None
    """CLIP-I(LR, HR) per image, shape (images,)."""

    def has(self, method: str, metric: str) -> bool:
        return metric in self.values[method] or metric in self.set_values[method]

    def mean(self, method: str, metric: str) -> float:
        """Average over images and runs; NaN where the metric is unavailable."""
        if metric == "delta-clip-i" and self.has(method, metric):  # the ratio of the means (Eq. 5, ConsisSR)
            return float(self.values[method]["clip-i"].mean() / self.lr_similarity.mean() - 1)
        table = self.values[method] if metric in self.values[method] else self.set_values[method]
        return float(table[metric].mean()) if metric in table else float("nan")

    def global_std(self, method: str, metric: str) -> float:
        """G-STD; NaN for a single run and for metrics of a whole set."""
        values = self.values[method].get(metric)
        return stability.global_std(values) if values is not None and len(values) > 1 else float("nan")

    def mean_local_std(self, method: str) -> float:
        """L-STD; NaN for a single run."""
        return float(self.local_std[method].mean()) if method in self.local_std else float("nan")


def evaluate(
    pairs: Pairs,
    measures: list[Measure],
    protocol: Protocol,
    cache: Path,
    weights: Path | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    small_fid: bool = False,
) -> Evaluation:
    """Compute what `cache` does not hold yet, in `jobs` processes (default: `workers.count`'s).

    small_fid: whether to compute FID of fewer than FID_LEAST images, too. Raises UserError where none of the measures
    can be computed.
    """
    result = Evaluation(pairs, measures, protocol)
    setting, scores = Setting(protocol, weights, device), ScoreCache(cache)
    _check_references(measures, pairs)
    result.unavailable = _unavailable(measures, weights, pairs, small_fid)
    if measures and len(result.unavailable) == len(measures):
        raise UserError("\n".join(f"{name} is not computed: {why}" for name, why in result.unavailable.items()))
    taken = PROCESS_GIGABYTES + sum(m.gigabytes for m in measures if m.name not in result.unavailable)
    jobs = workers.count(jobs, device, taken)
    metrics = _raw_metrics([m.name for m in measures if m.name not in result.unavailable])
    prints = {metric: _fingerprint(metric, weights) for metric in metrics}
    result.versions = _versions(measures, prints)
    files = [f for method in pairs.methods for run in method.runs for f in run.values()]
    hashes = file_hashes(files + list((pairs.hr or {}).values()) + list((pairs.lr or {}).values()))

    def key(metric: str, image: str, run: dict[str, Path]) -> str:
        needs = "hr lr" if metric == LR_CLIP else MEASURES[metric].needs
        used = [run[image]] if metric != LR_CLIP else [pairs.lr[image]]
        used += [pairs.hr[image]] if "hr" in needs else []
        return score_key(metric, protocol, [hashes[file] for file in used], prints[metric])

    per_image = [metric for metric in metrics if metric != "fid"]
    tasks, planned = [], set()
    for method, image in product(pairs.methods, pairs.images):
        for run in method.runs:
            wanted = {metric: key(metric, image, run) for metric in per_image}
            missing = tuple((m, k) for m, k in wanted.items() if k not in scores and k not in planned)
            planned.update(k for _, k in missing)
            if missing:
                hr, lr = ((table or {}).get(image) for table in (pairs.hr, pairs.lr))
                tasks.append(Task(missing, run[image], hr, lr))
    score_all(tasks, setting, scores, jobs, progress)

    for method in pairs.methods:
        table = {
            metric: np.array([[scores[key(metric, image, run)] for image in pairs.images] for run in method.runs])
            for metric in per_image
        }
        if LR_CLIP in table:
            result.lr_similarity = table.pop(LR_CLIP)[0]
            if "delta-clip-i" not in result.unavailable and MEASURES["delta-clip-i"] in measures:
                table["delta-clip-i"] = table["clip-i"] / result.lr_similarity - 1  # (Eq. 5, ConsisSR)
        result.values[method.name] = table
        result.set_values[method.name] = {}
        if "fid" in metrics:
            result.set_values[method.name]["fid"] = _fid(method, pairs, hashes, prints["fid"], setting, scores)
        if len(method.runs) > 1:
            result.local_std[method.name] = _local_std(method, pairs.images, hashes, protocol, scores, jobs)
    return result


def _raw_metrics(names: list[str]) -> list[str]:
    """What to compute for each image; delta-CLIP-I follows from two similarities."""
    if "delta-clip-i" not in names:
        return names
    return [name for name in names if name not in ("delta-clip-i", "clip-i")] + ["clip-i", LR_CLIP]


def _check_references(measures: list[Measure], pairs: Pairs) -> None:
    for measure in measures:
        if measure.needs != "none" and pairs.hr is None:
            raise UserError(f"{measure.name} compares with HR images: give --hr FOLDER, or leave it out of --metrics")
        if "lr" in measure.needs and pairs.lr is None:
            raise UserError(f"{measure.name} also needs LR images: give --lr FOLDER, or leave it out of --metrics")


def _unavailable(measures: list[Measure], weights: Path | None, pairs: Pairs, small_fid: bool) -> dict[str, str]:
    reasons = {}
    for measure in measures:
        reason = ""
        if measure.source == "stlpips" and stlpips.weights_file() is None:
            reason = "its weights come with a package that is not installed: pip install stlpips-pytorch==0.0.2"
        if measure.source in ("pyiqa", "clip"):
            from consissr.evaluation.learned import missing_text

            reason = missing_text(measure.name, weights)
        if measure.name == "niqe" and (small := pairs.smaller_than(96, 192)):
            reason = f"needs images of at least 96x192 pixels; smaller: {small}"
        if measure.name == "ssim" and (small := pairs.smaller_than(11, 11)):
            reason = f"needs images of at least 11x11 pixels; smaller: {small}"
        if measure.name == "fid" and len(pairs.images) < FID_LEAST and not small_fid:
            reason = f"of {len(pairs.images)} images it says nothing: use {FID_LEAST} or more, or --small-fid"
        if reason:
            reasons[measure.name] = reason
    return reasons


def _fingerprint(metric: str, weights: Path | None) -> str:
    source = "clip" if metric == LR_CLIP else MEASURES[metric].source
    if source == "own":
        return ""
    if source == "stlpips":
        return stlpips.DIGEST[:16]
    from consissr.evaluation.learned import fingerprint

    return fingerprint(metric, weights)


def _versions(measures: list[Measure], prints: dict[str, str]) -> dict[str, str]:
    import consissr

    versions = {"consissr": consissr.__version__, "metrics revision": REVISION}
    for source in dict.fromkeys(["own", *(measure.source for measure in measures)]):
        versions |= package_versions(source)
    return versions | {f"{metric} weights": digest for metric, digest in prints.items() if digest}


def _digest(files: list[Path], hashes: dict[Path, str]) -> str:
    return hashlib.sha256("".join(hashes[file] for file in files).encode()).hexdigest()[:32]


def _fid(method: Method, pairs: Pairs, hashes: dict, weights: str, setting: Setting, scores: ScoreCache) -> np.ndarray:
    from consissr.evaluation.learned import frechet_distance

    values = []
    for run in method.runs:
        sr, hr = ([table[image] for image in pairs.images] for table in (run, pairs.hr))
        key = score_key("fid", setting.protocol, [_digest(sr + hr, hashes)], weights)
        if key not in scores:
            scores.put({key: frechet_distance(sr, hr, setting.weights, setting.device)})
        values.append(scores[key])
    return np.array(values)


def _local_std(
    method: Method, images: list[str], hashes: dict, protocol: Protocol, scores: ScoreCache, jobs: int
) -> np.ndarray:
    """L-STD per image; files are read and compared in threads, which Pillow and numpy let run side by side."""
    files = {image: [run[image] for run in method.runs] for image in images}
    keys = {
        image: "|".join(["l-std", f"r{REVISION}", f"crop{protocol.local_std_crop}", _digest(files[image], hashes)])
        for image in images
    }
    missing = [image for image in images if keys[image] not in scores]
    measure = partial(stability.local_std_of_files, crop=protocol.local_std_crop)
    with ThreadPoolExecutor(jobs) as pool:
        for image, value in zip(missing, pool.map(measure, (files[image] for image in missing)), strict=True):
            scores.put({keys[image]: value})
    return np.array([scores[keys[image]] for image in images])
