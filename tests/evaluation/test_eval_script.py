"""scripts/eval.py through its front door."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from consissr.errors import UserError
from consissr.evaluation import provenance
from consissr.evaluation.datasets import check_test_set

OUTPUTS = {"per_image.csv", "summary.json", "table.md", "table.tex", "report.html", "summary.svg", "scores.jsonl"}


def test_folder_against_folder(root: Path, sets: dict[str, Path], tmp_path: Path) -> None:
    """As a user starts it, in a process of its own."""
    command = [sys.executable, str(root / "scripts" / "eval.py"), "--sr", f"A={sets['good']}", str(sets["bad"])]
    command += ["--hr", str(sets["hr"]), "--lr", str(sets["lr"]), "-o", str(tmp_path / "out")]
    command += ["--protocol", "osediff", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "| **" in done.stdout and "| A |" in done.stdout.replace("**", "") and "Protocol osediff" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == OUTPUTS


@pytest.fixture
def call(script, capsys):
    """call(arguments...) -> (exit status, stdout, stderr) of the script's main."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = script("eval").main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def test_published_beside_measured(call, sets: dict[str, Path], tmp_path: Path) -> None:
    common = ("--sr", f"OSEDiff-S1={sets['good']}", "--hr", sets["hr"], "--metrics", "psnr", "-o", tmp_path / "out")
    status, text, _ = call("--table", "ccsr/table6", "--dataset", "RealSR", "--jobs", 1, *common)
    assert status == 0
    published = text.index("| OSEDiff-S1 | published | 25.15 |")
    assert text.index("| OSEDiff-S1 | measured |") > published
    assert f"- Measured: 3 images of {sets['hr']}" in text
    assert "This is not the test set of the published values (3 images, the papers used 100; 3 unexpected names" in text
    assert (tmp_path / "out" / "ccsr_table6.md").read_text().strip() == text.strip()


def test_measured_ranks_say_among_what(call, sets: dict[str, Path], tmp_path: Path) -> None:
    results = ("--sr", f"PASD={sets['good']}", f"SeeSR={sets['bad']}", "--hr", sets["hr"], "-o", tmp_path / "out")
    text = call("--table", "consissr/table1", "--dataset", "RealSR", *results, "--metrics", "psnr,ssim", "--jobs", 1)[1]
    assert "- Measured ranks: among 2 methods over PSNR, SSIM." in text


