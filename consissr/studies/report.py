"""A study written down: levels beside bicubic, paired differences over training seeds and images, verdicts, crops."""

import csv
import math
import platform
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from consissr.config.machine import cores
from consissr.evaluation import figures, provenance, tables
from consissr.evaluation.bootstrap import DRAWS, Difference, hierarchical, paired, verdict
from consissr.evaluation.check import BICUBIC, write_baselines
from consissr.evaluation.evaluate import evaluate
from consissr.evaluation.folders import Method, Pairs, list_images, list_runs, pair
from consissr.evaluation.markdown import table_lines
from consissr.evaluation.output import write_text
from consissr.evaluation.progress import duration
from consissr.evaluation.protocols import MEASURES, get_measures, get_protocol
from consissr.studies.run import SETS, Work, is_restored, is_trained
from consissr.studies.spec import METRICS, Comparison, Study

PROTOCOL = "ccsr"
SCALE = 4
NIQE_SIDE = 512
"""Pixels below which NIQE, made of blocks of 96 pixels, is left out."""
CROPS = 3
"""Images whose crops are drawn."""
RULES = (
    f"Differences are paired by training seed and image. Intervals (95 %, {DRAWS} resamples) draw training seeds and "
    "images anew; a difference is resolved when it lies beyond 0 there, and beyond the least one that the spread of "
    "the seeds' means allows (Student's t, in the column 'least'). 'appears': on the claim's side of 0; 'opposite': on "
    "the other. Published values are the papers', of far larger models: compare differences, not levels."
)


@dataclass
class Scores:
    """Per-image values of one test set: `values[row][metric]`, shape (training seeds, images)."""

    name: str
    images: list[str]
    values: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    seeds: dict[str, list[int]] = field(default_factory=dict)
    flat: dict[str, float] = field(default_factory=dict)
    """Flat-block ratio (see evaluation/flat.py), mean over training seeds and runs."""
    without: dict[str, str] = field(default_factory=dict)
    """Metrics that are not there, and why."""


@dataclass(frozen=True)
class Finding:
    """A comparison's outcome on one test set and metric."""

    comparison: Comparison
    metric: str
    dataset: str
    difference: Difference
    verdict: str
    published: float
    """The papers' difference; NaN where there is none."""


def report(work: Work, papers: Path) -> list[str]:
    """Measure what is restored and write it into OUT/<study>; returns a line for each result that is missing.

    papers: folder of the papers' tables.
    """
    out, published = work.out / work.study.name, published_values(work.study, papers)
    missing: list[str] = []
    scored = [s for name in SETS if (s := measure(work, name, missing)) is not None]
    findings = [f for s in scored for f in compare(work.study, s, published)]
    notes = [costs(work), *(f"missing: {line}" for line in missing)]
    write_text(out / "summary.md", markdown(work.study, scored, findings, published, notes))
    write_csv(out / "per_image.csv", per_image(scored))
    write_csv(out / "comparisons.csv", [finding_row(f) for f in findings])
    for s in scored:
        draw_crops(work, s, out / f"crops_{s.name}.png")
    return missing


