"""What a study's results measure: per-image values by row and training seed, and its comparisons with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from consissr.config.loading import nearest
from consissr.errors import UserError
from consissr.evaluation import tables
from consissr.evaluation.bootstrap import Difference, paired, verdict
from consissr.evaluation.check import flat_block_ratio, write_baselines
from consissr.evaluation.curves import step_pictures, timesteps
from consissr.evaluation.evaluate import Evaluation, evaluate
from consissr.evaluation.folders import Method, Pairs, list_images, list_runs, pair, read_image
from consissr.evaluation.protocols import get_measures, get_protocol
from consissr.studies.run import REALSR, Setting, done_record, is_restored, otherwise
from consissr.studies.spec import LEAST, METRICS, Comparison, Results, Study

PROTOCOL = "ccsr"
STEP_METRICS = ("psnr", "ssim")
"""Of the pictures that sampling steps expect (Fig. 8, ConsisSR, has LPIPS, too)."""


@dataclass(frozen=True)
class Model:
    """What results were restored with: the training's key or the bundled name."""

    name: str
    trained: bool
    """Whether a study trained it, with a seed of its own."""

    @classmethod
    def of(cls, results: Results) -> Model:
        return cls(results.training or results.model, bool(results.training))


@dataclass
class Scores:
    """Per-image values of one data set: `values[row][seed][metric]` (images,), metrics as in COMPARED."""

    dataset: str
    images: list[str]
    values: dict[str, dict[int, dict[str, np.ndarray]]] = field(default_factory=dict)
    runs: dict[str, dict[int, dict[str, np.ndarray]]] = field(default_factory=dict)
    """The same before averaging: (runs, images), metrics as in METRICS."""
    flat: dict[str, dict[int, float]] = field(default_factory=dict)
    """Flat-block ratio (see check.py) of the first run: grain, which NIQE rewards, lifts it well above 1."""
    models: dict[str, dict[int, Model]] = field(default_factory=dict)
    """What restored; none for the rows for scale."""

    def mean(self, row: str, metric: str) -> np.ndarray:
        """(images,), averaged over training seeds."""
        return np.mean([values[metric] for values in self.values[row].values()], axis=0)

    def flat_mean(self, row: str) -> float:
        """The flat-block ratio, averaged over training seeds."""
        return float(np.mean(list(self.flat[row].values())))


@dataclass(frozen=True)
class Finding:
    """A comparison's outcome on one data set and metric."""

    comparison: Comparison
    metric: str
    dataset: str
    found: Difference
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
        told = self.tables[name].datasets[self.tables[name].dataset(self.study.published["dataset"])]
        if one.published not in told:
            raise UserError(f"study {self.study.name}: {name} has no row '{one.published}', beside which {row} is to "
                            f"stand{nearest(one.published, list(told))}")  # fmt: skip
        return told[one.published]

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
            if results.training and not done_record(results.model):
                lacking.append(f"{label}: not trained ({results.training})")
            elif differ := otherwise(results, dataset):
                lacking.append(f"{label}: restored otherwise on {dataset} ({', '.join(differ)})")
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
    methods = []
    for results in ready:
        runs = [list_images(run) for run in list_runs(results.folder / dataset)[:repeats]]
        methods.append(Method(f"{results.row}\n{results.seed}", runs))
    baselines = write_baselines(hr.with_name("LR"), hr.with_name("baselines"), REALSR["scale"])
    methods += [Method(f"{name}\n0", [list_images(folder)]) for name, folder in baselines.items()]
    done = evaluated(setting, dataset, methods, METRICS)
    base = done.pairs
    scores = Scores(dataset, base.images)
    for results in ready:
        scores.models.setdefault(results.row, {})[results.seed] = Model.of(results)
    photographs = [read_image(base.hr[image]) for image in base.images]
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
        first = (read_image(method.runs[0][image]) for image in base.images)
        scores.flat.setdefault(row, {})[int(seed)] = flat_block_ratio(first, photographs)
    return scores


def evaluated(setting: Setting, dataset: str, methods: list[Method], metrics: tuple[str, ...]) -> Evaluation:
    """Metrics of a data set's images. Raises UserError where one cannot be computed."""
    data = setting.plan.out / "data"
    base = pair({"HR": data / dataset / "HR"}, data / dataset / "HR", None)
    pairs = Pairs(methods, base.images, base.hr, None, base.sizes)
    done = evaluate(pairs, get_measures(list(metrics)), get_protocol(PROTOCOL), data / f"{dataset}.jsonl",
                    jobs=setting.jobs)  # fmt: skip
    if done.unavailable:
        raise UserError("; ".join(f"{metric}: {reason}" for metric, reason in done.unavailable.items()))
    return done