def test_our_rows_are_restored_and_measured(
    call, script, sets: dict[str, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--run: infer.py three times with different noise, then values with G-STD and L-STD beside the published ones."""
    from consissr.evaluation import produce

    monkeypatch.setattr(produce, "run_script", lambda words, _: script("infer").main([str(w) for w in words[1:]]))
    (sets["lr"] / "sub").mkdir()
    (sets["hr"] / "sub").mkdir()
    (sets["lr"] / "c.png").rename(sets["lr"] / "sub" / "c.png")  # pairs below sub-folders, and LR of another format
    (sets["hr"] / "c.png").rename(sets["hr"] / "sub" / "c.png")
    Image.open(sets["lr"] / "b.png").save(sets["lr"] / "b.jpg")
    (sets["lr"] / "b.png").unlink()
    common = ("--hr", sets["hr"], "--lr", sets["lr"], "--metrics", "psnr", "-o", tmp_path / "out", "--jobs", 1)
    run = ("--run", f"CCSR-S1={tiny_model}", "--repeat", 3, "--infer-flags", "--device cpu")
    status, text, errors = call("--table", "ccsr/table4", "--dataset", "RealSR", *run, *common)
    assert status == 0, errors
    row = next(line for line in text.splitlines() if line.startswith("| CCSR-S1 | measured |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    value, spread = map(float, cells[2].split("/"))
    assert 3 < value < 40 and spread > 0 and float(cells[-1]) > 0
    assert len(list((tmp_path / "out" / "results").glob("CCSR-S1-*/sample*/**/*.png"))) == 9
    assert "- CCSR-S1: 3 runs, the published values are of 10;" in text


def test_flags_for_infer_are_split_as_a_shell_does(
    monkeypatch: pytest.MonkeyPatch, root: Path, sets: dict[str, Path], tmp_path: Path
) -> None:
    from consissr.evaluation import produce
    from consissr.evaluation.tables import load_table

    table = load_table("ccsr/table4", root / "configs" / "tables")
    asked = {"sr": [f"a={sets['lr']}"], "run": ["CCSR-S1=nano-ccsr"], "lr": sets["lr"], "repeat": 1}
    args = Namespace(**asked, hr=None, output=tmp_path, image=[], unranked=[])
    monkeypatch.setattr(produce, "produce", lambda *words: dict.fromkeys(words[1], words[-2]))
    monkeypatch.setattr(produce.stlpips, "weights_file", lambda: Path("weights"))
    args.infer_flags = '--positive "clean, 8k" --steps 2'
    results, small = produce.results_of(args, table, Path("infer.py"), bundled=["nano-ccsr"])
    assert results == {"a": sets["lr"], "CCSR-S1": ["--positive", "clean, 8k", "--steps", "2"]} and small == ["CCSR-S1"]
    monkeypatch.setattr(produce, "produce", lambda *words: dict.fromkeys(words[1], words[5]))
    args.repeat = None
    assert produce.results_of(args, table, Path("infer.py"))[0]["CCSR-S1"] == 10, "as many runs as the table's"
    args.infer_flags = '--positive "clean'
    with pytest.raises(UserError, match="--infer-flags.*quotation"):
        produce.results_of(args, table, Path("infer.py"))
    monkeypatch.setattr(produce.stlpips, "weights_file", lambda: None)
    args.infer_flags = ""
    with pytest.raises(UserError, match="nano-ccsr is small: beside published values it is shown with a learned"):
        produce.results_of(args, table, Path("infer.py"), bundled=["nano-ccsr"])


def test_tables_without_results_print_what_is_published(call, tmp_path: Path) -> None:
    status, text, _ = call("--table", "consissr/table4", "-o", tmp_path)
    assert status == 0 and "TALA(gamma=10)" in text and "time axis reversed" in text


def test_a_metric_without_weights_is_told_by_the_exit_status(call, sets, tmp_path: Path, monkeypatch) -> None:
    from consissr.evaluation import learned

    monkeypatch.setattr(learned, "find", lambda file, folder: None)
    common = ("--sr", sets["good"], "--hr", sets["hr"], "-o", tmp_path / "out", "--jobs", 1)
    status, text, errors = call(*common, "--metrics", "psnr,musiq")
    assert status == 1 and "PSNR" in text and "musiq is not computed: weights missing" in errors
    status, text, errors = call(*common, "--metrics", "musiq,lpips")
    assert status == 2 and not text and errors.startswith("error: musiq is not computed: weights missing")
    status, text, _ = call("--table", "ccsr/table6", "--dataset", "RealSR", *common)
    assert status == 0 and "- musiq is not computed: weights missing" in text
    assert "- fid is not computed: weights missing" in text or "- fid is not computed: of 3 images" in text


def test_the_check(call, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders and models that are restored first stand beside bicubic; no name stands for two rows."""
    from consissr.evaluation import produce

    monkeypatch.setattr(
        produce, "run_script", lambda words, failure: shutil.copytree(sets["bad"], words[4], dirs_exist_ok=True)
    )
    folders = ("--sr", sets["good"], "--hr", sets["hr"], "--lr", sets["lr"], "-o", tmp_path / "out", "--jobs", 1)
    status, text, _ = call("--check", *folders, "--run", "nano-ccsr")
    assert status == 0 and "| good |" in text and "| nano-ccsr |" in text and "| bicubic+grain |" in text
    assert (tmp_path / "out" / "check.md").read_text().strip() == text.strip()
    for flags, told in (
        (("--check", "--run", "bicubic=nano-ccsr"), "'bicubic' names a row of the check itself"),
        (("--check", "--run", "good=nano-ccsr"), "'good' names a result folder and a model to run"),
        (("--run", "good=nano-ccsr"), "'good' names a result folder and a model to run"),
    ):
        status, text, errors = call(*flags, *folders)
        assert status == 2 and told in errors and not text
    text = call(*folders, "--run", "nano-ccsr", "--metrics", "psnr,ssim")[1]
    assert "Not ranked (a model of another size): nano-ccsr." in text and "Rank" not in text
    monkeypatch.setattr(produce, "run_script", lambda *words: pytest.fail("a model is run"))
    shutil.copy(sets["hr"] / "b.png", sets["lr"] / "b.png")
    status, _, errors = call("--check", *folders, "--run", "nano-ccsr")
    assert status == 2 and "b has size 192x96, LR's is 192x96: not 4 times as large" in errors


def test_listings(call) -> None:
    assert "ccsr/table6" in call("--list-tables")[1]
    assert "LPIPS_v0.1_alex-df73285e.pth" in call("--list-weights")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give result folders with --sr"),
        (["--sr", "nowhere"], "nowhere is not a folder"),
        (["--sr", "SR", "--hr", "HR", "--metrics", "psnrr"], "did you mean 'psnr'"),
        (["--sr", "SR", "--hr", "HR", "--protocol", "ccsrr"], "did you mean 'ccsr'"),
        (["--sr", "SR", "--metrics", "psnr"], "give --hr"),
        (["--sr", "SR", "--hr", "HR", "--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--sr", "SR", "--hr", "HR", "--jobs", "-1"], "--jobs must be at least 1, not -1"),
        (["--sr", "SR", "--hr", "LR"], "compare images of equal size"),
        (["--check", "--sr", "SR"], "give both folders"),
        (["--table", "consissr/figure7", "--sr", "SR", "--box", "1,2"], "not X,Y,W,H"),
        (["--table", "ccsr/table4", "--dataset", "RealSR", "--run", "nano-ccsr"], "give that folder"),
        (["--check-dataset", "RealSR", "--hr", "HR"], "3 images, the papers used 100"),
        (["--check-dataset", "realsr", "--hr", "HR"], "did you mean 'RealSR'"),
        (["--sr", "SR", "--hr", "HR", "--unranked", "nobody"], "no result folder is called 'nobody'"),
        (["--sr", "SR", "--hr", "HR", "--metrics", "fid"], "fid is not computed"),
    ],
)
def test_mistakes_are_one_line(call, sets: dict[str, Path], tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"SR": sets["good"], "HR": sets["hr"], "LR": sets["lr"]}
    status, _, text = call(*(places.get(word, word) for word in arguments), "-o", tmp_path / "out")
    assert status == 2
    assert text.startswith("error: ") and message in text and "Traceback" not in text


