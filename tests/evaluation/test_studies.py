"""Studies: their files, their work in order and only once, and what is said of the results."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from consissr.config.loading import changed_fields, load_config
from consissr.config.training import TrainConfig
from consissr.errors import UserError
from consissr.evaluation import provenance
from consissr.evaluation.bootstrap import UNRESOLVED, Difference, Estimate, verdict
from consissr.evaluation.folders import read_image
from consissr.evaluation.tables import load_table
from consissr.nano.config import run_config
from consissr.studies import report, run, spec

ROOT = Path(__file__).resolve().parents[2]
NANO, TABLES = ROOT / "configs" / "nano", ROOT / "configs" / "tables"
STUDIES = NANO / "studies"
SMALL = """
title: a study
images: 4
seeds: [1, 2]
repeats: 2
lines: [steps=1]
variants:
  start: {parent: p.yaml, seeds: [7]}
  a: {parent: p.yaml, init: start}
  b: {parent: p.yaml, init: a, lines: [x=1]}
rows:
  a: {variant: a}
  b: {variant: b, flags: [--steps, '1']}
comparisons:
  - {rows: [b, a], expect: {psnr: higher}, claim: b is better, source: here}
"""


@pytest.fixture
def small(tmp_path: Path, sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> run.Work:
    """A study whose scripts are stand-ins: training writes a model folder, restoring copies LR enlarged."""
    monkeypatch.setattr(report, "METRICS", ("psnr", "psnr-gstd", "l-std"))  # the fast ones
    (tmp_path / "nano" / "studies").mkdir(parents=True)
    (tmp_path / "nano" / "p.yaml").write_text("stage: tala\n")
    (tmp_path / "nano" / "studies" / "s.yaml").write_text(SMALL)
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "train.py").write_text(
        "import sys, pathlib\n"
        "words = dict(word.split('=', 1) for word in sys.argv[1:] if '=' in word)\n"
        "folder, init = (pathlib.Path(words[key].strip(chr(34))) for key in ('output_dir', 'init'))\n"
        "folder.mkdir(parents=True)\n"
        "(folder / 'config.yaml').write_text(words['seed'] + ' ' + init.name)\n"
    )
    (scripts / "infer.py").write_text(
        "import sys, pathlib\n"
        "from PIL import Image\n"
        "at = lambda flag: pathlib.Path(sys.argv[sys.argv.index(flag) + 1])\n"
        "shift = 9 * ('results/s-b' in str(at('-o'))) + int((at('-m') / 'config.yaml').read_text().split()[0])\n"
        "for number in range(int(str(at('--repeat')))):\n"
        "    folder = at('-o') / f'sample{number}'\n"
        "    folder.mkdir(parents=True, exist_ok=True)\n"
        "    for path in at('-i').glob('*.png'):\n"
        "        image = Image.open(path)\n"
        "        image = image.resize((image.width * 4, image.height * 4)).point(lambda v: v + shift + number)\n"
        "        image.save(folder / path.name)\n"
    )
    for name in ("train", "val"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    big = np.random.default_rng(0).integers(0, 255, (260, 270, 3), np.uint8)
    Image.fromarray(big).save(tmp_path / "photos" / "val" / "v.png")
    (tmp_path / "photos" / "train" / "t.png").write_bytes(b"t")
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    sets["lr"].rename(pairs / "LR")
    sets["hr"].rename(pairs / "HR")
    return run.Work(study=spec.load_study("s", tmp_path / "nano" / "studies"), out=tmp_path / "out",
                    parents=tmp_path / "nano", scripts=scripts, photos=tmp_path / "photos", realsr=pairs,
                    jobs=1)  # fmt: skip


def do(work: run.Work) -> list[str]:
    """Do all that is left; the names of the jobs that ran."""
    ran = []
    for jobs in run.stages(work, list(work.study.rows)):
        assert run.run_commands(jobs, 2) == {}
        ran += [job.name for job in jobs]
    return ran


def test_a_study_from_training_to_verdict(small: run.Work) -> None:
    assert report.report(small, TABLES)[0] == "test set realsr"
    ran = do(small)
    order = ["train start, seed 7", "train a, seed 1", "train a, seed 2", "train b, seed 1", "train b, seed 2"]
    assert ran[:5] == order and len(ran) == 5 + 2 * 2 * 2
    model = small.model("b", 2)
    assert (model / "config.yaml").read_text() == f"2 {small.model('a', 2).name}"
    assert provenance.record(model)["lines"] == ["steps=1", "x=1"] and provenance.record(model)["seconds"] > 0
    assert do(small) == [], "nothing is done twice"

    assert report.report(small, TABLES) == []
    text = (small.out / "s" / "summary.md").read_text()
    assert "| bicubic (for scale) | - |" in text and "5 models trained" in text and "## realsr: 3 images" in text
    with (small.out / "s" / "comparisons.csv").open() as file:
        (finding, *_) = csv.DictReader(file)
    assert finding["verdict"] == "opposite" and float(finding["difference"]) < 0, "b's grey shift costs PSNR"
    assert len(finding["per seed"].split()) == 2 and float(finding["least"]) > 0
    assert (small.out / "s" / "crops_realsr.png").is_file() and "opposite" in text

    (small.photos / "train" / "t.png").write_bytes(b"other")
    other = dataclasses.replace(small)
    assert other.model("b", 1) != small.model("b", 1)
    assert other.results("a", 1, "realsr") != small.results("a", 1, "realsr")
    (anew, *_) = run.stages(other, list(other.study.rows))
    assert [job.name for job in anew] == ["train start, seed 7"], "what is made of other photographs is made anew"


def test_how_far_each_command_is_is_told_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, told = tmp_path / "gate", []

    class Terminal:
        def write(self, text: str) -> None:
            told.append(text)
            if text == "long: half way\n":
                gate.touch()

        def writelines(self, lines: Iterable[str]) -> None:
            for line in lines:
                self.write(line)

    script, folder = tmp_path / "long.py", provenance.folder_of(tmp_path, "made")
    script.write_text("""
