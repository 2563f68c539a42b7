"""Studies: their files, what is done once, reports. Stand-in scripts train and restore."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from consissr import commandline
from consissr.config import load_config
from consissr.errors import UserError
from consissr.evaluation import bootstrap, children, studies, study_run
from consissr.evaluation.study_report import report
from consissr.evaluation.tables import comparison, load_table
from consissr.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
STUDIES, TABLES = ROOT / "configs" / "nano" / "studies", ROOT / "configs" / "tables"
NAMES = studies.available(STUDIES)

# --- the shipped studies ---


def variants(study: str) -> dict[str, TrainConfig]:
    return {path.stem: load_config(TrainConfig, path) for path in sorted((STUDIES / study).glob("*.yaml"))}


@pytest.mark.parametrize("name", NAMES)
def test_variants_differ_only_where_the_study_says(name: str) -> None:
    study = studies.load_study(name, STUDIES)
    configs = variants(name)
    assert set(configs) == {row.train for row in study.rows.values()} - {""}, "every file is trained by a row"
    for variant, config in configs.items():
        assert config.output_dir == f"runs/studies/{name}/models/{variant}"
        assert f"study.py {name} --only {variant} " in (STUDIES / name / f"{variant}.yaml").read_text()
    for stage in {config.stage for config in configs.values()}:
        alike = [config for config in configs.values() if config.stage == stage]
        differing = {field for config in alike for field in studies.changed_fields(alike[0], config)}
        assert differing <= {*study.vary, "seed"}


def test_all_studies_share_one_budget() -> None:
    """What is trained from the bundled base: equal steps, batch, optimiser and data over all studies."""
    configs = [config for name in NAMES for config in variants(name).values() if config.stage != "deft"]
    fields = ("steps", "batch", "micro_batch", "ema", "optimizer", "data", "init", "seed")
    for field in fields:
        assert all(getattr(config, field) == getattr(configs[0], field) for config in configs), field
    assert all(config.model.base == "nano" and config.model.residual == 0.5 for config in configs)
    shared = {"consissr_table4/gamma10": "consissr_table3/hpa_pooled", "ccsr_table1/v2": "hybrids/nuts_hpa_tala"}
    for one, other in shared.items():
        a, b = (variants(name.split("/")[0])[name.split("/")[1]] for name in (one, other))
        assert all(field.startswith(("model.", "tala.")) for field in studies.changed_fields(a, b))


@pytest.mark.parametrize("name", NAMES)
def test_studies_name_published_rows_and_known_models(name: str) -> None:
    from consissr.evaluation.study_scores import Published

    plan = studies.Plan(STUDIES, Path("out"))
    study = plan.study(name)
    published = Published(study, TABLES)
    for row in study.rows.values():
        assert plan.results(name, row.name)
        assert published.cells(row.name) or not row.published
    assert {"consissr_table4/gamma10", "consissr_table4/gamma10-seed2"} <= set(plan.trainings("consissr_table4", []))
    assert list(plan.trainings("ccsr_table1", ["full"])) == ["ccsr_table1/v2", "ccsr_table1/full"]


def test_sampler_flags_are_those_of_infer_and_take_the_steps_they_claim() -> None:
    from ccsr import nuts_plan

    plan, checked = studies.Plan(STUDIES, Path("out")), 0
    for row in [row for name in NAMES for row in plan.study(name).rows.values()]:
        args = commandline.parser("").parse_args(["-i", "x", *row.flags])
        if args.t_max is None:
            continue
        timesteps = [step.t for step in nuts_plan(args.steps, args.t_max, args.t_min)]
        if row.about.startswith("S = "):
            assert f"S = {len(timesteps)}" == row.about
            checked += 1
        if row.name in ("v1", "v1_truncated"):
            assert timesteps == {"v1": [999, 499], "v1_truncated": [999, 832]}[row.name]
    assert checked == 12


def test_the_tower_alone_comes_from_a_bundled_model() -> None:
    import torch

    from consissr.checkpoint import find_model
    from consissr.models.image_encoder import find_tower
    from consissr.models.image_prompt import load_tower

    config = variants("consissr_table4")["gamma10"].model
    found, own = find_tower(config).state_dict(), load_tower(find_model("nano-consissr"))[0].state_dict()
    base = find_tower(type(config)(base="nano")).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in found.items())
    assert not all(torch.equal(value, base[name]) for name, value in found.items())


def test_a_model_without_image_tokens(tmp_path: Path) -> None:
    import torch

    from consissr.checkpoint import find_model, read_weights
    from consissr.models.image_prompt import Adapter

    study_run.without_tokens(find_model("nano-consissr"), tmp_path / "blind")
    before, after = (
        read_weights(folder / "image_encoder" / "model.safetensors")
        for folder in (find_model("nano-consissr"), tmp_path / "blind")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"adapter.linear_3.weight", "adapter.linear_3.bias"}
    state = {name.removeprefix("adapter."): value.float() for name, value in after.items() if "adapter." in name}
    adapter = Adapter(state["linear_1.weight"].shape[1], state["linear_1.weight"].shape[0])
    adapter.load_state_dict(state)
    assert not adapter(torch.randn(2, 3, state["linear_1.weight"].shape[1])).any()
    with pytest.raises(UserError, match="no image prompt"):
        study_run.without_tokens(find_model("nano-ccsr"), tmp_path / "none")


# --- running ---

TRAIN = """
import json, pathlib, sys
words = dict(w.split("=", 1) for w in sys.argv[1:] if "=" in w)
folder = pathlib.Path(words["output_dir"])
calls = pathlib.Path(__file__).with_name("calls")
calls.open("a").write(" ".join(sys.argv[1:]) + "\\n")
if folder.name in calls.with_name("bad").read_text().split():
    sys.exit("error: no luck")
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text("{}")
"""
RESTORE = """
import pathlib, sys
import numpy as np
from PIL import Image
at = lambda flag: sys.argv[sys.argv.index(flag) + 1]
calls = pathlib.Path(__file__).with_name("calls")
calls.open("a").write(" ".join(sys.argv[1:]) + "\\n")
better = "better" in at("-m")
for k in range(int(at("--repeat"))):
    out = pathlib.Path(at("-o")) / f"sample{k}"
    out.mkdir(parents=True, exist_ok=True)
    for path in pathlib.Path(at("-i")).glob("*.png"):
        hr = np.asarray(Image.open(path.parent.parent / "HR" / path.name), float)
        rng = np.random.default_rng([k, len(path.name)])
        noisy = hr + rng.normal(0, 4 if better else 12, hr.shape)
        Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8)).save(out / path.name)
        for t in (999, 0) if "--save-steps" in sys.argv else ():
            (out / f"{path.name}_steps").mkdir(exist_ok=True)
            noisy = hr + rng.normal(0, 8 if t == 0 else 12 if better else 30, hr.shape)
            step = Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))
            step.save(out / f"{path.name}_steps" / f"{t == 0:02}_t{t}.png")
