"""Studies: the papers' ablations as files (configs/nano/studies), and what each needs trained and restored.

A study names rows. A row trains a variant (one complete configuration, perhaps with several seeds), or restores with
another's model under other sampler flags, or is another study's row. `study_run.py` does the work in child processes,
`study_report.py` writes it down.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from consissr.config.loading import nearest
from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.nano.config import run_config

ORDER = ("consissr_table4", "ccsr_table1", "consissr_table3", "hybrids", "ccsr_sweeps")
"""What 'all' runs, the headline comparisons first."""
DATASETS = ("realsr", "photos")
METRICS = ("psnr", "ssim", "niqe")
COMPARED = (*METRICS, *(f"{name}-gstd" for name in METRICS), "l-std")
"""What comparisons may be about: means over runs, their standard deviations over runs (G-STD), and L-STD."""
EXPECTED = ("higher", "lower", "unchanged")
LEAST = {"psnr": 0.01, "ssim": 0.0005, "niqe": 0.02, "l-std": 0.0002}
LEAST |= {f"{name}-gstd": LEAST[name] / 10 for name in METRICS}
"""The smallest differences that count, in the metrics' units."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a study's table."""

    name: str
    train: str = ""
    """Variant to train: a file <study>/<train>.yaml."""
    seeds: tuple[int, ...] = ()
    """Training seeds of the variant; empty: its file's."""
    model: str = ""
    """Instead: the trained variant 'study/variant', or a bundled model."""
    like: str = ""
    """Instead: another study's row 'study/row', its results included."""
    flags: tuple[str, ...] = ()
    """Sampler flags of scripts/infer.py; none: as the model says."""
    zero_tokens: bool = False
    """Restore with image tokens of zero (the adapter's last layer is cleared in a copy of the model)."""
    published: str = ""
    """Row of the papers' table beside which it stands."""
    table: str = ""
    """That table, where it is another than the study's."""
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A claim about two rows: `expect` says for each metric how the first one's value compares with the second's."""

    rows: tuple[str, str]
    expect: dict[str, str]
    claim: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Study:
    """The fields of a study's file."""

    name: str
    title: str
    rows: dict[str, Row]
    comparisons: list[Comparison] = field(default_factory=list)
    published: dict[str, str] = field(default_factory=dict)
    """The papers' table and data set: {table: consissr/table4, dataset: RealSR}."""
    vary: list[str] = field(default_factory=list)
    """Fields in which the variants may differ, beside seed and folders."""
    precision: str = "bf16"
    """Of restoring: 'bf16' (where the machine computes it fast, else fp32; which one is recorded) or 'fp32'."""
    repeats: int = 10
    """Noise seeds per image."""
    curves: dict[str, Any] = field(default_factory=dict)
    """Two rows whose sampling steps are measured, too (Fig. 8, ConsisSR): rows, title, and a claim about timesteps from
    `early` on: claim, source."""


@dataclass(frozen=True)
class Training:
    """One variant and seed to train."""

    study: str
    variant: str
    seed: int
    config: Path
    folder: Path
    """Of the model and its checkpoints."""
    after: str = ""
    """Key of the training whose model it starts from."""
    seeded: bool = False
    """Whether its seed is another than its file's, and stands in its name."""

    @property
    def key(self) -> str:
        return f"{self.study}/{self.variant}" + (f"-seed{self.seed}" if self.seeded else "")

    @property
    def source(self) -> Path | None:
        """Folder of the training whose model it starts from."""
        study, _, name = self.after.partition("/")
        return self.folder.parents[2] / study / "models" / name if self.after else None


@dataclass(frozen=True)
class Results:
    """One row's results with one training seed: where they come from and where they stand."""

    row: str
    seed: int
    folder: Path
    """Holds a folder per data set."""
    model: str
    """Model folder or bundled name."""
    training: str
    """Key of the training that makes the model; "" for a bundled one."""
    flags: tuple[str, ...]
    zero_tokens: bool = False
    save_steps: bool = False


def available(folder: Path) -> list[str]:
    """Names of all studies, in the order in which 'all' runs them."""
    names = [path.stem for path in folder.glob("*.yaml")]
    return [name for name in ORDER if name in names] + sorted(set(names) - set(ORDER))


