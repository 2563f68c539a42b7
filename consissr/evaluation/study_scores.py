"""What a study's results measure: per-image values by row and training seed, and its comparisons with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from consissr.errors import UserError
from consissr.evaluation import tables
from consissr.evaluation.bootstrap import Difference, paired, verdict
from consissr.evaluation.check import flat_block_ratio, write_baselines
from consissr.evaluation.curves import step_evaluation
from consissr.evaluation.evaluate import evaluate
from consissr.evaluation.folders import Method, Pairs, list_images, list_runs, pair, read_image
from consissr.evaluation.protocols import get_measures, get_protocol
from consissr.evaluation.studies import METRICS, Comparison, Results, Study
from consissr.evaluation.study_run import DONE, REALSR, Setting, is_restored

PROTOCOL = "ccsr"
STEP_METRICS = ("psnr", "ssim")
"""Of the pictures that sampling steps expect (Fig. 8, ConsisSR, has LPIPS, too)."""


@dataclass
class Scores:
    """Per-image values of one data set: `values[row][seed][metric]` (images,), metrics as in COMPARED."""

    dataset: str
    images: list[str]
    values: dict[str, dict[int, dict[str, np.ndarray]]] = field(default_factory=dict)
    runs: dict[str, dict[int, dict[str, np.ndarray]]] = field(default_factory=dict)
    """The same before averaging: (runs, images), metrics as in METRICS."""
    flat: dict[str, float] = field(default_factory=dict)
    """Flat-block ratio (see check.py) of each row's first run: grain, which NIQE rewards, lifts it well above 1."""

    def mean(self, row: str, metric: str) -> np.ndarray:
        """(images,), averaged over training seeds."""
        return np.mean([values[metric] for values in self.values[row].values()], axis=0)


@dataclass(frozen=True)
class Finding:
    """A comparison's outcome on one data set and metric."""

    comparison: Comparison
    metric: str
    dataset: str
    found: Difference
    seeds: list[int]
    verdict: str
    published: tuple[float, float]
    """The papers' values of both rows; NaN where there is none."""


class Published:
    """The papers' values of a study's rows."""

    def __init__(self, study: Study, papers: Path) -> None:
        self.study, self.papers = study, papers
        self.tables: dict[str, tables.Table] = {}

    def cells(self, row: str) -> dict[str, tables.Cell]:
        """The published cells beside which `row` stands; {} for none."""
        one = self.study.rows.get(row)
        if one is None or not one.published:
            return {}
        name = one.table or self.study.published["table"]
        if name not in self.tables:
            self.tables[name] = tables.load_table(name, self.papers)
        return self.tables[name].datasets[self.study.published["dataset"]][one.published]

    def value(self, row: str, metric: str) -> float:
        """One published value, a mean, G-STD or L-STD; NaN where there is none."""
        name, _, kind = metric.partition("-gstd")
        cell = self.cells(row).get(metric if metric == "l-std" else name, tables.Cell())
        return cell.spread if metric.endswith("-gstd") else cell.value


def restored(setting: Setting, study: Study, dataset: str) -> tuple[list[Results], list[str]]:
    """Complete results of a data set, and what is missing in words."""
    lr = setting.plan.out / "data" / dataset / "LR"
    images = set(list_images(lr)) if lr.is_dir() else set()
    ready, lacking = [], []
    for row in study.rows:
        for results in setting.plan.results(study.name, row):
            label = row + (f", training seed {results.seed}" if "-seed" in results.folder.name else "")
            if results.training and not (Path(results.model) / DONE).is_file():
                lacking.append(f"{label}: not trained ({results.training})")
            elif not images or not is_restored(results, dataset, images, study.repeats):
                lacking.append(f"{label}: not restored on {dataset}")
            else:
                ready.append(results)
    return ready, lacking


