"""The papers' tables: complete, consistent, and printed beside measured values."""

import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from ccsr import nuts_plan
from consissr.errors import UserError
from consissr.evaluation import produce, provenance
from consissr.evaluation.tables import Cell, available, comparison, load_table

TABLES = Path(__file__).resolve().parents[2] / "configs" / "tables"
EXPECTED = {
    *(f"consissr/{name}" for name in ("table1", "table2", "table3", "table4")),
    *(f"consissr/figure{number}" for number in (2, 4, 6, 7, 8)),
    *(f"ccsr/table{number}" for number in range(1, 8)),
    *(f"ccsr/figure{number}" for number in (1, 2, 4, 5, 6, 7)),
    "ccsr/figure2-pictures",
}


def test_every_table_and_figure_is_there() -> None:
    assert {name for name in available(TABLES) if not name.startswith("nano/")} == EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_tables_load_and_say_how_they_are_made(name: str) -> None:
    table = load_table(name, TABLES)
    assert table.kind == "figure" or table.datasets
    for rows in table.datasets.values():
        assert set(table.ours) <= set(rows)
    for entry in table.misprints:
        datasets = [entry["dataset"]] if "dataset" in entry else list(table.datasets)
        assert all(entry["row"] in table.datasets[dataset] for dataset in datasets)
        assert entry.get("column", table.columns[0]) in table.columns
    assert f"--table {name}" in (TABLES / f"{name}.yaml").read_text().split("title:")[0]


def cell(name: str, dataset: str, row: str, column: str) -> Cell:
    return load_table(name, TABLES).datasets[dataset][row][column]


def test_known_values() -> None:
    assert cell("ccsr/table6", "RealSR", "OSEDiff-S1", "psnr").value == 25.15
    assert cell("ccsr/table4", "RealSR", "CCSR-S2", "psnr") == Cell(25.86, 0.3032, 2)
    assert cell("ccsr/table4", "DIV2K", "BSRGAN", "fid").value == 44.22
    assert math.isnan(cell("ccsr/table4", "DIV2K", "BSRGAN", "l-std").value)
    assert cell("consissr/table1", "RealSR", "Ours", "niqe").value == 5.2655
    assert cell("consissr/table3", "RealSR", "+HPA(ours)", "delta-clip-i").value == 0.0147
    assert cell("ccsr/table7", "512x512", "CCSR-S1", "params").value == 1.65


@pytest.mark.parametrize("dataset", ["DIV2K", "RealSR", "DrealSR"])
def test_rows_that_tables_share_differ_only_where_noted(dataset: str) -> None:
    """CCSR's own rows stand in Tables IV to VI."""
    tables = [load_table(f"ccsr/table{number}", TABLES) for number in (4, 5, 6)]
    for row in ("CCSR-S2", "CCSR-S1"):
        for column in tables[0].columns:
            texts = [str(table.datasets[dataset][row][column]) for table in tables]
            noted = any(
                entry["row"] == row and entry.get("column") == column and entry["dataset"] == dataset
                for entry in tables[2].misprints
            )
            assert noted or len(set(texts)) == 1, (row, column, texts)


def test_the_values_that_settle_the_colours_of_consissr_s_psnr() -> None:
    """Its StableSR and PASD rows equal CCSR's, which are on Y, to 0.01 dB on RealSR."""
    for ours, theirs in (("StableSR", "StableSR-S200"), ("PASD", "PASD-S20")):
        difference = cell("consissr/table1", "RealSR", ours, "psnr").value
        difference -= cell("ccsr/table4", "RealSR", theirs, "psnr").value
        assert abs(difference) < 0.011


def test_measured_stands_below_published() -> None:
    table = load_table("ccsr/table3", TABLES)
    measured = {"(1/2,1/6,2)": {"psnr": Cell(26.0, 0.25, 2)}, "nano": {"psnr": Cell(25.5, digits=2)}}
    lines = comparison(table, "RealSR", measured).splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("| (1/2,1/6,2) | published"))
    assert "26.29/0.2594" in lines[row] and "6.39/0.0090 [1]" in lines[row]
    assert lines[row + 1].startswith("| (1/2,1/6,2) | measured | 26.00/0.2500 | - ")
    assert any(line.startswith("| nano | measured | 25.50 |") for line in lines)
    assert "[1] The G-STD 0.0090 repeats DISTS's." in lines
    assert any("(1/2 - 1/6) 6 + 1 = 3" in line for line in lines)


