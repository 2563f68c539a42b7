"""A study written down: levels beside bicubic, paired differences over training seeds and images, verdicts, crops."""

from __future__ import annotations

import csv
import math
import platform
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from consissr.evaluation import figures, origin, tables
from consissr.evaluation.bootstrap import DRAWS, Difference, hierarchical, paired, verdict
from consissr.evaluation.check import BICUBIC, flat_block_ratio, write_baselines
from consissr.evaluation.evaluate import evaluate
from consissr.evaluation.folders import Method, Pairs, list_images, list_runs, pair, read_image
from consissr.evaluation.output import write_text
from consissr.evaluation.progress import duration
from consissr.evaluation.protocols import MEASURES, get_measures, get_protocol
from consissr.evaluation.workers import cores
from consissr.studies.run import SETS, Setting, is_restored, is_trained, model, results, test_set
from consissr.studies.spec import METRICS, Comparison, Study

PROTOCOL = "ccsr"
SCALE = 4
NIQE_SIDE = 512
"""Pixels below which NIQE, made of blocks of 96 pixels, is left out."""
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
    """Flat-block ratio (see evaluation/check.py), mean over training seeds, of the first run."""
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


def report(setting: Setting, study: Study, papers: Path, data: Path | None = None) -> list[str]:
    """Measure what is restored and write it into OUT/<study>; returns a line for each result that is missing.

    papers: folder of the papers' tables; data: where the results are also written as a table of the same kind.
    """
    out, published = setting.out / study.name, _published(study, papers)
    missing: list[str] = []
    scored = [s for name in SETS if (s := measure(setting, study, name, missing)) is not None]
    findings = [f for s in scored for f in compare(study, s, published)]
    for name, rows in (("per_image", per_image(scored)), ("comparisons", [finding_row(f) for f in findings])):
        out.mkdir(parents=True, exist_ok=True)
        with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["nothing measured"])
            writer.writeheader()
            writer.writerows(rows)
    for s in scored:
        draw_crops(setting, study, s, out / f"crops_{s.name}.png")
    notes = [*costs(setting, study), *(f"missing: {line}" for line in missing)]
    write_text(out / "summary.md", markdown(study, scored, findings, published, notes))
    if data is not None and scored:
        write_text(data / f"{study.name}.yaml", table_file(study, scored, findings, notes, setting))
    return missing


def measure(setting: Setting, study: Study, name: str, missing: list[str]) -> Scores | None:
    """Every metric of every complete result and of bicubic enlargement; None where there is no result."""
    data = test_set(setting, study, name)
    if not data.is_dir():
        missing.append(f"test set {name}")
        return None
    methods, where = [], {}
    base = pair({"HR": data / "HR"}, data / "HR", data / "LR")
    for row, one in study.rows.items():
        absent = []
        for seed in study.seeds_of(one.variant):
            folder = results(setting, study, row, seed, name)
            if is_restored(folder, set(base.images), study.repeats):
                runs = [list_images(run) for run in list_runs(folder)[: study.repeats]]
                methods.append(Method(f"{row}, seed {seed}", runs))
                where.setdefault(row, []).append(seed)
            else:
                absent.append(str(seed))
        if absent:
            missing.append(f"{row}: not restored on {name} with training seed {', '.join(absent)}")
    if not methods:
        return None
    enlarged = write_baselines(data / "LR", data.with_name(f"{data.name}-baselines"), SCALE)[BICUBIC]
    methods.append(Method(BICUBIC, [list_images(enlarged)]))
    names = [m for m in METRICS if m in MEASURES and (m != "niqe" or not base.smaller_than(NIQE_SIDE, NIQE_SIDE))]
    pairs = Pairs(methods, base.images, base.hr, None, base.sizes)
    cache = setting.out / "data" / f"{data.name}.jsonl"
    done = evaluate(pairs, get_measures(names), get_protocol(PROTOCOL), cache, jobs=setting.jobs)
    scores = Scores(name, base.images, without=dict(done.unavailable))
    photographs = [read_image(base.hr[image]) for image in base.images]
    for row, seeds in [*where.items(), (BICUBIC, [])]:
        own = [f"{row}, seed {seed}" for seed in seeds] or [row]
        values = {m: np.stack([done.values[n][m].mean(axis=0) for n in own]) for m in done.values[own[0]]}
        if seeds:
            # (Eq. 4 and 5, CCSR), image by image
            values["psnr-gstd"] = np.stack([done.values[n]["psnr"].std(axis=0) for n in own])
            values["l-std"] = np.stack([done.local_std[n] for n in own])
        scores.values[row], scores.seeds[row] = values, seeds
        first = [method.runs[0] for method in methods if method.name in own]
        ratios = [flat_block_ratio((read_image(run[i]) for i in base.images), photographs) for run in first]
        scores.flat[row] = float(np.mean(ratios))
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
            chosen = [[i for i, seed in enumerate(scores.seeds[row]) if seed in common] for row in rows]
            a, b = (scores.values[row][metric][which] for row, which in zip(rows, chosen, strict=True))
            found = paired(a, b)
            told = [published.get(row, {}).get(metric, math.nan) for row in rows]
            findings.append(
                Finding(comparison, metric, scores.name, found, verdict(found, expected), told[0] - told[1])
            )
    return findings


def _published(study: Study, papers: Path) -> dict[str, dict[str, float]]:
    """The papers' values by row of the study and metric."""
    if not study.published:
        return {}
    table = tables.load_table(study.published["table"], papers)
    cells = table.datasets[table.dataset(study.published["dataset"])]
    found = {}
    for name, row in study.rows.items():
        own = cells.get(row.published, {})
        found[name] = {metric: cell.value for metric, cell in own.items()}
        found[name] |= {f"{metric}-gstd": cell.spread for metric, cell in own.items()}
    return found


