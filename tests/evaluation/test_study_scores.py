"""Which rows a study compares, at which training seeds, and the curves of sampling steps that it can draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from consissr.errors import UserError
from consissr.studies.run import Setting
from consissr.studies.scores import Model, Published, Scores, compare, compare_steps, measure_steps
from consissr.studies.spec import COMPARED, Comparison, Plan, Results, Row, Study

TABLES = Path(__file__).resolve().parents[2] / "configs" / "tables"


def scored(**rows: dict[int, Model]) -> Scores:
    """Rows whose every value is 1 + the row's place + a tenth of the seed."""
    scores = Scores("realsr", ["x", "y", "z"], models=dict(rows))
    for place, (row, models) in enumerate(rows.items()):
        scores.values[row] = {s: {m: np.full(3, 1 + place + s / 10) for m in COMPARED} for s in models}
    return scores


def found(scores: Scores, expect: str = "lower") -> list:
    one = Comparison(rows=tuple(scores.values), expect={"psnr": expect}, claim="", source="")
    rows = {row: Row(name=row, train="x") for row in scores.values}
    study = Study(name="x", title="x", rows=rows, comparisons=[one])
    return compare(study, scores, Published(study, TABLES))


def trained(key: str, *seeds: int) -> dict[int, Model]:
    return {seed: Model(f"{key}-seed{seed}", True) for seed in seeds}


BUNDLED = {0: Model("nano-ccsr", False)}


@pytest.mark.parametrize(
    ("a", "b", "difference", "said"),
    [
        (trained("a", 1, 2), trained("b", 1, 2), -1.0, "appears"),
        (trained("a", 1, 2), trained("b", 2), -1.0, "appears (one training seed)"),
        (trained("a", 1), trained("a", 1), -1.0, "appears"),  # one model, sampled in two ways
        (BUNDLED, BUNDLED, -1.0, "appears"),
        (BUNDLED, trained("b", 1), -1.1, "appears (one training seed)"),
        (BUNDLED, trained("b", 1, 2), -1.15, "appears"),
        (trained("a", 1, 2), BUNDLED, -0.85, "appears"),
    ],
)
def test_rows_are_compared_at_common_seeds(a: dict, b: dict, difference: float, said: str) -> None:
    (finding,) = found(scored(a=a, b=b))
    assert finding.found.overall.mean == pytest.approx(difference)
    assert finding.verdict == said


def test_models_of_different_seeds_are_not_compared() -> None:
    assert found(scored(a=trained("a", 1), b=trained("b", 2))) == []


def test_least_differences_are_the_metrics_own() -> None:
    scores = scored(a=trained("a", 1, 2), b=trained("b", 1, 2))
    for values in scores.values["b"].values():
        values["psnr"] = values["psnr"] - 1 + 0.005
    assert found(scores)[0].verdict == "not resolved"
    assert found(scores, "unchanged")[0].verdict == "appears"


def test_an_unknown_published_row_is_named() -> None:
    study = Study(name="x", title="x", rows={"a": Row(name="a", train="a", published="TALA(gama=10)")},
                  published={"table": "consissr/table4", "dataset": "RealSR"})  # fmt: skip
    with pytest.raises(UserError, match=r"consissr/table4 has no row 'TALA\(gama=10\)'.*did you mean 'TALA\(gamma=10"):
        Published(study, TABLES).cells("a")


# --- curves ---

CURVES = {"rows": ["a", "b"], "early": 600, "title": "", "claim": "", "source": ""}
NOISE = {"a": 4, "b": 12}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """Two HR images, and no results."""
    hr = tmp_path / "data" / "realsr" / "HR"
    hr.mkdir(parents=True)
    for k in (0, 1):
        coarse = np.random.default_rng(k).integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(coarse).resize((48, 48), Image.BICUBIC).save(hr / f"{k}.png")
    return Setting(plan=Plan(tmp_path, tmp_path), scripts=tmp_path, jobs=1)


def restored(setting: Setting, row: str, seed: int, steps: tuple[int, ...], repeats: int = 2) -> Results:
    """A row's results: HR with noise, the same at each step; runs beyond two have none."""
    folder = setting.plan.out / f"{row}{seed}"
    for k, image in ((k, image) for k in range(repeats) for image in "01"):
        hr = np.asarray(Image.open(setting.plan.out / "data" / "realsr" / "HR" / f"{image}.png"), float)
        noisy = hr + np.random.default_rng([k, seed]).normal(0, NOISE[row], hr.shape)
        out = folder / "realsr" / f"sample{k}"
        (out / f"{image}.png_steps").mkdir(parents=True)
        for i, t in enumerate(steps if k < 2 else ()):
            picture = Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))
            picture.save(out / f"{image}.png_steps" / f"{i:02}_t{t}.png")
        Image.fromarray(hr.astype(np.uint8)).save(out / f"{image}.png")
    return Results(row, seed, folder, f"{row}{seed}", f"x/{row}{seed}", ())


def steps_of(setting: Setting, *ready: Results) -> tuple:
    study = Study(name="x", title="x", rows={row: Row(name=row, train=row) for row in "ab"}, curves=CURVES, repeats=2)
    steps, missing = measure_steps(setting, study, list(ready))
    return steps, missing, compare_steps(study, steps) if steps else []


def test_curves_are_of_common_steps_of_the_runs_that_count(setting: Setting) -> None:
    a, b = restored(setting, "a", 1, (999, 500, 0), repeats=3), restored(setting, "b", 1, (999, 0))
    steps, missing, findings = steps_of(setting, a, b)
    assert steps.timesteps == [999, 0] and missing == []
    labels = ("t >= 600", "t = 999", "t = 0")
    assert {f.metric for f in findings} == {f"{metric} at {label}" for metric in ("psnr", "ssim") for label in labels}
    psnr = next(f for f in findings if f.metric == "psnr at t >= 600")
    assert psnr.found.overall.mean == pytest.approx(20 * np.log10(12 / 4), abs=0.7)
    assert psnr.verdict == "appears (one training seed)"


def test_curves_that_cannot_be_are_missing_in_words(setting: Setting) -> None:
    a, b = restored(setting, "a", 1, (999, 0)), restored(setting, "b", 2, (999, 0))
    assert steps_of(setting, a) == (None, [], []), "the missing row is named elsewhere"
    assert steps_of(setting, a, b) == (None, ["curves: a and b share no training seed and timestep"], [])
    other = restored(setting, "b", 1, (700,))
    assert steps_of(setting, a, other)[1] == ["curves: a and b share no training seed and timestep"]
    two = [restored(setting, "a", 2, ()), a, b]
    steps, missing, _ = steps_of(setting, *two)
    assert steps is None and missing == [
        f"curves: {setting.plan.out / 'a2'} lacks pictures of its sampling steps: remove it and restore again"
    ]