@pytest.mark.parametrize("name", sorted(name for name in EXPECTED if "table" in name))
def test_every_published_row_is_printed(name: str) -> None:
    table = load_table(name, TABLES)
    for dataset, rows in table.datasets.items():
        text = comparison(table, dataset, {})
        assert all(f"| {row} | published |" in text for row in rows)
        assert all(entry["note"] in text for entry in table.misprints if entry.get("dataset", dataset) == dataset)


def test_mistakes_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'ccsr/table6'"):
        load_table("ccsr/tabel6", TABLES)
    with pytest.raises(UserError, match="add --dataset"):
        load_table("ccsr/table6", TABLES).dataset("")
    with pytest.raises(UserError, match="did you mean 'RealSR'"):
        load_table("ccsr/table6", TABLES).dataset("RealRS")
    (tmp_path / "x.yaml").write_text("title: x\nkind: quality\nmetrics: [psnr]\ndatasets: {A: {r: 1 2}}\n")
    with pytest.raises(UserError, match="row 'r' of A has 2 values"):
        load_table("x", tmp_path)
    (tmp_path / "y.yaml").write_text("title: x\nkind: quality\ncolour: red\n")
    with pytest.raises(UserError, match="colour"):
        load_table("y", tmp_path)


def test_rows_of_ours_are_planned() -> None:
    table = load_table("ccsr/table1", TABLES)
    assert produce.models_by_row(table, ["nano-ccsr"]) == {"CCSR-S2": "nano-ccsr"}, "variants need models of their own"
    assert produce.models_by_row(table, ["V2=runs/nuts", "CCSR-S2=runs/deft"]) == {
        "V2": "runs/nuts",
        "CCSR-S2": "runs/deft",
    }
    with pytest.raises(UserError, match="no row of ours"):
        produce.models_by_row(table, ["V9=x"])
    assert produce.models_by_row(None, ["nano-ccsr", "B=runs/deft"]) == {"nano-ccsr": "nano-ccsr", "B": "runs/deft"}
    with pytest.raises(UserError, match="two models to run are called 'deft'"):
        produce.models_by_row(None, ["a/deft", "b/deft"])
    with pytest.raises(UserError, match="two models to run are called 'CCSR-S2'"):
        produce.models_by_row(load_table("ccsr/table6", TABLES), ["ccsr-v2", "nano-ccsr"])


def test_a_models_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    model = tmp_path / "lr=1e-4" / "model"
    model.mkdir(parents=True)
    assert produce.models_by_row(None, [str(model)]) == {"model": str(model)}
    assert produce.models_by_row(None, [f"A(t=2)={model}"]) == {"A(t=2)": str(model)}
    (file := tmp_path / "epoch=3-step=900.ckpt").touch()
    assert produce.models_by_row(None, [str(file), f"B={file}"]) == {file.name: str(file), "B": str(file)}
    assert produce.models_by_row(load_table("ccsr/table1", TABLES), [f"V2={file}"]) == {"V2": str(file)}


def test_rows_of_ours_are_restored_by_infer(tmp_path: Path) -> None:
    """The command that is run: a stand-in script records its arguments."""
    script = tmp_path / "infer.py"
    record = "pathlib.Path(__file__).with_name('args').write_text(' '.join(sys.argv[1:]))"
    script.write_text(f"import sys, pathlib\n{record}\n")
    table = load_table("ccsr/table4", TABLES)
    folders = produce.produce(table, {"CCSR-S1": "nano-ccsr"}, tmp_path, tmp_path / "out", script, 10, ["--tile", "0"])
    expected = f"-i {tmp_path} -o {folders['CCSR-S1']} -m nano-ccsr --skip-existing --repeat 10 --ext png --recursive"
    expected += " --plan nuts --steps 1 --guidance 1 --tile 0"
    assert (tmp_path / "args").read_text() == expected
    script.write_text("raise SystemExit(2)")
    with pytest.raises(UserError, match="CCSR-S1 could not be restored"):
        produce.produce(table, {"CCSR-S1": "x"}, tmp_path, tmp_path / "out", script, 1, [])


