"""Folders of results -> every metric of every image, and the averages that tables print.

pairs = folders.pair({"OSEDiff": Path("results")}, hr=Path("HR"), lr=None)
evaluation = evaluate(pairs, get_measures(["psnr", "ssim"]), get_protocol("ccsr"), cache=Path("scores.jsonl"))
evaluation.mean("OSEDiff", "psnr")
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np

from consissr.errors import UserError
from consissr.evaluation import learned, stability, stlpips, workers
from consissr.evaluation.bootstrap import Estimate, interval
from consissr.evaluation.folders import Method, Pairs
from consissr.evaluation.protocols import FID_LEAST, LR_CLIP, MEASURES, Measure, Protocol, gigabytes
from consissr.evaluation.scores import (
    REVISION,
    ScoreCache,
    Scoring,
    file_hashes,
    image_scores,
    package_versions,
    score_all,
    score_key,
    set_scores,
    spread_scores,
)


@dataclass
class Evaluation:
    """Results of all methods. Per-image values: `values[method][metric]`, shape (runs, images)."""

    pairs: Pairs
    measures: list[Measure]
    protocol: Protocol
    unavailable: dict[str, str] = field(default_factory=dict)
    """Why a metric has no values, by metric."""
    values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    set_values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Metrics of a whole set (FID): `set_values[method][metric]`, shape (runs,)."""
    local_std: dict[str, np.ndarray] = field(default_factory=dict)
    """L-STD per image, shape (images,), for methods with repeated runs."""
    versions: dict[str, str] = field(default_factory=dict)
    lr_similarity: np.ndarray | None = None
    """CLIP-I(LR, HR) per image, shape (images,)."""

    def mean(self, method: str, metric: str) -> float:
        """Average over images and runs; NaN where the metric is unavailable."""
        table = self.values[method] | self.set_values[method]
        if metric == "delta-clip-i" and metric in table:  # over a set: the ratio of the means (ours)
            return float(delta_clip_i(table["clip-i"].mean(), self.lr_similarity.mean()))
        return float(table[metric].mean()) if metric in table else float("nan")

    def global_std(self, method: str, metric: str) -> float:
        """G-STD; NaN for a single run and for metrics of a whole set."""
        values = self.values[method].get(metric)
        return stability.global_std(values) if values is not None and len(values) > 1 else float("nan")

    def mean_local_std(self, method: str) -> float:
        """L-STD, its mean over the images (Eq. 5, CCSR); NaN for a single run."""
        return float(self.local_std[method].mean()) if method in self.local_std else float("nan")

    @cached_property
    def differences(self) -> dict[str, dict[str, Estimate]]:
        """Of every method but the first: its values minus the first's, image by image, with 95 % bootstrap intervals.

        By method and metric; runs are averaged first, and images without a value left out.
        """
        first, *others = (method.name for method in self.pairs.methods)
        estimates: dict[str, dict[str, Estimate]] = {}
        for name, metric in product(others, (m.name for m in self.measures if m.name in self.values[first])):
            a, b = (self.values[n][metric].mean(axis=0) for n in (name, first))
            known = (a - b)[~np.isnan(a - b)]
            if len(known) > 1:
                estimates.setdefault(name, {})[metric] = interval(known)
        return estimates


