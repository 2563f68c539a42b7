"""Studies as files (configs/nano/studies): variants to train, rows to restore with them, claims about two rows.

A variant is a parent configuration and the lines that differ, so `train.py --config PARENT LINES` trains it by hand:

    seeds: [1, 2, 3]                                   # training seeds of every variant
    lines: [model.base=nano, steps=2000]               # of every variant
    variants:
      v1: {parent: nuts.yaml, lines: ['nuts.losses=[l_diff]']}
      full: {parent: deft.yaml, init: v1}              # starts from v1's model of the same seed
    rows:
      v1: {variant: v1, flags: [--steps, '2'], published: V1}
    comparisons:
      - {rows: [v1, full], expect: {psnr: higher}, claim: "...", source: "Table I, CCSR"}
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import MISSING

from consissr.config.loading import check_word, load_config, nearest
from consissr.errors import UserError

METRICS = ("psnr", "ssim", "st-lpips", "niqe", "psnr-gstd", "l-std")
"""What comparisons may be about: means over runs, the deviation of the PSNR over runs (G-STD), and L-STD."""


@dataclass(kw_only=True)
class Variant:
    """One model to train, once for each of its seeds."""

    parent: str = MISSING
    """Configuration below configs/nano."""
    lines: list[str] = field(default_factory=list)
    """key=value over the parent's and the study's."""
    init: str = ""
    """Variant whose model it starts from: that of the same seed, or its only one."""
    seeds: list[int] = field(default_factory=list)
    """Training seeds; empty: the study's."""


@dataclass(kw_only=True)
class Row:
    """One row of the tables: a variant's models under some flags of scripts/infer.py."""

    variant: str = MISSING
    flags: list[str] = field(default_factory=list)
    published: str = ""
    """Row of the papers' table beside which it stands."""
    about: str = ""


@dataclass(kw_only=True)
class Comparison:
    """A claim about two rows: `expect` says by metric whether the first one's value is 'higher' or 'lower'."""

    rows: list[str] = MISSING
    expect: dict[str, str] = MISSING
    claim: str = MISSING
    source: str = MISSING


@dataclass(kw_only=True)
class Study:
    """The fields of a study's file."""

    name: str = ""
    """The file's, without its ending."""
    title: str = MISSING
    variants: dict[str, Variant] = MISSING
    rows: dict[str, Row] = MISSING
    comparisons: list[Comparison] = MISSING
    seeds: list[int] = MISSING
    lines: list[str] = field(default_factory=list)
    """key=value of every variant."""
    repeats: int = 3
    """Noise seeds per image."""
    images: int = 100
    """Of each set at most, evenly chosen."""
    published: dict[str, str] = field(default_factory=dict)
    """The papers' table and data set: {table: ccsr/table1, dataset: RealSR}."""

    def seeds_of(self, variant: str) -> list[int]:
        return self.variants[variant].seeds or self.seeds

    def trainings(self, rows: list[str]) -> list[list[tuple[str, int]]]:
        """Variants and seeds that the rows need, in stages: each after those that it starts from."""
        stages: list[list[str]] = []
        wanted = list(dict.fromkeys(self.rows[row].variant for row in rows))
        while wanted:
            stages = [wanted, *([v for v in stage if v not in wanted] for stage in stages)]
            wanted = list(dict.fromkeys(self.variants[v].init for v in wanted if self.variants[v].init))
        return [[(variant, seed) for variant in stage for seed in self.seeds_of(variant)] for stage in stages]


def available(folder: Path) -> list[str]:
    """Names of all studies."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_study(name: str, folder: Path) -> Study:
    """Read and check folder/<name>.yaml. Raises UserError naming what is wrong."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"unknown study '{name}'{nearest(name, available(folder))}")
    study = replace(load_config(Study, path), name=name)
    _check(study, path, folder.parent)
    return study


def _check(study: Study, path: Path, parents: Path) -> None:
    """Whatever a study names is there."""
    try:
        for variant in study.variants.values():
            if not (parents / variant.parent).is_file():
                raise UserError(f"parent {parents / variant.parent} does not exist")
            if variant.init:
                check_word(variant.init, tuple(study.variants), "init")
        for name in study.variants:
            first = name
            for _ in study.variants:
                first = study.variants[first].init if first else ""
            if first:
                raise UserError(f"the init of {name} leads in a circle: let one of them start anew")
        for row in study.rows.values():
            check_word(row.variant, tuple(study.variants), "variant")
        for comparison in study.comparisons:
            if len(comparison.rows) != 2:
                raise UserError(f"rows are [{', '.join(comparison.rows)}]: compare two")
            for row in comparison.rows:
                check_word(row, tuple(study.rows), "a compared row")
            for metric, expected in comparison.expect.items():
                check_word(metric, METRICS, "a compared metric")
                check_word(expected, ("higher", "lower"), f"what is expected of {metric}")
        for key in ("table", "dataset") if study.published else ():
            if key not in study.published:
                raise UserError(f"published lacks {key}: give table and dataset, or leave it out")
        if study.repeats < 2:
            raise UserError(f"repeats is {study.repeats}: stability needs at least 2 noise seeds")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