"""
STUDY = """
# a small study
title: small
published: {table: consissr/table4, dataset: RealSR}
repeats: 2
vary: [tala.gamma]
rows:
  plain: {train: plain, seeds: [1, 2], published: DDPM}
  better: {train: better, seeds: [1, 2], published: "TALA(gamma=10)"}
  tuned: {train: tuned}
  again: {model: small/better, flags: [--steps, "2"]}
comparisons:
  - {rows: [better, plain], expect: {psnr: higher, l-std: lower}, claim: "better is better", source: "nobody"}
  - {rows: [tuned, plain], expect: {psnr: higher}, claim: "tuned is better", source: "nobody"}
curves: {rows: [better, plain], early: 600, title: steps, claim: "better begins better", source: "nobody"}
"""


@pytest.fixture
def setting(tmp_path: Path) -> study_run.Setting:
    """A small study, stand-ins for the scripts, and test images that are already there."""
    configs, scripts = tmp_path / "studies", tmp_path / "scripts"
    (configs / "small").mkdir(parents=True)
    (configs / "small.yaml").write_text(STUDY)
    own = {"plain": "", "better": "tala: {gamma: 20}", "tuned": "init: runs/studies/small/models/plain"}
    for name, more in own.items():
        text = f"# x\nstage: tala\nseed: 1\noutput_dir: runs/studies/small/models/{name}\n{more}\n"
        (configs / "small" / f"{name}.yaml").write_text(text)
    scripts.mkdir()
    for name, text in (("train.py", TRAIN), ("infer.py", RESTORE), ("bad", "")):
        (scripts / name).write_text(text)
    rng = np.random.default_rng(0)
    for dataset, part in product(studies.DATASETS, ("HR", "LR")):
        folder, side = tmp_path / "out" / "data" / dataset / part, {"HR": 192, "LR": 48}[part]
        folder.mkdir(parents=True)
        for name in ("a", "bb", "ccc"):
            coarse = rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
            Image.fromarray(coarse).resize((side, side), Image.BICUBIC).save(folder / f"{name}.png")
    (tmp_path / "photos" / "train").mkdir(parents=True)
    plan = studies.Plan(configs, tmp_path / "out")
    return study_run.Setting(plan=plan, scripts=scripts, jobs=2, photos=tmp_path / "photos")


def work(setting: study_run.Setting) -> dict[str, str]:
    """Everything that is left to do."""
    jobs = study_run.training_jobs(setting, setting.plan.trainings("small", []))
    jobs += study_run.restoring_jobs(setting, "small", setting.plan.chosen("small", []), [job.name for job in jobs])
    return children.run_jobs(jobs, setting.jobs)


def calls(setting: study_run.Setting) -> list[str]:
    path = setting.scripts / "calls"
    return path.read_text().splitlines() if path.is_file() else []


def test_what_is_done_is_not_done_again_and_failures_are_named(setting: study_run.Setting) -> None:
    (setting.scripts / "bad").write_text("plain")
    failed = work(setting)
    assert failed["train small/plain"] == "error: no luck"
    assert failed["train small/tuned"] == "needs train small/plain, which failed"
    assert "train small/better" not in failed and "restore small/plain photos" in failed
    first = calls(setting)
    assert sum("--config" in call for call in first) == 4, "the other trainings went on"

    (setting.scripts / "bad").write_text("")
    (setting.scripts / "calls").unlink()
    assert work(setting) == {}
    trained = [call for call in calls(setting) if "--config" in call]
    assert [Path(c.split("--config ")[1].split()[0]).stem for c in trained] == ["plain", "tuned"]
    init = str(setting.plan.out / "small" / "models" / "plain")
    assert f"init={init}" in trained[1], "it starts from the model below this output folder"
    assert not any("better" in call for call in calls(setting)), "nothing complete is touched"

    (setting.scripts / "calls").unlink()
    assert work(setting) == {} and calls(setting) == []

    more = replace(setting, plan=studies.Plan(setting.plan.folder, setting.plan.out, repeats=3))
    assert work(more) == {}
    assert all("--repeat 3" in call and "--skip-existing" in call for call in calls(setting))
    assert len(calls(setting)) == 2 * 6 and work(setting) == {}, "noises join those that are there"


def test_a_stopped_training_goes_on_from_its_checkpoint(setting: study_run.Setting) -> None:
    place = setting.plan.out / "small" / "models" / "better" / "checkpoint-60"
    place.mkdir(parents=True)
    (place / "state.json").write_text('{"step": 60}')
    jobs = {job.name: job for job in study_run.training_jobs(setting, setting.plan.trainings("small", []))}
    assert "--resume latest" in " ".join(jobs["train small/better"].command)
    assert "--resume" not in jobs["train small/plain"].command
    assert "seed=2" in jobs["train small/plain-seed2"].command


def test_another_configuration_is_not_taken_for_this_one(setting: study_run.Setting) -> None:
    folder = setting.plan.out / "small" / "models" / "better"
    folder.mkdir(parents=True)
    (folder / "train.yaml").write_text("stage: tala\nseed: 1\ntala: {gamma: 20}\nsteps: 2\n")
    with pytest.raises(UserError, match="other values of steps: remove it"):
        study_run.training_jobs(setting, setting.plan.trainings("small", []))


def test_results_of_other_flags_are_not_taken_for_these(setting: study_run.Setting) -> None:
    training = setting.plan.training("small", "better")
    training.folder.mkdir(parents=True)
    study_run.mark(training, setting, 1.0)
    (again,) = setting.plan.results("small", "again")
    study_run.begin(again, "realsr", "fp32")
    assert study_run.restoring_jobs(setting, "small", ["again"], [])
    path = setting.plan.folder / "small.yaml"
    path.write_text(path.read_text().replace('"2"]', '"3"]'))
    setting.plan.studies.clear()
    with pytest.raises(UserError, match="again.* was restored otherwise"):
        study_run.restoring_jobs(setting, "small", ["again"], [])


def test_a_report_tells_all_and_lists_what_is_missing(setting: study_run.Setting, tmp_path: Path) -> None:
    (setting.scripts / "bad").write_text("tuned")
    work(setting)
    missing = report(setting, "small", TABLES, tmp_path / "tables" / "nano")
    assert missing == ["small: tuned: not trained (small/tuned)"]
    out = setting.plan.out / "small"
    rows = list(csv.DictReader((out / "comparisons.csv").open()))
    psnr = next(r for r in rows if (r["dataset"], r["metric"]) == ("realsr", "psnr"))
    assert float(psnr["difference"]) == pytest.approx(20 * np.log10(12 / 4), abs=0.7), "noise of 4 against 12"
    assert float(psnr["low"]) <= float(psnr["difference"]) <= float(psnr["high"]) and psnr["verdict"] == "appears"
    assert float(psnr["published difference"]) == pytest.approx(25.50 - 24.77)
    assert not any(r["first"] == "tuned" for r in rows)
    steps = {r["metric"]: r for r in rows if r["metric"].startswith("psnr at")}
    assert set(steps) == {"psnr at t >= 600", "psnr at t = 999", "psnr at t = 0"}
    assert float(steps["psnr at t >= 600"]["difference"]) == pytest.approx(20 * np.log10(30 / 12), abs=0.9)
    assert steps["psnr at t >= 600"]["verdict"] == "appears"
    assert abs(float(steps["psnr at t = 0"]["difference"])) < 0.1, "equally noisy at the end"
    images = list(csv.DictReader((out / "per_image.csv").open()))
    assert len(images) == 2 * (5 * 2 + 2) * 3  # data sets, rows and seeds times runs, baselines, images
    summary = {(r["dataset"], r["row"], r["seed"]): r for r in csv.DictReader((out / "summary.csv").open())}
    own = [float(r["psnr"]) for r in images if (r["dataset"], r["row"], r["seed"]) == ("realsr", "plain", "2")]
    assert float(summary["realsr", "plain", "2"]["psnr"]) == pytest.approx(np.mean(own), abs=1e-5)
    text = (out / "summary.md").read_text()
    for words in ("tuned: not trained", "better is better", "24.77", "training: ", "restoring: ", "core(s)"):
        assert words in text
    for name in ("noises_realsr.png", "crops_photos.png", "means.png", "curves.png"):
        assert Image.open(out / name).width > 300
    table = load_table("nano/small", tmp_path / "tables")
    shown = comparison(table, table.dataset("realsr"), {})
    assert "| better | recorded |" in shown and "| better, published | recorded | 25.50 " in shown
    assert "better is better (nobody): better - plain, psnr higher" in shown


def test_crops_are_of_the_same_place(tmp_path: Path) -> None:
    y, x = np.mgrid[:512, :512]
    hr = np.stack([x // 2, y // 2, x * 0], -1).astype(np.uint8)
    for part, pixels in (("HR", hr), ("LR", hr[::4, ::4])):
        (tmp_path / "pairs" / part).mkdir(parents=True)
        for i in range(41):
            Image.fromarray(pixels).save(tmp_path / "pairs" / part / f"{i:03}.png")
    study_run.centre_crops(tmp_path / "pairs", tmp_path / "out")
    names = [path.name for path in sorted((tmp_path / "out" / "LR").iterdir())]
    count, side = study_run.REALSR["count"], study_run.REALSR["crop"]
    assert len(names) == count and names[:2] == ["000.png", f"{41 // count:03}.png"]
    lr, cropped = (np.asarray(Image.open(tmp_path / "out" / part / names[1])) for part in ("LR", "HR"))
    margin = (512 - 4 * side) // 2
    assert lr.shape == (side, side, 3) and (cropped == hr[margin:-margin, margin:-margin]).all()
    assert (lr == cropped[::4, ::4]).all()


# --- mistakes ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("repeats:", "repaets:"), "unknown key 'repaets'; did you mean 'repeats'"),
        (("rows: [better, plain]", "rows: [bettr, plain]"), "no row 'bettr'; did you mean 'better'"),
        (("psnr: higher, l-std", "psnr: more, l-std"), "'psnr: more' is no expectation"),
        (("tuned: {train: tuned}", "tuned: {train: missing}"), "small/missing.yaml, which does not exist"),
        (("tuned: {train: tuned}", "tuned: {train: tuned, model: nano-ccsr}"), "exactly one of train, model and like"),
    ],
)
def test_mistakes_in_a_study_are_named(setting: study_run.Setting, change: tuple[str, str], message: str) -> None:
    path = setting.plan.folder / "small.yaml"
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UserError, match=message):
        studies.load_study("small", setting.plan.folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["consissr_tabel4"], "unknown study 'consissr_tabel4'; did you mean 'consissr_table4'"),
        (["hybrids", "--train-only"], "give --photos"),
        (["hybrids", "--train-only", "--photos", "nowhere"], "--photos nowhere has no folder train/"),
        (["hybrids", "--only", "nothing", "--train-only"], "no study has a row nothing"),
    ],
)
def test_mistakes_in_a_call_are_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    call = [sys.executable, str(ROOT / "scripts" / "study.py"), *words, "-o", str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and message in done.stderr


def test_recorded_studies_can_be_shown() -> None:
    for path in sorted((TABLES / "nano").glob("*.yaml")):
        table = load_table(f"nano/{path.stem}", TABLES)
        for dataset in table.datasets:
            assert "recorded" in comparison(table, dataset, {})
        assert {f["verdict"] for f in table.findings} <= set(bootstrap.VERDICTS)