@pytest.mark.parametrize("words", [("--run", "nano-ccsr"), ("--check",), ("--table", "consissr/figure7")])
@pytest.mark.parametrize("place", ["hr", "lr", "good"])
def test_results_do_not_go_among_the_images(
    call, sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch, place: str, words: tuple[str, ...]
) -> None:
    """Where the next model would restore them, and no pair would fit any more: --output may be the default."""
    folders = {"hr": "../hr", "lr": "../lr", "good": "../good", place: "."}
    flag = {"good": "--sr"}.get(place, f"--{place}")
    monkeypatch.chdir(sets[place])
    status, _, told = call(*words, "--sr", f"m={folders['good']}", "--hr", folders["hr"], "--lr", folders["lr"])
    assert status == 2 and f"--output evaluation lies in {flag} ., where results would count" in told
    assert sorted(file.name for file in sets[place].iterdir()) == ["a.png", "b.png", "c.png"]


CHECK = ("--check", "--sr", "SR", "--hr", "HR", "--lr", "LR")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*CHECK, "--metrics", "psnr"), "--check takes no --metrics"),
        ((*CHECK, "--protocol", "seesr"), "--check takes no --protocol"),
        ((*CHECK, "--weights", "HR"), "--check takes no --weights"),
        ((*CHECK, "--device", "meta"), "--check takes no --device"),
        ((*CHECK, "--unranked", "nope"), "--check takes no --unranked"),
        ((*CHECK, "--small-fid"), "--check takes no --small-fid"),
        ((*CHECK, "--table", "ccsr/table6"), "--check takes no --table"),
        (("--sr", "SR", "--wrong-condition", "SR"), "without --check takes no --wrong-condition"),
        (("--table", "consissr/table2", "--run", "m"), "--table consissr/table2 takes no --run"),
        (("--table", "ccsr/table7", "--repeat", "2"), "--table ccsr/table7 takes no --repeat"),
        (("--sr", "SR", "--hr", "HR", "--device", "cuda:99", "--metrics", "st-lpips"), "cuda:99 cannot be used here"),
        (("--sr", "SR", "--hr", "HR", "--device", "cudda", "--metrics", "st-lpips"), "cudda cannot be used here"),
        (("--sr", "SR", "--repeat", "0"), "--repeat must be at least 1, not 0"),
        (("--sr", "SR", "--report-images", "-5"), "--report-images must be at least 0, not -5"),
        (
            (*CHECK, "--run", "n", "--wrong-condition", "good=gone"),
            "gone is not a folder",
        ),
        (("--table", "consissr/figure7", "--run", "m", "--lr", "LR", "--box", "1,2"), "--box 1,2 is not X,Y,W,H"),
        ((*CHECK, "--run", "m", "--wrong-condition", "nope=HR"), "--wrong-condition nope: no --sr folder of that name"),
    ],
)
def test_flags_that_would_be_passed_over(
    call, sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    """They are refused before anything is restored."""
    monkeypatch.setattr("consissr.evaluation.produce.run_script", lambda *_: pytest.fail("restored"))
    places = {"SR": sets["good"], "HR": sets["hr"], "LR": sets["lr"]}
    status, text, errors = call(*(places.get(word, word) for word in arguments), "-o", tmp_path / "out", "--jobs", 1)
    assert (status, text, errors.count("\n")) == (2, "", 1) and message in errors


def test_figures_of_runs_are_drawn_from_as_many(call, sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    produce = "consissr.evaluation.produce.produce"
    monkeypatch.setattr(produce, lambda *words: asked.append(words[5]) or {"m": sets["runs"]})
    monkeypatch.setattr("consissr.evaluation.figures.draw", lambda *_: [])
    for name in ("ccsr/figure5", "ccsr/figure1"):
        assert call("--table", name, "--run", "m", "--lr", sets["lr"], "-o", tmp_path)[0] == 0
    assert asked == [10, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_file_names_that_are_no_utf8(call, sets: dict[str, Path], tmp_path: Path) -> None:
    for folder in ("good", "hr", "lr"):
        (sets[folder] / "a.png").rename(os.fsdecode(os.fsencode(sets[folder]) + b"/caf\xe9.png"))
    places = ("--sr", sets["good"], "--hr", sets["hr"], "--lr", sets["lr"], "-o", tmp_path / "out", "--jobs", 1)
    assert call(*places, "--metrics", "psnr")[0] == 0
    assert r"caf\udce9" in (tmp_path / "out" / "per_image.csv").read_text()
    assert OUTPUTS <= {path.name for path in (tmp_path / "out").iterdir()}
    assert len(provenance.fingerprint(sets["lr"])) == 16, "as --run and --check tell images apart"


def test_an_output_that_is_no_folder_is_one_line(call, sets: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, message in ((tmp_path / "file", "is a file: name a folder"), (tmp_path / "file" / "sub", "directory")):
        status, _, text = call("--sr", sets["good"], "--hr", sets["hr"], "--metrics", "psnr", "-o", output)
        assert status == 2 and text.startswith("error: ") and message in text and text.count("\n") == 1


def test_the_papers_realsr_is_complete(shared: Path) -> None:
    data = shared / "data" / "realsr"
    assert check_test_set("RealSR", data / "HR", data / "LR") == []
    assert check_test_set("RealSR", data / "LR", None)[0].endswith("for instance Canon_001_LR4.png is 128x128")