import pathlib, sys, time

print("begin\\rhalf way", flush=True)
gate, end = pathlib.Path(sys.argv[1]), time.time() + 60
while time.time() < end and not gate.exists():
    time.sleep(0.05)
sys.exit(not gate.exists())
""")
    monkeypatch.setattr(run, "EVERY", 0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    command = run.Command("long", folder, [sys.executable, str(script), str(gate)])
    assert run.run_commands([command], 1) == {}
    assert told[0] == f"begun: long; its log: {command.log}\n" and told[-1].startswith("done: long (")


def test_rows_are_paired_by_training_seed_in_whatever_order_they_list_them() -> None:
    """Seed 1 is 1 better and seed 2 is 3 better, in every image: crosswise the differences would be 13 and -9."""
    comparison = spec.Comparison(rows=["b", "a"], claim="better", expect={"psnr": "higher"})
    study = spec.Study(comparisons=[comparison])
    a, b = np.array([[10.0] * 4, [20.0] * 4]), np.array([[23.0] * 4, [11.0] * 4])
    scores = report.Scores("s", list("wxyz"), {"a": {"psnr": a}, "b": {"psnr": b}}, {"a": [1, 2], "b": [2, 1]})
    (finding,) = report.compare(study, scores, {})
    assert list(finding.difference.seeds) == [1.0, 3.0]


def test_a_failed_training_is_named_and_holds_up_its_own_alone(
    small: run.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (run, report):
        monkeypatch.setattr(module, "SETS", ("realsr",))
    script = small.scripts / "train.py"
    script.write_text(script.read_text() + "if 'x=1' in sys.argv: folder.joinpath('config.yaml').unlink(); "
                      "sys.exit('out of luck')\n")  # fmt: skip
    failed, ran = {}, []
    for jobs in run.stages(small, list(small.study.rows)):
        failed |= run.run_commands(jobs, 1)
        ran += [job.name for job in jobs]
    assert failed == {"train b, seed 1": "out of luck", "train b, seed 2": "out of luck"}
    assert [name for name in ran if "restore b" in name] == [] and "restore a, seed 1, realsr" in ran
    assert "b: not restored on realsr with training seed 1, 2" in report.report(small, TABLES)
    record = provenance.record(small.model("b", 1))
    assert record["spent"] > 0 and "seconds" not in record, "its time counts once it is done"


def test_folders_of_any_name_are_trained_on_and_into(small: run.Work) -> None:
    photos = small.photos.rename(small.out.with_name('photos, 500 [a] "b"'))
    command = run.training(dataclasses.replace(small, photos=photos, out=small.out / "try #2: more"), "start", 7)
    lines = command.words[command.words.index(str(small.parents / "p.yaml")) + 1 :]
    config = load_config(TrainConfig, None, [line for line in lines if line != "steps=1"])
    assert config.data.paths == [str(photos / "train")] and config.output_dir == str(command.folder)


def test_real_pairs_keep_their_depth_and_are_upright(small: run.Work) -> None:
    """Scans in 16 bits of grey, and photographs that say how they were held."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for part, scale in (("LR", 1), ("HR", 4)):
        for path in (small.realsr / part).iterdir():
            path.unlink()
        sides = (6 * scale, 8 * scale)
        Image.fromarray(np.full(sides, 125 * 257, np.uint16)).save(small.realsr / part / "grey.png")
        Image.new("RGB", sides[::-1], "teal").save(small.realsr / part / "held.png", exif=exif)
    run.write_test_set(small, "realsr")
    for part, scale in (("LR", 1), ("HR", 4)):
        grey, held = (read_image(small.test_set("realsr") / part / f"{n}.png") for n in ("grey", "held"))
        assert abs(255 * grey.mean() - 125) < 0.01 and grey.shape[2:] == (6 * scale, 8 * scale)
        assert held.shape[2:] == (8 * scale, 6 * scale)