def evaluate(
    pairs: Pairs,
    measures: list[Measure],
    protocol: Protocol,
    cache: Path,
    weights: Path | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    small_fid: bool = False,
) -> Evaluation:
    """Compute what `cache` does not hold yet, in `jobs` processes (default: `workers.count`'s).

    small_fid: whether to compute FID of fewer than FID_LEAST images, too. Raises UserError where none of the measures
    can be computed.
    """
    result = Evaluation(pairs, measures, protocol, _unavailable(measures, protocol, weights, pairs, small_fid))
    if measures and len(result.unavailable) == len(measures):
        raise UserError("\n".join(f"{name} is not computed: {why}" for name, why in result.unavailable.items()))
    raw = _raw([m for m in measures if m.name not in result.unavailable])
    jobs = workers.count(jobs, device, gigabytes(raw, max(w * h for w, h in pairs.sizes.values()) / 2**20))
    prints = {m.name: _fingerprint(m, weights) for m in raw}
    result.versions = _versions(measures, prints)
    scoring, scores = Scoring(protocol, weights, device), ScoreCache(cache)
    hashes = file_hashes(
        [file for method in pairs.methods for run in method.runs for file in run.values()]
        + [file for table in (pairs.hr, pairs.lr) for file in (table or {}).values()]
    )

    def files(image: str, run: dict[str, Path]) -> dict[str, Path]:
        tables = {"sr": run, "hr": pairs.hr, "lr": pairs.lr}
        return {role: table[image] for role, table in tables.items() if table}

    def key(measure: Measure, image: str, run: dict[str, Path]) -> str:
        contents = [hashes[files(image, run)[role]] for role in measure.needs]
        return score_key(measure, protocol, contents, prints[measure.name])

    def set_files(run: dict[str, Path]) -> list[list[Path]]:
        return [[table[image] for image in pairs.images] for table in (run, pairs.hr)]

    def set_key(measure: Measure, run: dict[str, Path]) -> str:
        sr, hr = set_files(run)
        return score_key(measure, protocol, [_digest(sr + hr, hashes)], prints[measure.name])

    def spread_key(method: Method, image: str) -> str:
        digest = _digest([run[image] for run in method.runs], hashes)
        return "|".join(["l-std", f"r{REVISION}", f"crop{protocol.local_std_crop}", digest])

    tasks, planned = [], set()

    def missing(*keys: str) -> list[str]:
        fresh = [k for k in keys if k not in scores and k not in planned]
        planned.update(fresh)
        return fresh

    image_measures, set_measures = ([m for m in raw if m.of_set == whole] for whole in (False, True))
    for method, m in product(pairs.methods, set_measures):
        for run in method.runs:
            tasks += [partial(set_scores, k, m.name, *set_files(run), scoring) for k in missing(set_key(m, run))]
    for image, method in product(pairs.images, pairs.methods):
        for run in method.runs:
            wanted = {key(m, image, run): m for m in image_measures}
            if fresh := missing(*wanted):
                tasks.append(partial(image_scores, {k: wanted[k] for k in fresh}, files(image, run), scoring))
        if len(method.runs) > 1:
            runs = [run[image] for run in method.runs]
            tasks += [partial(spread_scores, k, runs, protocol) for k in missing(spread_key(method, image))]
    score_all(tasks, scores, jobs)

    for method in pairs.methods:
        table = {
            m.name: np.array([[scores[key(m, image, run)] for image in pairs.images] for run in method.runs])
            for m in image_measures
        }
        if LR_CLIP.name in table:
            result.lr_similarity = table.pop(LR_CLIP.name)[0]
            table["delta-clip-i"] = delta_clip_i(table["clip-i"], result.lr_similarity)
        result.values[method.name] = table
        result.set_values[method.name] = {
            m.name: np.array([scores[set_key(m, run)] for run in method.runs]) for m in set_measures
        }
        if len(method.runs) > 1:
            result.local_std[method.name] = np.array([scores[spread_key(method, image)] for image in pairs.images])
    return result


def delta_clip_i(result: np.ndarray, lq: np.ndarray) -> np.ndarray:
    """How much closer to HR a result is than its low-quality input, 0 for no closer.

    result, lq: CLIP's similarity of each to HR, -1 to 1, of shapes that broadcast: (runs, images) and (images,).
    """
    # sim(SR, HR) / sim(LR, HR) - 1  (Eq. 5, ConsisSR)
    return result / lq - 1


def _raw(measures: list[Measure]) -> list[Measure]:
    """What to compute for each image; delta-CLIP-I follows from two similarities."""
    delta, clip = MEASURES["delta-clip-i"], MEASURES["clip-i"]
    return [m for m in measures if m not in (delta, clip)] + [clip, LR_CLIP] if delta in measures else measures


def _unavailable(
    measures: list[Measure], protocol: Protocol, weights: Path | None, pairs: Pairs, small_fid: bool
) -> dict[str, str]:
    """Why a measure cannot be computed, by name. Raises UserError where folders are missing that it compares with."""
    reasons = {}
    for measure in measures:
        if "hr" in measure.needs and pairs.hr is None:
            raise UserError(f"{measure.name} compares with HR images: give --hr FOLDER, or leave it out of --metrics")
        if "lr" in measure.needs and pairs.lr is None:
            raise UserError(f"{measure.name} also needs LR images: give --lr FOLDER, or leave it out of --metrics")
        border = 2 * protocol.crop if measure.cropped else 0
        short, long = (max(side, 1) + border for side in measure.smallest)
        reason = ""
        if measure.source == "stlpips" and stlpips.weights_file() is None:
            reason = "its weights come with a package that is not installed: pip install stlpips-pytorch==0.0.2"
        elif measure.source in ("pyiqa", "clip"):
            reason = learned.missing_text(measure.name, weights)
        if small := pairs.smaller_than(short, long):
            reason = f"needs images of at least {short}x{long} pixels; smaller: {small}"
        if measure.name == "fid" and len(pairs.images) < FID_LEAST and not small_fid:
            reason = f"of {len(pairs.images)} images it says nothing: use {FID_LEAST} or more, or --small-fid"
        if reason:
            reasons[measure.name] = reason
    return reasons


def _fingerprint(measure: Measure, weights: Path | None) -> str:
    if measure.source in ("own", "stlpips"):
        return stlpips.DIGEST[:16] if measure.source == "stlpips" else ""
    return learned.fingerprint(measure.name, weights)


def _versions(measures: list[Measure], prints: dict[str, str]) -> dict[str, str]:
    import consissr

    versions = {"consissr": consissr.__version__, "metrics revision": REVISION}
    for source in dict.fromkeys(["own", *(measure.source for measure in measures)]):
        versions |= package_versions(source)
    return versions | {f"{metric} weights": digest for metric, digest in prints.items() if digest}


def _digest(files: list[Path], hashes: dict[Path, str]) -> str:
    return hashlib.sha256("".join(hashes[file] for file in files).encode()).hexdigest()[:32]
