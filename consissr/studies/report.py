"""A study written down: per-image values, means, comparisons with intervals and verdicts, beside what was published."""

from __future__ import annotations

import csv
import json
import math
import platform
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from consissr.evaluation.bootstrap import DRAWS, Estimate, interval
from consissr.evaluation.output import write_text
from consissr.evaluation.protocols import MEASURES
from consissr.evaluation.workers import cores
from consissr.studies.run import PHOTOS, REALSR, Setting, note, record_of
from consissr.studies.scores import (
    PROTOCOL,
    Finding,
    Published,
    Scores,
    compare,
    compare_steps,
    measure,
    measure_steps,
    restored,
)
from consissr.studies.spec import COMPARED, DATASETS, LEAST, METRICS, Study

LABELS = {
    "realsr": f"RealSR, centre crops of {{}} of the 100 pairs, {REALSR['crop'] * REALSR['scale']} pixels",
    "photos": f"{{}} degraded photographs, {PHOTOS['crop']} pixels",
}
"""Data sets in words, by name; to be filled with the number of images."""

RULES = (
    f"Paired differences over images, first row minus second, with 95 % bootstrap intervals ({DRAWS} resamples of the "
    "images). Rows are compared at the training seeds that both have; with two the verdict is on the mean of both "
    "differences, and differences of opposite signs resolve nothing. "
    "'appears': the interval lies on the claim's side of 0, beyond the least difference that counts ("
    + ", ".join(f"{metric.upper()} {least:g}" for metric, least in LEAST.items() if not metric.endswith("-gstd"))
    + ", a tenth of it for a G-STD); 'opposite': the same on the other side; else 'not resolved'. 'unchanged' appears "
    "where the interval lies within that least difference of 0. '(one training seed)': different models are compared "
    "at a single training seed. The intervals are over images alone: training ConsisSR's rows again with arithmetic "
    "that rounds otherwise moved them by up to 0.08 dB and differences by up to 0.12 (RealSR), so that one below 0.1 "
    "to 0.2 dB may be training noise. And percentile intervals from so few images are narrower than 95 %: "
    "of normal differences, those from 12 images hold the mean in about 91 % of all cases, those from 6 in about 86 %."
)
FLAT = (
    "Flat blocks: roughness of the smoothest blocks relative to HR's. Well above 1 is grain, which NIQE takes for "
    "detail: read both together. The bicubic rows are for scale; the second has grain added."
)
LEVELS = "Published values are the papers', of far larger models on whole images: compare differences, not levels."


@dataclass
class Measured:
    """What a study's page and table are written from."""

    setting: Setting
    study: Study
    scored: list[Scores]
    """One per data set."""
    findings: list[Finding]
    published: Published
    missing: list[str]
    """Rows that are not there, a line each."""


def report(setting: Setting, name: str, papers: Path, data: Path | None = None) -> list[str]:
    """Measure what is restored, write everything into OUT/<name>; returns one line for each row that is missing.

    papers: folder of the papers' tables; data: where the results are also written as a table of the same kind.
    """
    from consissr.studies import pictures

    study, out = setting.plan.study(name), setting.plan.out / name
    began = time.perf_counter()
    missing, scored, shown = [], [], {}
    for dataset in DATASETS:
        ready, lacking = restored(setting, study, dataset)
        missing += [line for line in lacking if line not in missing]
        if ready:
            scored.append(measure(setting, dataset, ready, study.repeats))
            shown[dataset] = ready
    published = Published(study, papers)
    findings = [f for scores in scored for f in compare(study, scores, published)]
    steps, lacking = measure_steps(setting, study, shown.get("realsr", []))
    missing += lacking
    findings += compare_steps(study, steps) if steps else []
    if shown:
        note(setting, name, "evaluate", name, time.perf_counter() - began)
    write_csv(out / "per_image.csv", per_image(scored))
    write_csv(out / "summary.csv", summary(study, scored, published))
    write_csv(out / "comparisons.csv", comparison_rows(study, findings))
    pictures = pictures.draw(setting, study, scored, shown, steps)
    measured = Measured(setting, study, scored, findings, published, missing)
    write_text(out / "summary.md", markdown(measured, pictures))
    if data is not None and scored:
        write_text(data / f"{name}.yaml", table_file(measured))
    return [f"{name}: {line}" for line in missing]