def measure(setting: Setting, dataset: str, ready: list[Results], repeats: int) -> Scores:
    """Every metric of every result, and of bicubic enlargement for scale.

    Scores are cached in OUT/data/<dataset>.jsonl for all studies.
    """
    hr = setting.plan.out / "data" / dataset / "HR"
    base = pair({"HR": hr}, hr, None)
    methods = []
    for results in ready:
        runs = [list_images(run) for run in list_runs(results.folder / dataset)[:repeats]]
        methods.append(Method(f"{results.row}\n{results.seed}", runs))
    baselines = write_baselines(hr.with_name("LR"), hr.with_name("baselines"), REALSR["scale"])
    methods += [Method(f"{name}\n0", [list_images(folder)]) for name, folder in baselines.items()]
    pairs = Pairs(methods, base.images, base.hr, None, base.sizes)
    cache = setting.plan.out / "data" / f"{dataset}.jsonl"
    done = evaluate(pairs, get_measures(list(METRICS)), get_protocol(PROTOCOL), cache, jobs=setting.jobs)
    if done.unavailable:
        raise UserError("; ".join(f"{metric}: {reason}" for metric, reason in done.unavailable.items()))
    scores = Scores(dataset, base.images)
    for method in methods:
        row, seed = method.name.split("\n")
        table = done.values[method.name]
        values = {name: table[name].mean(axis=0) for name in METRICS}
        unknown = np.full(len(base.images), math.nan)  # a single run has no deviation
        repeated = len(method.runs) > 1
        values |= {
            f"{name}-gstd": table[name].std(axis=0) if repeated else unknown for name in METRICS
        }  # (Eq. 4, CCSR)
        values["l-std"] = done.local_std.get(method.name, unknown)
        scores.values.setdefault(row, {})[int(seed)] = values
        scores.runs.setdefault(row, {})[int(seed)] = table
        if row not in scores.flat:
            first = (read_image(method.runs[0][image]) for image in base.images)
            scores.flat[row] = flat_block_ratio(first, [read_image(base.hr[image]) for image in base.images])
    return scores


def compare(study: Study, scores: Scores, published: Published) -> list[Finding]:
    """The study's comparisons on one data set; rows with several training seeds are compared seed by seed."""
    findings = []
    for comparison in study.comparisons:
        a, b = (scores.values.get(row, {}) for row in comparison.rows)
        seeds = sorted(a.keys() & b.keys()) or [None] * bool(a and b)
        if not seeds:
            continue
        for metric, expected in comparison.expect.items():
            first, second = (
                np.stack([(table[s] if s is not None else next(iter(table.values())))[metric] for s in seeds])
                for table in (a, b)
            )
            found = paired(first, second)
            said = verdict(found, expected, comparison.within)
            values = tuple(published.value(row, metric) for row in comparison.rows)
            findings.append(Finding(comparison, metric, scores.dataset, found, seeds, said, values))
    return findings


@dataclass
class StepScores:
    """Per-image values, averaged over runs, of what each sampling step expects."""

    rows: list[str]
    timesteps: list[int]
    """Noisiest first."""
    table: dict[tuple[str, int, str, int], np.ndarray]
    """By row, training seed, metric and timestep: (images,)."""

    def values(self, row: str, metric: str, t: int) -> np.ndarray:
        """(seeds, images), training seeds in order."""
        seeds = sorted({seed for name, seed, _, _ in self.table if name == row})
        return np.stack([self.table[row, seed, metric, t] for seed in seeds])


def measure_steps(setting: Setting, study: Study, ready: list[Results]) -> StepScores | None:
    """The steps of the study's curves on the real pairs; None until the curves' rows are all restored."""
    rows = list(study.curves.get("rows", []))
    wanted = [r for r in ready if r.row in rows]
    if not rows or {r.row for r in wanted} != set(rows):
        return None
    seeds = set.intersection(*({r.seed for r in wanted if r.row == row} for row in rows))
    places = {f"{r.row}\n{r.seed}": r.folder / "realsr" for r in wanted if r.seed in seeds}
    data = setting.plan.out / "data"
    done, methods = step_evaluation(places, data / "realsr" / "HR", get_measures(list(STEP_METRICS)),
                                    get_protocol(PROTOCOL), data / "realsr.jsonl", jobs=setting.jobs)  # fmt: skip
    found = StepScores(rows, sorted({t for _, t in methods}, reverse=True), {})
    for method, (name, t) in zip(done.pairs.methods, methods, strict=True):
        row, seed = name.split("\n")
        for metric in STEP_METRICS:
            found.table[row, int(seed), metric, t] = done.values[method.name][metric].mean(axis=0)
    return found


def compare_steps(study: Study, steps: StepScores) -> list[Finding]:
    """The curves' first row against the second: at each timestep, and over the early ones, which the claim is about."""
    first, second = steps.rows
    early = [t for t in steps.timesteps if t >= study.curves["early"]]
    findings = []
    for metric in STEP_METRICS:
        for label, times in [(f"t >= {study.curves['early']}", early), *((f"t = {t}", [t]) for t in steps.timesteps)]:
            a, b = (np.mean([steps.values(row, metric, t) for t in times], axis=0) for row in (first, second))
            name = f"{metric} at {label}"
            comparison = Comparison(rows=(first, second), expect={name: "higher"}, claim=study.curves["claim"],
                                    source=study.curves["source"])  # fmt: skip
            found = paired(a, b)
            seeds = list(range(len(found.seeds)))
            none = (math.nan, math.nan)
            findings.append(Finding(comparison, name, "realsr", found, seeds, verdict(found, "higher"), none))
    return findings
