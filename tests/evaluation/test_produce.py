"""What eval.py --run restores, at what size, under which name, and which mistakes it tells before."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from consissr.errors import UserError
from consissr.evaluation import produce, provenance
from consissr.evaluation.tables import load_table

TABLES = Path(__file__).resolve().parents[2] / "configs" / "tables"


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