def measure(work: Work, name: str, missing: list[str]) -> Scores | None:
    """Every metric of every complete result and of bicubic enlargement; None where there is no result."""
    data, study = work.test_set(name), work.study
    if not data.is_dir():
        missing.append(f"test set {name}")
        return None
    base = pair({"HR": data / "HR"}, data / "HR", data / "LR")
    methods: dict[tuple[str, int | None], Method] = {}
    for row, one in study.rows.items():
        folders = {seed: work.results(row, seed, name) for seed in study.seeds_of(one.variant)}
        there = [seed for seed, folder in folders.items() if is_restored(folder, set(base.images), study.repeats)]
        for seed in there:
            runs = [list_images(run) for run in list_runs(folders[seed])[: study.repeats]]
            methods[row, seed] = Method(f"{row}, seed {seed}", runs)
        if absent := [str(seed) for seed in folders if seed not in there]:
            missing.append(f"{row}: not restored on {name} with training seed {', '.join(absent)}")
    if not methods:
        return None
    enlarged = write_baselines(data / "LR", data.with_name(f"{data.name}-baselines"), SCALE)[BICUBIC]
    methods[BICUBIC, None] = Method(BICUBIC, [list_images(enlarged)])
    names = [m for m in METRICS if m in MEASURES and (m != "niqe" or not base.smaller_than(NIQE_SIDE, NIQE_SIDE))]
    pairs = Pairs(list(methods.values()), base.images, base.hr, None, base.sizes)
    cache = work.out / "data" / f"{data.name}.jsonl"
    done = evaluate(pairs, get_measures([*names, "flat"]), get_protocol(PROTOCOL), cache, jobs=work.jobs)
    scores = Scores(name, base.images, without=dict(done.unavailable))
    for row in dict.fromkeys(row for row, _ in methods):
        seeds = [seed for r, seed in methods if r == row]
        own = [methods[row, seed] for seed in seeds]
        tables = [done.values[method.name] for method in own]
        values = {m: np.stack([table[m].mean(axis=0) for table in tables]) for m in tables[0]}
        if row != BICUBIC:  # (Eq. 4 and 5, CCSR), image by image
            values["psnr-gstd"] = np.stack([table["psnr"].std(axis=0) for table in tables])
            values["l-std"] = np.stack([done.local_std[method.name] for method in own])
        scores.flat[row] = float(np.mean([done.mean(method.name, "flat") for method in own]))
        scores.values[row], scores.seeds[row] = values, [seed for seed in seeds if seed is not None]
    return scores


def compare(study: Study, scores: Scores, published: dict) -> list[Finding]:
    """The study's comparisons on one test set, at the training seeds that both rows have."""
    findings = []
    for comparison in study.comparisons:
        rows = [row for row in comparison.rows if row in scores.values]
        common = set.intersection(*(set(scores.seeds[row]) for row in rows)) if len(rows) == 2 else set()
        for metric, expected in comparison.expect.items() if common else ():
            if not all(metric in scores.values[row] for row in rows):
                continue
            chosen = [[scores.seeds[row].index(seed) for seed in sorted(common)] for row in rows]
            a, b = (scores.values[row][metric][which] for row, which in zip(rows, chosen, strict=True))
            difference = paired(a, b)
            told = [published.get(row, {}).get(metric, math.nan) for row in rows]
            said = verdict(difference, expected)
            findings.append(Finding(comparison, metric, scores.name, difference, said, told[0] - told[1]))
    return findings


def published_values(study: Study, papers: Path) -> dict[str, dict[str, float]]:
    """The papers' values by row of the study and metric."""
    if not study.published:
        return {}
    table = tables.load_table(study.published["table"], papers)
    rows = table.datasets[table.dataset(study.published["dataset"])]
    values = {}
    for name, row in study.rows.items():
        cells = rows.get(row.published, {})
        values[name] = {metric: cell.value for metric, cell in cells.items()}
        values[name] |= {f"{metric}-gstd": cell.spread for metric, cell in cells.items()}
    return values


# --- files ---


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["nothing measured"])
        writer.writeheader()
        writer.writerows(rows)


def per_image(scored: list[Scores]) -> list[dict]:
    """One line per test set, row, training seed and image, averaged over runs."""
    return [
        {"set": s.name, "row": row, "seed": seed, "image": image}
        | {m: round(float(table[m][k, i]), 6) if m in table else "" for m in METRICS}
        for s in scored
        for row, table in s.values.items()
        for k, seed in enumerate(s.seeds[row] or [""])
        for i, image in enumerate(s.images)
    ]