def test_results_of_another_origin_stand_elsewhere(tmp_path: Path, save, make_picture) -> None:
    """Another model, other weights of it, other images, flags or repeats under the same output folder."""
    script, model = tmp_path / "infer.py", tmp_path / "model"
    script.write_text(
        "import sys, pathlib\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('-o') + 1])\n"
        "folder.mkdir(parents=True, exist_ok=True)\n"
        "(folder / 'a.png').touch()\n"
    )
    model.mkdir()
    (model / "x.safetensors").write_bytes(b"1")
    lr = save(tmp_path / "lr", {"a": make_picture(0, size=(8, 8))})
    table = load_table("ccsr/table4", TABLES)

    def produced(name: str = str(model), repeat: int = 10, flags: tuple[str, ...] = ()) -> dict[str, Path]:
        return produce.produce(table, {"CCSR-S1": name}, lr, tmp_path / "out", script, repeat, list(flags))

    folder = produced()["CCSR-S1"]
    assert folder.name.startswith("CCSR-S1-") and produced() == {"CCSR-S1": folder}
    others = [produced(flags=("--tile", "0")), produced("nano-ccsr"), produced(repeat=3)]
    (model / "x.safetensors").write_bytes(b"2")
    others.append(produced())
    save(lr, {"a": make_picture(1, size=(8, 8))})
    others.append(produced())
    assert len({folder, *(other["CCSR-S1"] for other in others)}) == 6
    assert provenance.record(folder)["flags"] == ["--plan", "nuts", "--steps", "1", "--guidance", "1"]


@pytest.mark.parametrize("kind", ["one file", "linked folder", "bin"])
def test_weights_are_known_by_their_contents(tmp_path: Path, kind: str) -> None:
    """Wherever a model or its base may keep them."""
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model" / "linked").symlink_to(tmp_path / "elsewhere")
    path, file = {
        "one file": (tmp_path / "sd21.safetensors",) * 2,
        "linked folder": (tmp_path / "model", tmp_path / "elsewhere" / "x.safetensors"),
        "bin": (tmp_path / "model", tmp_path / "model" / "diffusion_pytorch_model.bin"),
    }[kind]
    found = []
    for content in (b"1", b"2", b"1"):
        file.write_bytes(content)
        found.append(provenance.contents(path, provenance.MODEL_FILES))
    assert found[0] == found[2] != found[1]


def test_a_converted_models_times_are_not_its_weights(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"1")
    found = provenance.contents(tmp_path, provenance.MODEL_FILES)
    (tmp_path / "origin.json").write_text("{}")
    assert provenance.contents(tmp_path, provenance.MODEL_FILES) == found


@pytest.mark.parametrize("flag", ["--base", "--config"])
def test_the_files_that_infer_is_told_of_count(tmp_path: Path, flag: str) -> None:
    """By what stands in them."""
    (tmp_path / "infer.py").touch()
    (tmp_path / "named").write_bytes(b"1")
    (tmp_path / "lr").mkdir()

    def produced() -> dict[str, Path]:
        flags = ["--steps", "1", flag, str(tmp_path / "named")]
        return produce.produce(None, {"ours": "m"}, tmp_path / "lr", tmp_path / "out", tmp_path / "infer.py", 1, flags,
                               lambda name, base: [Path(name), Path(base or name)])  # fmt: skip

    first = produced()
    assert produced() == first
    (tmp_path / "named").write_bytes(b"2")
    assert produced() != first


def to_run(lr: Path, hr: Path | None, **given) -> Namespace:
    """What eval.py --run was asked for."""
    plain = {"sr": [], "run": ["m"], "repeat": None, "infer_flags": "", "image": [], "unranked": []}
    return Namespace(lr=lr, hr=hr, output=lr.parent, **plain | given)