# --- files ---


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows of equal keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["nothing measured"])
        writer.writeheader()
        writer.writerows(rows)


def per_image(scored: list[Scores]) -> list[dict]:
    """One line per data set, row, training seed, run and image; L-STD, which is over runs, in each run's."""
    return [
        {"dataset": s.dataset, "row": row, "seed": seed, "run": run, "image": image}
        | {name: round(float(table[name][run, i]), 6) for name in METRICS}
        | {"l-std": _plain(float(s.values[row][seed]["l-std"][i]))}
        for s in scored
        for row, seeds in s.runs.items()
        for seed, table in seeds.items()
        for run in range(len(table[METRICS[0]]))
        for i, image in enumerate(s.images)
    ]


def summary(study: Study, scored: list[Scores], published: Published) -> list[dict]:
    """One line per data set and row (over training seeds, and each): means, intervals, and published values."""
    lines = []
    for s in scored:
        for row, seeds in s.values.items():
            each = [("mean", {m: s.mean(row, m) for m in COMPARED})] if len(seeds) > 1 else []
            runs = len(next(iter(s.runs[row].values()))["psnr"])
            flat = {"mean": s.flat_mean(row), **s.flat[row]}
            for seed, values in [*each, *seeds.items()]:
                line = {"dataset": s.dataset, "row": row, "seed": seed, "images": len(s.images), "runs": runs}
                for metric in COMPARED:
                    e = interval(values[metric])
                    parts = {metric: e.mean, f"{metric} low": e.low, f"{metric} high": e.high}
                    line |= {name: _plain(value) for name, value in parts.items()}
                line["flat-block ratio"] = round(flat[seed], 4)
                lines.append(line | {f"{m} published": _plain(published.value(row, m)) for m in COMPARED})
    return lines


def comparison_rows(study: Study, findings: list[Finding]) -> list[dict]:
    """One line per finding."""
    return [
        {"study": study.name, "dataset": f.dataset, "first": f.comparison.rows[0], "second": f.comparison.rows[1],
         "metric": f.metric, "expected": f.comparison.expect[f.metric], "difference": round(f.found.overall.mean, 6),
         "low": round(f.found.overall.low, 6), "high": round(f.found.overall.high, 6), "verdict": f.verdict,
         "per seed": "; ".join(f"{e.mean:.6f} [{e.low:.6f}, {e.high:.6f}]" for e in f.found.seeds),
         "published first": _plain(f.published[0]), "published second": _plain(f.published[1]),
         "published difference": _plain(f.published[0] - f.published[1]),
         "claim": f.comparison.claim, "source": f.comparison.source}
        for f in findings
    ]  # fmt: skip