def finding_row(f: Finding) -> dict:
    """A finding as plain data."""
    e = f.difference.overall
    return {
        "dataset": f.dataset, "first": f.comparison.rows[0], "second": f.comparison.rows[1], "metric": f.metric,
        "expected": f.comparison.expect[f.metric], "difference": round(e.mean, 6), "low": round(e.low, 6),
        "high": round(e.high, 6), "least": round(f.difference.least, 6) if f.difference.least < math.inf else "",
        "per seed": " ".join(f"{mean:+.6f}" for mean in f.difference.seeds), "verdict": f.verdict,
        "published difference": "" if math.isnan(f.published) else round(f.published, 6),
        "claim": f.comparison.claim, "source": f.comparison.source,
    }  # fmt: skip


def markdown(study: Study, scored: list[Scores], findings: list[Finding], published: dict, notes: list[str]) -> str:
    """The study on one page."""
    lines = [f"# {study.title}, at nano's scale"]
    for s in scored:
        metrics = [m for m in METRICS if any(m in table for table in s.values.values())]
        rows = []
        for row, table in s.values.items():
            about = study.rows[row].about if row in study.rows else "for scale"
            cells = [level(table[m]) if m in table else "-" for m in metrics] + [f"{s.flat[row]:.2f}"]
            rows.append([f"{row} ({about})" if about else row, str(len(s.seeds[row]) or "-"), *cells])
            if told := {m: v for m, v in published.get(row, {}).items() if not math.isnan(v)}:
                cells = [f"{told[m]:.4f}" if m in told else "-" for m in metrics]
                rows.append([f"*published: {study.rows[row].published}*", "", *cells, "-"])
        lines += ["", f"## {s.name}: {len(s.images)} images, {study.repeats} noise seeds each", ""]
        lines += table_lines(["row", "training seeds", *metrics, "flat blocks"], rows, words=2)
        lines += [f"\n{metric} is not computed: {why}." for metric, why in s.without.items()]
    rows = []
    for f in findings:
        e, least = f.difference.overall, f.difference.least
        told = "-" if math.isnan(f.published) else f"{f.published:+.4f}"
        rows.append([f"{f.comparison.claim} ({f.comparison.source})", " − ".join(f.comparison.rows), f.dataset,
                     f"{f.metric} {f.comparison.expect[f.metric]}", told,
                     f"{e.mean:+.4f} [{e.low:+.4f}, {e.high:+.4f}]", f"{least:.4f}" if least < math.inf else "-",
                     f"**{f.verdict}**"])  # fmt: skip
    titles = ["claim", "rows", "set", "metric", "published", "difference [95 %]", "least", "verdict"]
    lines += ["", "## What the papers say, and what appears", "", RULES, "", *table_lines(titles, rows, words=8)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def level(values: np.ndarray) -> str:
    """Mean and interval of a row's values (training seeds, images)."""
    e = hierarchical(values)
    return f"{e.mean:.4f} [{e.low:.4f}, {e.high:.4f}]"


def costs(work: Work) -> str:
    """What the study's models took, and where."""
    trained = [work.model(v, seed) for v in work.study.variants for seed in work.study.seeds_of(v)]
    seconds = [provenance.record(folder)["seconds"] for folder in trained if is_trained(folder)]
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
    machine = names[0].split(": ")[-1] if names else platform.machine()
    where = f"{work.jobs} at a time, {cores()} core(s) of {machine}"
    return f"{len(seconds)} models trained in {duration(sum(seconds))} ({where}); protocol {PROTOCOL}"


def draw_crops(work: Work, scores: Scores, path: Path) -> None:
    """A line per image: input, every row's first result of its first seed, reference."""
    folders = {row: list_runs(work.results(row, seeds[0], scores.name))[0]
               for row, seeds in scores.seeds.items() if seeds}  # fmt: skip
    names = [scores.images[i] for i in np.unique(((np.arange(CROPS) + 0.5) * len(scores.images) / CROPS).astype(int))]
    data = work.test_set(scores.name)
    inputs = figures.Inputs(folders, data / "HR", data / "LR", names, None)
    figures.picture_grid(figures.crop_rows(inputs)).savefig(path, dpi=130, bbox_inches="tight")