def test_models_are_run_at_the_factor_of_the_pairs(tmp_path: Path, save, make_picture, monkeypatch) -> None:
    """Unless --infer-flags says otherwise: results of another size would be of no use."""
    monkeypatch.setattr(produce, "produce", lambda *words: {"m": words[6]})
    small = {"a": (8, 9), "b": (7, 5)}
    lr = save(tmp_path / "lr", {name: make_picture(0, size=size) for name, size in small.items()})
    for factor, wanted in ((1.5, ["--scale", "1.5"]), (1.9, ["--scale", "1.9"]), (2, ["--scale", "2"]), (4, [])):
        sizes = {name: tuple(int(factor * side + 0.5) for side in size) for name, size in small.items()}
        hr = save(tmp_path / str(factor), {name: make_picture(0, size=size) for name, size in sizes.items()})
        args = to_run(lr, hr, infer_flags="--tile 0")
        assert produce.results_of(args, None, Path("infer.py"))[0] == {"m": [*wanted, "--tile", "0"]}
    for fits in ("--longest-side 36", "-s4", "--upscale=4"):
        large = {"a": (32, 36), "b": (36, 26)} if "longest" in fits else {"a": (32, 36), "b": (28, 20)}
        save(hr, {name: make_picture(0, size=size) for name, size in large.items()})
        args.infer_flags = fits
        assert produce.results_of(args, None, Path("infer.py"))[0] == {"m": fits.split()}
    args.infer_flags = "-s 2"
    with pytest.raises(UserError, match=r"--infer-flags: a, b would be made 18x16, but is 36x32 in HR"):
        produce.results_of(args, None, Path("infer.py"))
    for side, remedy in (
        ((36, 26), "give --infer-flags '--longest-side 36'$"),
        ((14, 10), "split them by factor$"),
        ((20, 28), "the sides of b differ by different factors"),
    ):
        save(hr, {"b": make_picture(0, size=side)})
        for args.infer_flags in ("--tile 0", "--config own.yaml", "--base sd21"):  # neither says a size
            told = rf"no one factor .* \(b is {side[1]}x{side[0]}, LR's 5x7\): {remedy}"
            with pytest.raises(UserError, match=told):
                produce.results_of(args, None, Path("infer.py"))


def test_pictures_of_steps_need_no_pairs(tmp_path, save, make_picture, monkeypatch) -> None:
    """Each is shown by itself: one image of a folder, and results of any size. What is no size infer.py refuses."""
    monkeypatch.setattr(produce, "produce", lambda *words: {"m": words[6]})
    lr, hr = (save(tmp_path / name, dict.fromkeys("ab", make_picture(0, size=size))) for name, size in
              (("lr", (8, 9)), ("hr", (32, 36))))  # fmt: skip
    one = save(tmp_path / "one", {"a": make_picture(0, size=(32, 36))})
    found, _ = produce.results_of(
        to_run(lr, hr, sr=[f"X={one}"], infer_flags="-s 2"), None, Path("infer.py"), paired=False
    )
    assert found == {"X": one, "m": ["-s", "2"]}
    for word in ("nan", "inf", "-1e400"):
        args = to_run(lr, hr, infer_flags=f"--scale={word}")
        assert produce.results_of(args, None, Path("infer.py"))[0] == {"m": [f"--scale={word}"]}


def test_a_flag_of_infer_without_its_value_is_one_line(tmp_path: Path, save, make_picture) -> None:
    lr = save(tmp_path / "lr", {"a": make_picture(0, size=(8, 9))})
    args = to_run(lr, None, infer_flags="--config")
    with pytest.raises(UserError, match="--infer-flags: argument --config: expected one argument; see .*infer.py"):
        produce.results_of(args, None, Path("infer.py"))


def test_a_name_of_two_images_is_told_before_a_model_runs(tmp_path, save, make_picture, monkeypatch) -> None:
    monkeypatch.setattr(produce, "produce", lambda *words: pytest.fail("a model is run"))
    lr = save(tmp_path / "lr", {"a": make_picture(0, size=(8, 9))})
    (lr / "a.jpg").write_bytes((lr / "a.png").read_bytes())
    args = to_run(lr, None)
    with pytest.raises(UserError, match="lr holds a in more than one format"):
        produce.results_of(args, None, Path("infer.py"))