def load_study(name: str, folder: Path) -> Study:
    """Read and check folder/<name>.yaml. Raises UserError naming what is wrong."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"unknown study '{name}'{nearest(name, ['all', *available(folder)])}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("rows"), dict):
        raise UserError(f"{path} is no study: it needs title and rows, and each row its keys (see the other studies)")
    rows = content.pop("rows")
    comparisons = content.pop("comparisons", None) or []
    study = _made(Study, path, content | {"name": name}, rows={k: _row(k, v, path) for k, v in rows.items()},
                  comparisons=[_comparison(entry, path) for entry in comparisons])  # fmt: skip
    if study.precision not in ("bf16", "fp32"):
        raise UserError(f"{path}: precision is '{study.precision}': use bf16 or fp32")
    if not isinstance(study.repeats, int) or study.repeats < 2:
        raise UserError(f"{path}: repeats is {study.repeats}: stability needs at least 2 noise seeds")
    if any(row.published for row in study.rows.values()) and set(study.published) != {"table", "dataset"}:
        raise UserError(f"{path}: rows are published: name the papers' table and dataset under published")
    _check_pairs(study, path)
    if study.curves and set(study.curves) != {"rows", "early", "title", "claim", "source"}:
        raise UserError(f"{path}: curves needs rows, early, title, claim and source, and nothing else")
    for row in study.rows.values():
        if row.train and not (folder / name / f"{row.train}.yaml").is_file():
            raise UserError(f"{path}: row {row.name} trains {name}/{row.train}.yaml, which does not exist")
    return study


def _made(kind: type, path: Path, given: dict, **more: Any) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    for key in given:
        if key not in known:
            raise UserError(f"{path}: unknown key '{key}'{nearest(str(key), sorted(known))}")
    for f in dataclasses.fields(kind):
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in {*given, *more}:
            raise UserError(f"{path}: a {kind.__name__.lower()} lacks '{f.name}': add it")
    return kind(**given, **more)


def _check_pairs(study: Study, path: Path) -> None:
    """Two known rows in each comparison, and in the curves."""
    for rows in [list(c.rows) for c in study.comparisons] + [list(study.curves.get("rows", []))] * bool(study.curves):
        for row in rows:
            if row not in study.rows:
                raise UserError(f"{path}: there is no row '{row}'{nearest(str(row), list(study.rows))}")
        if len(rows) != 2:
            raise UserError(f"{path}: rows are [{', '.join(rows)}]: compare two")


def _row(name: str, content: dict | None, path: Path) -> Row:
    content = {k: tuple(v) if isinstance(v, list) else v for k, v in (content or {}).items()}
    row = _made(Row, path, content, name=name)
    if sum(map(bool, (row.train, row.model, row.like))) != 1:
        raise UserError(f"{path}: row {name} needs exactly one of train, model and like")
    return row


def _comparison(content: dict, path: Path) -> Comparison:
    made = _made(Comparison, path, content | {"rows": tuple(content.get("rows", ()))})
    if not isinstance(made.expect, dict):
        raise UserError(f"{path}: expect is '{made.expect}': name metrics, such as {{psnr: higher}}")
    for metric, expected in made.expect.items():
        if metric not in COMPARED or expected not in EXPECTED:
            known = f"metrics {', '.join(COMPARED)}; words {', '.join(EXPECTED)}"
            raise UserError(f"{path}: '{metric}: {expected}' is no expectation; known: {known}")
    return made


class Plan:
    """What studies need, with every result's place below `out`: trainings by key, and rows' results."""

    def __init__(self, folder: Path, out: Path, repeats: int | None = None) -> None:
        """repeats: noise seeds per image in place of the studies' own numbers."""
        if repeats is not None and repeats < 2:
            raise UserError(f"--repeats {repeats}: stability needs at least 2 noise seeds")
        self.folder, self.out, self.repeats = folder, out, repeats
        self.studies: dict[str, Study] = {}

    def study(self, name: str) -> Study:
        """The study `name`, read once."""
        if name not in self.studies:
            study = load_study(name, self.folder)
            self.studies[name] = dataclasses.replace(study, repeats=self.repeats or study.repeats)
        return self.studies[name]

    def training(self, study: str, variant: str, seed: int | None = None) -> Training:
        """The training of a variant with a seed (None: its file's)."""
        path = self.folder / study / f"{variant}.yaml"
        if not path.is_file():
            known = [f"{study}/{p.stem}" for p in sorted((self.folder / study).glob("*.yaml"))]
            raise UserError(f"there is no variant '{study}/{variant}'{nearest(f'{study}/{variant}', known)}")
        config = run_config(path)
        seeded = seed is not None and seed != config.seed
        name = f"{variant}-seed{seed}" if seeded else variant
        folder = self.out / study / "models" / name
        after = self._with_seed(source_of(config), seed) if seeded else source_of(config)
        return Training(study, variant, config.seed if seed is None else seed, path, folder, after, seeded)

    def _with_seed(self, source: str, seed: int) -> str:
        """Key of a variant's training with this seed where a row of its study has one, else of the variant's own."""
        study, _, variant = source.partition("/")
        rows = self.study(study).rows.values() if source else ()
        has = any(row.train == variant and seed in row.seeds for row in rows)
        return self.training(study, variant, seed).key if has else source

    def results(self, study: str, row: str) -> list[Results]:
        """A row's results, one for each training seed."""
        found = self.study(study)
        if row not in found.rows:
            raise UserError(f"{study} has no row '{row}'{nearest(row, list(found.rows))}")
        one = found.rows[row]
        if one.like:
            return [dataclasses.replace(r, row=row) for r in self.results(*self.split(one.like))]
        place, steps = self.out / study / "results", row in found.curves.get("rows", [])
        if one.model and "/" not in one.model:
            return [Results(row, 0, place / row, one.model, "", one.flags, one.zero_tokens, steps)]
        owner, variant = self.split(one.model) if one.model else (study, one.train)
        made = []
        for seed in one.seeds or (None,):
            training = self.training(owner, variant, seed)
            name = row + (f"-seed{training.seed}" if training.seeded else "")
            made.append(Results(row, training.seed, place / name, str(training.folder), training.key, one.flags,
                                one.zero_tokens, steps))  # fmt: skip
        return made

    def trainings(self, study: str, only: list[str]) -> dict[str, Training]:
        """All trainings that the study's rows (or those of `only`) need, each after what it starts from."""
        found: dict[str, Training] = {}
        for row in self.chosen(study, only):
            for results in self.results(study, row):
                if results.training:
                    self._collect(results.training, found)
        return found

    def chosen(self, study: str, only: list[str]) -> list[str]:
        """The rows that `only` names: by 'row', its variant, or 'study/row'; all without."""
        rows = self.study(study).rows
        return [n for n, row in rows.items() if not only or {n, row.train, f"{study}/{n}"} & set(only)]

    def check_only(self, studies: list[str], only: list[str]) -> None:
        """Raises UserError for a word that chooses no row of any of the studies."""
        for word in only:
            if not any(self.chosen(name, [word]) for name in studies):
                known = {text for name in studies for row in self.study(name).rows.values()
                         for text in (row.name, row.train, f"{name}/{row.name}") if text}  # fmt: skip
                raise UserError(f"--only {word}: no study that was asked for has a row {word}{nearest(word, [*known])}")

    def _collect(self, key: str, found: dict[str, Training]) -> None:
        study, name = self.split(key)
        variant, _, seed = name.partition("-seed")
        training = self.training(study, variant, int(seed) if seed else None)
        if training.after:
            self._collect(training.after, found)
        found[training.key] = training

    @staticmethod
    def split(name: str) -> tuple[str, str]:
        """'study/row' in two."""
        study, slash, row = name.partition("/")
        if not slash:
            raise UserError(f"'{name}' is not of the form study/row")
        return study, row


PLACES = ("output_dir", "init", "data.paths", "data.validation")
"""Fields of a training run that say where things are, in which variants and machines may differ."""


def source_of(config: TrainConfig) -> str:
    """Key of the variant whose output_dir the configuration's `init` is; "" where it starts from the base."""
    parts = Path(config.init).parts
    return f"{parts[-3]}/{parts[-1]}" if len(parts) > 3 and parts[-2] == "models" else ""
