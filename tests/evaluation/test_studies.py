"""Studies at work: what is done once, what is not taken for something else, reports. Stand-in scripts."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from consissr.errors import UserError
from consissr.evaluation import children
from consissr.evaluation.tables import comparison, load_table
from consissr.studies import run, spec
from consissr.studies.report import command, report
from consissr.studies.scores import restored

TABLES = Path(__file__).resolve().parents[2] / "configs" / "tables"

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
def setting(tmp_path: Path) -> run.Setting:
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
    for dataset, part in product(spec.DATASETS, ("HR", "LR")):
        folder, side = tmp_path / "out" / "data" / dataset / part, {"HR": 192, "LR": 48}[part]
        folder.mkdir(parents=True)
        for name in ("a", "bb", "ccc"):
            coarse = rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
            Image.fromarray(coarse).resize((side, side), Image.BICUBIC).save(folder / f"{name}.png")
    (tmp_path / "photos" / "train").mkdir(parents=True)
    plan = spec.Plan(configs, tmp_path / "out")
    return run.Setting(plan=plan, scripts=scripts, jobs=2, photos=tmp_path / "photos")


def work(setting: run.Setting) -> dict[str, str]:
    """Everything that is left to do."""
    jobs = run.training_jobs(setting, setting.plan.trainings("small", []))
    jobs += run.restoring_jobs(setting, "small", setting.plan.chosen("small", []), [job.name for job in jobs])
    return children.run_jobs(jobs, setting.jobs)


def calls(setting: run.Setting) -> list[str]:
    path = setting.scripts / "calls"
    return path.read_text().splitlines() if path.is_file() else []


def test_what_is_done_is_not_done_again_and_failures_are_named(setting: run.Setting) -> None:
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

    more = replace(setting, plan=spec.Plan(setting.plan.folder, setting.plan.out, repeats=3))
    assert work(more) == {}
    assert all("--repeat 3" in call and "--skip-existing" in call for call in calls(setting))
    assert len(calls(setting)) == 2 * 6 and work(setting) == {}, "noises join those that are there"


def test_a_stopped_training_goes_on_from_its_checkpoint(setting: run.Setting) -> None:
    place = setting.plan.out / "small" / "models" / "better" / "checkpoint-60"
    place.mkdir(parents=True)
    (place / "state.json").write_text('{"step": 60}')
    jobs = {job.name: job for job in run.training_jobs(setting, setting.plan.trainings("small", []))}
    assert "--resume latest" in " ".join(jobs["train small/better"].command)
    assert "--resume" not in jobs["train small/plain"].command
    assert "seed=2" in jobs["train small/plain-seed2"].command
    other = replace(setting, overrides=["seed=5"])
    words = run.training_jobs(other, setting.plan.trainings("small", []))[0].command
    assert words.index("seed=5") < words.index("seed=1"), "a row's seed is what --set cannot change"


def test_another_configuration_is_not_taken_for_this_one(setting: run.Setting) -> None:
    folder = setting.plan.out / "small" / "models" / "better"
    folder.mkdir(parents=True)
    (folder / "train.yaml").write_text("stage: tala\nseed: 1\ntala: {gamma: 20}\nsteps: 2\n")
    with pytest.raises(UserError, match="other values of steps: remove it"):
        run.training_jobs(setting, setting.plan.trainings("small", []))


def begun(setting: run.Setting) -> tuple[spec.Training, spec.Results]:
    """The model of row `again`, as if trained, and its results, begun on the real pairs."""
    training = setting.plan.training("small", "better")
    training.folder.mkdir(parents=True)
    run.mark(training, setting, 1.0)
    (again,) = setting.plan.results("small", "again")
    run.begin(again, "realsr", "fp32")
    return training, again


def test_results_of_other_flags_are_not_taken_for_these(setting: run.Setting) -> None:
    begun(setting)
    assert run.restoring_jobs(setting, "small", ["again"], [])
    path = setting.plan.folder / "small.yaml"
    path.write_text(path.read_text().replace('"2"]', '"3"]'))
    setting.plan.studies.clear()
    with pytest.raises(UserError, match="again.* was restored otherwise"):
        run.restoring_jobs(setting, "small", ["again"], [])


def test_results_of_a_model_that_is_trained_anew(setting: run.Setting) -> None:
    training, again = begun(setting)
    done = training.folder / run.DONE
    done.write_text(json.dumps(json.loads(done.read_text()) | {"finished": "later"}))
    with pytest.raises(UserError, match=r"again.* was restored otherwise .*trained\)"):
        run.restoring_jobs(setting, "small", ["again"], [])
    lacking = restored(setting, setting.plan.study("small"), "realsr")[1]
    assert "again: restored otherwise on realsr (trained)" in lacking
    done.unlink()
    with pytest.raises(UserError, match=r"small/better, which is to be trained anew\): remove .*again"):
        run.restoring_jobs(setting, "small", ["again"], ["train small/better"])
    shutil.rmtree(again.folder)
    assert run.restoring_jobs(setting, "small", ["again"], ["train small/better"])


def test_records_are_compared_where_they_say_something(tmp_path: Path) -> None:
    results = spec.Results("x", 0, tmp_path / "x", "nano-ccsr", "", ("--steps", "6"), save_steps=True)
    assert run.otherwise(results, "realsr", "bf16") == [], "no record"
    run.begin(results, "realsr", "bf16")
    path = run.record_of(results, "realsr")
    told = json.loads(path.read_text())
    assert run.otherwise(results, "realsr", "bf16") == run.otherwise(results, "realsr") == []
    assert run.otherwise(results, "realsr", "fp32") == ["precision"]
    assert run.otherwise(replace(results, save_steps=False), "realsr") == [], "more than is asked for"
    for change, said in (({"weights": "0"}, ["weights"]), ({"save_steps": False}, ["save_steps"]),
                         ({"flags": []}, ["flags"])):  # fmt: skip
        path.write_text(json.dumps(told | change))
        assert run.otherwise(results, "realsr") == said
    path.write_text(json.dumps({key: told[key] for key in ("model", "trained", "flags", "zero_tokens", "precision")}))
    assert run.otherwise(results, "realsr", "bf16") == ["weights"], "older than the keys: whose weights?"
    path.write_text(json.dumps({key: told[key] for key in ("model", "trained", "flags", "precision", "weights")}))
    assert run.otherwise(results, "realsr", "bf16") == [], "a record from before there were the other keys"


def test_a_digest_tells_weights_apart(tmp_path: Path) -> None:
    from consissr.weights.files import find_model

    shutil.copytree(find_model("nano-ccsr"), tmp_path / "copy")
    same = run.weights_digest("nano-ccsr")
    (tmp_path / "copy" / "README.md").write_text("another card")
    assert run.weights_digest(str(tmp_path / "copy")) == same
    weights = tmp_path / "copy" / "unet_adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert run.weights_digest(str(tmp_path / "copy")) != same


def test_a_model_whose_source_is_trained_anew_is_not_kept(setting: run.Setting) -> None:
    plain, tuned = (setting.plan.training("small", name) for name in ("plain", "tuned"))
    for training in (plain, tuned):
        training.folder.mkdir(parents=True)
        (training.folder / "config.yaml").write_text("{}")
        run.mark(training, setting, 1.0)
    assert tuned.source == plain.folder and run.is_trained(tuned)
    done, own = plain.folder / run.DONE, tuned.folder / run.DONE
    done.write_text(json.dumps(json.loads(done.read_text()) | {"finished": "later"}))
    with pytest.raises(UserError, match="tuned was trained from another small/plain than the one there: remove it"):
        run.is_trained(tuned)
    own.write_text(json.dumps({key: value for key, value in json.loads(own.read_text()).items() if key != "source"}))
    assert run.is_trained(tuned), "an older record does not say of which it was trained"


def test_one_job_that_cannot_begin_leaves_the_others(tmp_path: Path) -> None:
    def fail() -> None:
        raise UserError("no image prompt")

    jobs = [children.Job("slow", ["sleep", "0.5"], tmp_path / "a"),
            children.Job("bad", ["true"], tmp_path / "b", before=fail),
            children.Job("after", ["true"], tmp_path / "c", after=("bad",))]  # fmt: skip
    failed = children.run_jobs(jobs, 2)
    assert failed == {"bad": "no image prompt", "after": "needs bad, which failed"}


def test_a_recorded_command_has_what_was_given(setting: run.Setting) -> None:
    study = setting.plan.study("small")
    assert command(setting, study) == "python scripts/study.py small --photos PHOTOS --realsr REALSR"
    plan = spec.Plan(setting.plan.folder, setting.plan.out, repeats=3)
    given = command(replace(setting, plan=plan, overrides=["steps=2", "data.crop=[1]"]), study)
    assert given.endswith(" --repeats 3 --set steps=2 'data.crop=[1]'")


def test_a_report_tells_all_and_lists_what_is_missing(setting: run.Setting, tmp_path: Path) -> None:
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
    assert "| plain, training seed 2 alone |" in text
    for words in ("tuned: not trained", "better is better", "24.77", "training: ", "restoring: ", "core(s)"):
        assert words in text
    for name in ("noises_realsr.png", "crops_photos.png", "means.png", "curves.png"):
        assert Image.open(out / name).width > 300
    table = load_table("nano/small", tmp_path / "tables")
    shown = comparison(table, table.dataset("realsr"), {})
    assert "| better | recorded |" in shown and "| better, published | recorded | 25.50 " in shown
    assert "better is better (nobody): better - plain, psnr higher" in shown
    assert "- plain: mean of training seeds 1, 2; differences use common seeds" in shown


def test_crops_are_of_the_same_place(tmp_path: Path) -> None:
    y, x = np.mgrid[:512, :512]
    hr = np.stack([x // 2, y // 2, x * 0], -1).astype(np.uint8)
    for part, pixels in (("HR", hr), ("LR", hr[::4, ::4])):
        (tmp_path / "pairs" / part).mkdir(parents=True)
        for i in range(41):
            Image.fromarray(pixels).save(tmp_path / "pairs" / part / f"{i:03}.png")
    run.centre_crops(tmp_path / "pairs", tmp_path / "out")
    names = [path.name for path in sorted((tmp_path / "out" / "LR").iterdir())]
    count, side = run.REALSR["count"], run.REALSR["crop"]
    assert len(names) == count and names[:2] == ["000.png", f"{41 // count:03}.png"]
    lr, cropped = (np.asarray(Image.open(tmp_path / "out" / part / names[1])) for part in ("LR", "HR"))
    margin = (512 - 4 * side) // 2
    assert lr.shape == (side, side, 3) and (cropped == hr[margin:-margin, margin:-margin]).all()
    assert (lr == cropped[::4, ::4]).all()


def test_pairs_that_are_none_are_named_and_folders_are_remembered(setting: run.Setting, tmp_path: Path) -> None:
    pairs, data = tmp_path / "pairs", setting.plan.out / "data"
    shutil.rmtree(data / "realsr")
    for part, side in (("HR", 288), ("LR", 72)):
        (pairs / part / "sub").mkdir(parents=True)
        Image.new("RGB", (side, side)).save(pairs / part / "sub" / "a.png")
    given = replace(setting, realsr=pairs)
    assert run.data_jobs(given) == [] and (data / "realsr" / "LR" / "sub-a.png").is_file()
    assert run.data_jobs(given) == run.data_jobs(setting) == []
    with pytest.raises(UserError, match=r"realsr was made of .*pairs, not of .*: give that folder, or use another -o"):
        run.data_jobs(replace(setting, realsr=tmp_path))
    assert run.data_jobs(replace(given, photos=tmp_path)) == [], "photographs of an unknown folder"

    (pairs / "LR" / "sub" / "a.png").rename(pairs / "LR" / "sub" / "b.png")
    with pytest.raises(UserError, match="lacks 1 of the 1 images"):
        run.centre_crops(pairs, tmp_path / "other")
    Image.new("RGB", (100, 100)).save(pairs / "LR" / "sub" / "a.png")
    (pairs / "LR" / "sub" / "b.png").unlink()
    with pytest.raises(UserError, match="is not 4 times as large as"):
        run.centre_crops(pairs, tmp_path / "other")


# --- mistakes ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title: small\n", ""), "a study lacks 'title'"),
        (("repeats: 2", "repeats: 1"), "repeats is 1: stability needs at least 2"),
        (("published: {table: consissr/table4, dataset: RealSR}", ""), "name the papers' table and dataset"),
        (('claim: "better is better", ', ""), "a comparison lacks 'claim'"),
        (("{rows: [better, plain], exp", "{rows: [better], exp"), r"rows are \[better\]: compare two"),
        (("{psnr: higher, l-std: lower}", "higher"), "expect is 'higher': name metrics"),
        (("repeats:", "repaets:"), "unknown key 'repaets'; did you mean 'repeats'"),
        (("rows: [better, plain]", "rows: [bettr, plain]"), "no row 'bettr'; did you mean 'better'"),
        (("psnr: higher, l-std", "psnr: more, l-std"), "'psnr: more' is no expectation"),
        (("tuned: {train: tuned}", "tuned: {train: missing}"), "small/missing.yaml, which does not exist"),
        (("tuned: {train: tuned}", "tuned: {train: tuned, model: nano-ccsr}"), "exactly one of train, model and like"),
    ],
)
def test_mistakes_in_a_study_are_named(setting: run.Setting, change: tuple[str, str], message: str) -> None:
    path = setting.plan.folder / "small.yaml"
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UserError, match=message):
        spec.load_study("small", setting.plan.folder)