def test_other_mistakes_are_told_before_a_model_runs(tmp_path, save, make_picture, monkeypatch) -> None:
    """Result folders that do not pair, names that are no image's or no row's, and folders that were exchanged."""
    monkeypatch.setattr(produce, "produce", lambda *words: pytest.fail("a model is run"))
    lr = save(tmp_path / "lr", {name: make_picture(0, size=(8, 9)) for name in "ab"})
    hr = save(tmp_path / "hr", {name: make_picture(0, size=(32, 36)) for name in "ab"})
    few = save(tmp_path / "few", {"a": make_picture(0, size=(32, 36))})
    for args, message in (
        (to_run(lr, hr, sr=[f"X={few}"]), "few lacks 1 of the 2 images of HR .*: b"),
        (to_run(lr, hr, sr=["X=gone"]), "gone is not a folder"),
        (to_run(lr, hr, image=["c"]), "there is no image 'c'; names come without extension, for instance a"),
        (to_run(lr, hr, unranked=["n"]), "no result folder is called 'n', which is not to be ranked: m"),
        (to_run(lr, hr, infer_flags="-s 2"), "a, b would be made 18x16, but is 36x32 in HR"),
        (to_run(hr, lr), "its images are smaller than those of LR .*: were the two folders exchanged"),
    ):
        with pytest.raises(UserError, match=message):
            produce.results_of(args, None, Path("infer.py"))


def test_rows_are_timed_with_the_model_named_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(produce, "time_model", lambda *words: words)
    table = load_table("ccsr/table7", TABLES)

    def timed(*run: str) -> dict:
        return produce.timings(table, Namespace(run=run, infer_flags="--tile 0"), Path("infer.py"))

    plan = ["--plan", "nuts", "--steps", "1", "--guidance", "1"]
    assert timed("CCSR-S1=runs/a") == {"CCSR-S1": ("runs/a", plan, ["--tile", "0"], Path("infer.py"))}
    assert list(timed("nano-ccsr")) == ["CCSR-S2", "CCSR-S1"] and timed() == {}


def test_seconds_come_from_infer_s_log(tmp_path: Path) -> None:
    """And the text says what ran on what: the machine is not the paper's."""
    script = tmp_path / "infer.py"
    script.write_text(
        "import sys, json, pathlib\n"
        "log = pathlib.Path(sys.argv[sys.argv.index('--json') + 1])\n"
        "assert '--steps 1 --precision fp32' in ' '.join(sys.argv)\n"
        "ran = {'status': 'done', 'device': 'cpu', 'precision': 'fp32'}\n"
        "rows = [{'event': 'run'}, *(ran | {'seconds': s} for s in (3.0, 1.5, 2.0))]\n"
        "log.write_text('\\n'.join(map(json.dumps, rows)))\n"
    )
    found = produce.time_model("nano", ["--steps", "1"], ["--precision", "fp32"], script)
    assert (found.seconds, found.told) == (1.5, "nano --precision fp32 in fp32 on cpu")
    script.write_text("raise SystemExit(2)")
    with pytest.raises(UserError, match="could not be timed"):
        produce.time_model("nano", [], [], script)


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_scripts_start_on_windows_too(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    """Python refuses preexec_fn there."""
    options = {}
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(subprocess, "run", lambda _, **o: options.update(o) or subprocess.CompletedProcess([], 0))
    produce.run_script(["infer.py"], "")
    assert bool(options["preexec_fn"]) == (platform == "linux")


def test_training_may_import_the_metrics_cheaply() -> None:
    code = (
        "import sys, consissr.evaluation.metrics; print([m for m in ('pyiqa', 'basicsr', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"


def test_table_two_s_rows_are_what_they_are_called() -> None:
    """(T, S): the grid's steps, and the evaluations that NUTS makes of it at t_max 2/3 and t_min 1/2."""
    for name, row in load_table("ccsr/table2", TABLES).ours.items():
        flags = dict(zip(row["flags"][::2], row["flags"][1::2], strict=True))
        T, S = map(int, name.strip("()").split(","))
        assert (int(flags["--steps"]), flags["--t-max"], flags["--t-min"]) == (T, "0.6667", "0.5")
        assert len(nuts_plan(T, 0.6667, 0.5)) == S