def _dash(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _plain(value: float) -> float | str:
    return "" if math.isnan(value) else round(value, 6)


def markdown(measured: Measured, pictures: list[Path]) -> str:
    """The study on one page."""
    study = measured.study
    lines = [f"# {study.title}, at nano's scale", ""]
    lines += [f"Study `{study.name}` (configs/nano/studies/{study.name}.yaml); each number is in summary.csv or",
              "comparisons.csv beside this file, and each image's in per_image.csv.", ""]  # fmt: skip
    for scores in measured.scored:
        lines += [
            f"## {LABELS[scores.dataset].format(len(scores.images))}",
            "",
            *means_table(study, scores, measured.published),
            "",
        ]
    lines += ["## What the papers say, and what appears", ""]
    lines += [RULES, ""]
    lines += (
        [*findings_table(measured.findings), ""]
        if measured.findings
        else ["No two rows of a comparison are there yet.", ""]
    )
    lines += ["## Missing", "", *[f"- {line}" for line in measured.missing or ["nothing"]], ""]
    lines += ["## Time and machine", "", *[f"- {line}" for line in spent(measured.setting, study)], ""]
    lines += ["## Pictures", "", *[f"![{path.stem}]({path.name})" for path in pictures], ""]
    return "\n".join(lines)


def means_table(study: Study, scores: Scores, published: Published) -> list[str]:
    """Each row's means and G-STD, below it the papers' (on RealSR's table alone)."""
    titles = [f"{MEASURES[m].label} {MEASURES[m].arrow} / G-STD" for m in METRICS]
    lines = ["| row | " + " | ".join([*titles, "L-STD ↓", "flat blocks"]) + " |"]
    lines += ["|---" + "|--:" * 5 + "|"]
    for row, seeds in scores.values.items():
        words = [about(study, row)] * bool(about(study, row))
        words += [f"mean of {len(seeds)} training seeds"] * (len(seeds) > 1)
        means = {metric: scores.mean(row, metric) for metric in COMPARED}
        lines.append(_means_line(row + f" ({'; '.join(words)})" * bool(words), means, scores.flat_mean(row)))
        for seed, values in seeds.items() if len(seeds) > 1 else ():
            lines.append(_means_line(f"{row}, training seed {seed} alone", values, scores.flat[row][seed]))
        if scores.dataset == "realsr" and (cells := published.cells(row)):
            told = [str(cells.get(name, "-")) for name in (*METRICS, "l-std")] + ["-"]
            lines.append(f"| *published: {study.rows[row].published}* | " + " | ".join(told) + " |")
    lines += ["", FLAT]
    return [*lines, *(["", LEVELS] if scores.dataset == "realsr" and study.published else [])]


def _means_line(label: str, values: dict[str, np.ndarray], flat: float) -> str:
    texts = []
    for name in METRICS:
        e, digits = interval(values[name]), MEASURES[name].digits
        interval_text = f"[{e.low:.{digits}f}, {e.high:.{digits}f}]"
        texts.append(f"{e.mean:.{digits}f} {interval_text} / {_dash(values[f'{name}-gstd'].mean())}")
    return f"| {label} | " + " | ".join([*texts, _dash(values["l-std"].mean()), f"{flat:.2f}"]) + " |"


def about(study: Study, row: str) -> str:
    """What a row is, where its name does not say it."""
    return study.rows[row].about if row in study.rows else "for scale"


def findings_table(findings: list[Finding]) -> list[str]:
    """One line per claim, metric and data set."""
    lines = ["| claim | rows | metric | published | data | difference [95 %] | verdict |", "|---" * 7 + "|"]
    for f in findings:
        digits = 3 if f.metric.startswith("psnr") else 4
        told = f"{f.published[0] - f.published[1]:+.{digits}f}" if not any(map(math.isnan, f.published)) else "-"
        texts = [_difference(f.found.overall, digits)]
        if len(f.found.seeds) > 1:
            each = (_difference(e, digits) for e in f.found.seeds)
            texts.append("seeds: " + ", ".join(each))
        expected = f.comparison.expect[f.metric]
        lines.append(f"| {f.comparison.claim} ({f.comparison.source}) | {' − '.join(f.comparison.rows)} | {f.metric} "
                     f"{expected} | {told} | {f.dataset} | {'; '.join(texts)} | **{f.verdict}** |")  # fmt: skip
    return lines


def _difference(e: Estimate, digits: int) -> str:
    return f"{e.mean:+.{digits}f} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]"


def spent(setting: Setting, study: Study) -> list[str]:
    """What the study took, in words, from the record that its children left."""
    path = setting.plan.out / study.name / "times.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    lines = []
    for kind, words in (("train", "training"), ("restore", "restoring"), ("evaluate", "evaluating")):
        own = [entry for entry in entries if entry["kind"] == kind]
        if own:
            threads = sorted({entry["threads"] for entry in own})
            seconds = sum(entry["seconds"] for entry in own)
            each = f", each with {'/'.join(map(str, threads))} thread(s)" if kind != "evaluate" else ""
            known = [entry.get("processor") for entry in own]
            busy = f" ({sum(known):.0f} s of processor time)" if all(known) else ""
            lines.append(f"{words}: {seconds:.0f} s{busy} in {len(own)} process(es){each}")
    others = sorted({r.training for row in study.rows for r in setting.plan.results(study.name, row) if r.training
                     and not r.training.startswith(f"{study.name}/")})  # fmt: skip
    lines += [f"trained in other studies, and counted there: {', '.join(others)}"] if others else []
    lines.append(f"precision of restoring: {', '.join(precisions(setting, study)) or 'nothing restored'}; "
                 f"{study.repeats} noise seeds per image; metrics by protocol {PROTOCOL}")  # fmt: skip
    return [*lines, f"machine: {machine()}"]


def precisions(setting: Setting, study: Study) -> list[str]:
    """The precisions that the results were restored with."""
    found = set()
    for row in study.rows:
        for results, dataset in ((r, d) for r in setting.plan.results(study.name, row) for d in DATASETS):
            if record_of(results, dataset).is_file():
                found.add(json.loads(record_of(results, dataset).read_text())["precision"])
    return sorted(found)


def machine() -> str:
    """The processor and the cores that were used, in words."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
    return f"{names[0].split(': ')[-1] if names else platform.processor() or platform.machine()}, {cores()} core(s)"


def table_file(measured: Measured) -> str:
    """The results as a table of configs/tables: kind 'study', each row above the papers' row, and the findings."""
    study, columns = measured.study, (*METRICS, "l-std")
    datasets: dict[str, dict[str, str]] = {}
    for scores in measured.scored:
        rows = datasets.setdefault(scores.dataset, {})
        for row in scores.values:
            means = [f"{scores.mean(row, m).mean():.{MEASURES[m].digits}f}" for m in METRICS]
            spreads = [_dash(scores.mean(row, f"{m}-gstd").mean()) for m in METRICS]
            cells = ["/".join(both) for both in zip(means, spreads, strict=True)]
            rows[row] = " ".join([*cells, _dash(scores.mean(row, "l-std").mean())])
            if scores.dataset == "realsr" and (told := measured.published.cells(row)):
                rows[f"{row}, published"] = " ".join(str(told.get(column, "-")) for column in columns)
    content = {
        "title": f"{study.title}, at nano's scale",
        "kind": "study",
        "protocol": PROTOCOL,
        "runs": study.repeats,
        "metrics": list(METRICS),
        "last": "l-std",
        "notes": [
            *(f"{s.dataset}: {LABELS[s.dataset].format(len(s.images))}." for s in measured.scored),
            *several_seeds(measured.scored),
            *(f"missing: {line}" for line in measured.missing),
            *spent(measured.setting, study),
        ],  # fmt: skip
        "datasets": datasets,
        "findings": comparison_rows(study, measured.findings),
    }
    header = (
        f"# {study.title}, at nano's scale: what a run of the study wrote.\n"
        f"# Command: {command(measured.setting, study)} --tables configs/tables/nano\n"
        f"# Shown by: python scripts/eval.py --table nano/{study.name} --dataset realsr\n"
    )
    return header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)


def several_seeds(scored: list[Scores]) -> list[str]:
    """Which rows are means over training seeds, in words."""
    found = {row: sorted(seeds) for scores in scored for row, seeds in scores.values.items() if len(seeds) > 1}
    return [f"{row}: mean of training seeds {', '.join(map(str, seeds))}; differences use common seeds"
            for row, seeds in found.items()]  # fmt: skip


def command(setting: Setting, study: Study) -> str:
    """The call that makes such results, with what was not left as it is."""
    words = ["--repeats", str(setting.plan.repeats)] if setting.plan.repeats else []
    words += ["--set", *setting.overrides] if setting.overrides else []
    return " ".join([f"python scripts/study.py {study.name} --photos PHOTOS --realsr REALSR", *map(shlex.quote, words)])