def test_files_that_do_not_fit_are_named(small, tmp_path: Path) -> None:
    path = tmp_path / "nano" / "studies" / "s.yaml"
    for old, new, message in (
        ("init: a", "init: c", "init is 'c', which it cannot be"),
        ("parent: p.yaml, init: a", "parent: q.yaml, init: a", "does not exist"),
        ("{variant: a}", "{variant: z}", "variant is 'z'"),
        ("psnr: higher", "psnrr: higher", "did you mean 'psnr'"),
        ("psnr: higher", "psnr: better", "what is expected of psnr is 'better'"),
        ("{parent: p.yaml, seeds: [7]}", "{parent: p.yaml, init: b}", "the init of start leads in a circle"),
        ("repeats: 2", "repeats: 2\npublished: {table: ccsr/table1}", "published lacks dataset"),
        ("repeats: 2", "repeats: 1", "needs at least 2 noise seeds"),
        ("repeats: 2", "repeat: 2", "unknown key 'repeat'; did you mean 'repeats'"),
        ("rows: [b, a]", "rows: [b]", "compare two"),
        ("title: a study\n", "", "missing mandatory value: title"),
        ("{variant: a}", "{varriant: a}", "varriant"),
    ):
        path.write_text(SMALL.replace(old, new))
        with pytest.raises(UserError, match=message):
            spec.load_study("s", path.parent)


@pytest.mark.parametrize("name", spec.available(STUDIES))
def test_shipped_studies_differ_from_their_parents_only_where_they_say(name: str) -> None:
    study = spec.load_study(name, STUDIES)
    for variant in study.variants.values():
        parent = run_config(NANO / variant.parent)
        lines = [*study.lines, *variant.lines, "init=", "seed=1"]
        changed = changed_fields(parent, run_config(NANO / variant.parent, lines))
        assert changed and set(changed) <= {line.split("=")[0] for line in lines}
    for row in study.rows.values():
        assert not row.published or row.published in load_table(study.published["table"], TABLES).datasets["RealSR"]
    assert f"study.py {name} " in (STUDIES / f"{name}.yaml").read_text()


def test_recorded_verdicts_follow_the_rule() -> None:
    """Interval, and least difference of the training seeds' means; the README's table holds nothing unresolved."""
    readme = (ROOT / "README.md").read_text()
    for path in (TABLES / "nano").glob("*/comparisons.csv"):
        assert (path.parent / "summary.md").is_file()
        with path.open() as file:
            for row in csv.DictReader(file):
                seeds = tuple(map(float, row["per seed"].split()))
                overall = Estimate(*(float(row[name]) for name in ("difference", "low", "high")))
                difference = Difference(overall, seeds)
                assert verdict(difference, row["expected"]) == row["verdict"], row
                assert not row["least"] or float(row["least"]) == pytest.approx(difference.least, abs=1e-5)
                told = f"{overall.mean:+.2f} [{overall.low:+.2f}, {overall.high:+.2f}]"
                assert row["verdict"] != UNRESOLVED or row["metric"] != "psnr" or told not in readme


def test_mistakes_are_one_line(script, capsys, tmp_path: Path) -> None:
    for words, message in (
        (["ccrs"], "unknown study 'ccrs'; did you mean 'ccsr'"),
        (["ccsr", "--only", "v3"], "--only v3: no study that was asked for has that row"),
        (["ccsr", "--jobs", "0"], "--jobs 0: it must be at least 1"),
    ):
        for part in ("train", "val", "LR", "HR"):
            (tmp_path / part).mkdir(exist_ok=True)
        status = script("study").main([*words, "--photos", str(tmp_path), "--realsr", str(tmp_path)])
        text = capsys.readouterr().err
        assert status == 2 and message in text and text.count("\n") == 1
    assert script("study").main(["ccsr", "--photos", "nowhere", "--realsr", "x"]) == 2
    assert "nowhere/train is not a folder" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children with their parent on Linux alone")
def test_children_end_with_a_killed_parent(tmp_path: Path) -> None:
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys, pathlib\n"
        "from consissr.studies import run\n"
        "command = [sys.executable, '-c', sys.argv[3], sys.argv[2]]\n"
        "run.run_commands([run.Command('x', pathlib.Path(sys.argv[1]) / 'x', command)], 1)\n"
    )
    told = tmp_path / "pid"
    call = [sys.executable, "-c", code, str(tmp_path), str(told), child]
    parent = subprocess.Popen(call, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not (told.is_file() and told.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process = int(told.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(process)


def alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.is_file() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