# --- files ---


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
        "per seed": " ".join(f"{mean:+.4f}" for mean in f.difference.seeds), "verdict": f.verdict,
        "published difference": "" if math.isnan(f.published) else round(f.published, 6),
        "claim": f.comparison.claim, "source": f.comparison.source,
    }  # fmt: skip


def markdown(study: Study, scored: list[Scores], findings: list[Finding], published: dict, notes: list[str]) -> str:
    """The study on one page."""
    lines = [f"# {study.title}, at nano's scale"]
    for s in scored:
        lines += ["", f"## {s.name}: {len(s.images)} images, {study.repeats} noise seeds each", ""]
        metrics = [m for m in METRICS if any(m in table for table in s.values.values())]
        lines += ["| row | training seeds | " + " | ".join([*metrics, "flat blocks"]) + " |"]
        lines += ["|---" * 2 + "|--:" * (len(metrics) + 1) + "|"]
        for row, table in s.values.items():
            about = study.rows[row].about if row in study.rows else "for scale"
            cells = [level(table[m]) if m in table else "-" for m in metrics] + [f"{s.flat[row]:.2f}"]
            lines.append(f"| {row}{f' ({about})' * bool(about)} | {len(s.seeds[row]) or '-'} | {' | '.join(cells)} |")
            if told := {m: v for m, v in published.get(row, {}).items() if not math.isnan(v)}:
                cells = [f"{told[m]:.4f}" if m in told else "-" for m in metrics]
                lines.append(f"| *published: {study.rows[row].published}* | | {' | '.join(cells)} | - |")
        lines += [f"\n{metric} is not computed: {why}." for metric, why in s.without.items()]
    lines += ["", "## What the papers say, and what appears", "", RULES, ""]
    lines += ["| claim | rows | set | metric | published | difference [95 %] | least | verdict |", "|---" * 8 + "|"]
    for f in findings:
        e, told = f.difference.overall, "-" if math.isnan(f.published) else f"{f.published:+.4f}"
        least = f"{f.difference.least:.4f}" if f.difference.least < math.inf else "-"
        cells = [f"{f.comparison.claim} ({f.comparison.source})", " − ".join(f.comparison.rows), f.dataset]
        cells += [f"{f.metric} {f.comparison.expect[f.metric]}", told, f"{e.mean:+.4f} [{e.low:+.4f}, {e.high:+.4f}]"]
        lines.append("| " + " | ".join([*cells, least, f"**{f.verdict}**"]) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def level(values: np.ndarray) -> str:
    """Mean and interval of a row's values (training seeds, images)."""
    e = hierarchical(values)
    return f"{e.mean:.4f} [{e.low:.4f}, {e.high:.4f}]"


def costs(setting: Setting, study: Study) -> list[str]:
    """What the study's models took, and where."""
    trained = {(v, seed): model(setting, study, v, seed) for v in study.variants for seed in study.seeds_of(v)}
    seconds = [origin.record(folder)["seconds"] for folder in trained.values() if is_trained(folder)]
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
    machine = names[0].split(": ")[-1] if names else platform.machine()
    where = f"{setting.jobs} at a time, {cores()} core(s) of {machine}"
    return [f"{len(seconds)} models trained in {duration(sum(seconds))} ({where}); protocol {PROTOCOL}"]


def draw_crops(setting: Setting, study: Study, scores: Scores, path: Path, shown: int = 3) -> None:
    """A line per image: input, every row's first result of its first seed, reference."""
    data = test_set(setting, study, scores.name)
    folders = {row: list_runs(results(setting, study, row, seeds[0], scores.name))[0]
               for row, seeds in scores.seeds.items() if seeds}  # fmt: skip
    names = [scores.images[i] for i in np.unique(((np.arange(shown) + 0.5) * len(scores.images) / shown).astype(int))]
    inputs = figures.Inputs(folders, data / "HR", data / "LR", names, None)
    figure = figures.picture_grid(figures.crop_rows(inputs))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    figures.close(figure)


def table_file(
    study: Study, scored: list[Scores], findings: list[Finding], notes: list[str], setting: Setting
) -> str:  # fmt: skip
    """The results as a table of configs/tables, kind 'study'."""
    columns = [m for m in METRICS if m in MEASURES]
    rows = {
        s.name: {row: " ".join([f"{t[m].mean():.4f}" if m in t else "-" for m in columns]
                               + [f"{t['l-std'].mean():.4f}" if "l-std" in t else "-"]) for row, t in s.values.items()}
        for s in scored
    }  # fmt: skip
    content = {
        "title": f"{study.title}, at nano's scale", "kind": "study", "protocol": PROTOCOL, "runs": study.repeats,
        "metrics": columns, "last": "l-std", "notes": [RULES, *notes], "datasets": rows,
        "findings": [finding_row(f) for f in findings],
    }  # fmt: skip
    words = shlex.join(["--set", *setting.lines]) if setting.lines else ""
    header = (
        f"# {study.title}, at nano's scale: what a run of the study wrote.\n"
        f"# Command: python scripts/study.py {study.name} --photos PHOTOS --realsr REALSR {words}".rstrip()
        + " --tables configs/tables/nano\n"
        f"# Shown by: python scripts/eval.py --table nano/{study.name} --dataset realsr\n"
    )
    return header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