def paired_seeds(a: dict[int, Model], b: dict[int, Model]) -> list[tuple[int, int]]:
    """The training seeds at which two rows are compared: those that both have.

    A row without training stands beside each of the other's.
    """
    for one, other, swap in ((a, b, False), (b, a, True)):
        if len(one) == 1 and not next(iter(one.values())).trained:
            (own,) = one
            return [(seed, own) if swap else (own, seed) for seed in sorted(other)]
    return [(seed, seed) for seed in sorted(a.keys() & b.keys())]


def one_training(models: list[tuple[Model, Model]]) -> bool:
    """Whether a single training of each model stands behind a difference; False where one model restored both rows."""
    return len(models) == 1 and models[0][0] != models[0][1]


def compare(study: Study, scores: Scores, published: Published) -> list[Finding]:
    """The study's comparisons on one data set; rows with several training seeds are compared seed by seed."""
    findings = []
    for comparison in study.comparisons:
        models = [scores.models.get(row, {}) for row in comparison.rows]
        seeds = paired_seeds(*models)
        if not seeds:
            continue
        single = one_training([(models[0][i], models[1][k]) for i, k in seeds])
        a, b = (scores.values[row] for row in comparison.rows)
        for metric, expected in comparison.expect.items():
            found = paired(np.stack([a[i][metric] for i, _ in seeds]), np.stack([b[k][metric] for _, k in seeds]))
            said = verdict(found, expected, LEAST[metric], single)
            values = tuple(published.value(row, metric) for row in comparison.rows)
            findings.append(Finding(comparison, metric, scores.dataset, found, said, values))
    return findings


@dataclass
class StepScores:
    """Per-image values, averaged over runs, of what each sampling step expects."""

    rows: list[str]
    timesteps: list[int]
    """Noisiest first."""
    table: dict[tuple[str, int, str, int], np.ndarray]
    """By row, training seed, metric and timestep: (images,)."""
    one_training: bool
    """See the function."""

    def values(self, row: str, metric: str, t: int) -> np.ndarray:
        """(seeds, images), training seeds in order."""
        seeds = sorted({seed for name, seed, _, _ in self.table if name == row})
        return np.stack([self.table[row, seed, metric, t] for seed in seeds])


def measure_steps(setting: Setting, study: Study, ready: list[Results]) -> tuple[StepScores | None, list[str]]:
    """The steps of the study's curves on the real pairs, and what is missing in words.

    None until the curves' rows are restored, with pictures of steps, at a training seed that both have. Timesteps are
    those that all have.
    """
    rows = list(study.curves.get("rows", []))
    wanted = [r for r in ready if r.row in rows]
    if not rows or {r.row for r in wanted} != set(rows):
        return None, []
    images = sorted(list_images(setting.plan.out / "data" / "realsr" / "HR"))
    runs, missing = {}, []
    for r in wanted:
        try:
            found = [step_pictures(run) for run in list_runs(r.folder / "realsr")[: study.repeats]]
            runs[r.row, r.seed] = found, timesteps(found, images, r.folder)
        except UserError:
            missing.append(f"curves: {r.folder} lacks pictures of its sampling steps: remove it and restore again")
    models = [{r.seed: Model.of(r) for r in wanted if r.row == row and (row, r.seed) in runs} for row in rows]
    seeds = sorted(models[0].keys() & models[1].keys())
    grids = [set(runs[row, seed][1]) for row in rows for seed in seeds]
    shared = sorted(set.intersection(*grids), reverse=True) if grids else []
    if not shared:
        return None, missing or [f"curves: {' and '.join(rows)} share no training seed and timestep"]
    methods = [Method(f"{row}\n{seed}\n{t}", [{i: run[i][t] for i in images} for run in runs[row, seed][0]])
               for row in rows for seed in seeds for t in shared]  # fmt: skip
    done = evaluated(setting, "realsr", methods, STEP_METRICS)
    steps = StepScores(rows, shared, {}, one_training([(models[0][s], models[1][s]) for s in seeds]))
    for method in methods:
        row, seed, t = method.name.split("\n")
        for metric in STEP_METRICS:
            steps.table[row, int(seed), metric, int(t)] = done.values[method.name][metric].mean(axis=0)
    return steps, missing


def compare_steps(study: Study, steps: StepScores) -> list[Finding]:
    """The curves' first row against the second: at each timestep, and over the early ones, which the claim is about."""
    first, second = steps.rows
    early = [t for t in steps.timesteps if t >= study.curves["early"]]
    places = [(f"t >= {study.curves['early']}", early)] * bool(early) + [(f"t = {t}", [t]) for t in steps.timesteps]
    findings = []
    for metric in STEP_METRICS:
        for label, times in places:
            a, b = (np.mean([steps.values(row, metric, t) for t in times], axis=0) for row in (first, second))
            name = f"{metric} at {label}"
            comparison = Comparison(rows=(first, second), expect={name: "higher"}, claim=study.curves["claim"],
                                    source=study.curves["source"])  # fmt: skip
            found, none = paired(a, b), (math.nan, math.nan)
            said = verdict(found, "higher", LEAST[metric], steps.one_training)
            findings.append(Finding(comparison, name, "realsr", found, said, none))
    return findings
