"""scripts/infer.py through its front door. A stand-in for the model shows what the script does with files and flags."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from consissr import formats, images
from consissr.config import SamplerConfig
from consissr.diffusion.sampler import seeded_draw


class Enlarger:
    """Bicubic plus the noise that a model would draw; `spoil` maps a key to what goes wrong with that image."""

    def __init__(self, spoil: dict[str, str] | None = None) -> None:
        self.sampler = SamplerConfig()
        self.spoil = spoil or {}
        self.calls = []

    def __call__(self, x, *, scale, longest, seed, keys, repeat, plan, batch_size, on_step):
        self.calls.append(SimpleNamespace(shape=tuple(x.shape), keys=keys, plan=plan, repeat=repeat))
        troubles = {self.spoil[key] for key in keys if key in self.spoil}
        if "memory" in troubles:
            raise torch.OutOfMemoryError("out of memory")
        if "bug" in troubles:
            raise RuntimeError("shapes do not fit")
        y = images.resize(x, formats.output_size(*x.shape[-2:], scale, longest))
        y = (y + 0.1 * seeded_draw(seed, keys, repeat)("init", y.shape)).clamp(-1, 1)
        if "nan" in troubles:
            y[0, 0, 0, 0] = float("nan")
        if on_step:
            on_step(0, SimpleNamespace(t=999), None, y)
        return y

    def decode(self, z):
        return z


@pytest.fixture
def model():
    return Enlarger()


@pytest.fixture
def infer(script, model, monkeypatch, capsys):
    """infer(*arguments) -> (exit status, standard output, standard error)."""
    module = script("infer")
    loads = []
    monkeypatch.setattr(module, "load", lambda args, local_rank: loads.append(args) or model)

    def run(*arguments):
        status = module.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    run.loads = loads
    return run


@pytest.fixture
def folder(tmp_path, rng):
    """A folder as users have them: photographs, a sub-folder, hidden and other files."""
    base = tmp_path / "in"
    (base / "sub").mkdir(parents=True)
    for name, size in (("a.png", (12, 9)), ("b.jpg", (12, 9)), ("c.webp", (7, 11)), ("sub/d.png", (12, 9))):
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(base / name)
    (base / "notes.txt").write_text("not an image")
    (base / ".hidden.png").write_text("not an image")
    return base


def files(path) -> set[str]:
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}


# --- files and names ---


def test_folder(infer, folder, tmp_path):
    status, out, err = infer("-i", folder, "-o", tmp_path / "out")
    assert status == 0 and err == ""
    assert files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp"}
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.size == (36, 48)
    assert "done 3, skipped 0, failed 0" in out and out.count("\n") == 1


def test_recursive_keeps_sub_folders(infer, folder, tmp_path):
    assert infer("-i", folder, "-o", tmp_path / "out", "--recursive")[0] == 0
    assert files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp", "sub/d.png"}


def test_results_below_the_input_are_not_inputs(infer, folder):
    assert infer("-i", folder, "-o", folder / "results", "--recursive")[0] == 0
    assert infer("-i", folder, "-o", folder / "results", "--recursive", "--overwrite")[0] == 0
    assert files(folder / "results") == {"a.png", "b.jpg", "c.webp", "sub/d.png"}


def test_single_file(infer, folder, tmp_path):
    assert infer("-i", folder / "a.png", "-o", tmp_path / "deep" / "r.tif", "-s", 1.5)[0] == 0
    with Image.open(tmp_path / "deep" / "r.tif") as image:
        assert image.size == (14, 18)  # 13.5 and 18
    assert infer("-i", folder / "a.png", "-o", tmp_path / "out")[0] == 0
    assert files(tmp_path / "out") == {"a.png"}


def test_list_pattern_and_several(infer, folder, tmp_path):
    listed = folder / "list.txt"
    listed.write_text("# two of them\na.png\n\nsub/d.png\n")
    assert infer("-i", listed, "-o", tmp_path / "1")[0] == 0
    assert files(tmp_path / "1") == {"a.png", "sub/d.png"}
    assert infer("-i", folder / "*.png", "-o", tmp_path / "2")[0] == 0
    assert files(tmp_path / "2") == {"a.png"}
    assert infer("-i", folder / "a.png", folder / "b.jpg", folder / "a.png", "-o", tmp_path / "3")[0] == 0
    assert files(tmp_path / "3") == {"a.png", "b.jpg"}


def test_list_with_a_missing_file(infer, folder, tmp_path):
    (folder / "list.txt").write_text("a.png\ngone.png\n")
    status, _, err = infer("-i", folder / "list.txt", "-o", tmp_path / "out")
    assert status == 1 and files(tmp_path / "out") == {"a.png"}
    assert "gone.png: cannot be read (No such file or directory)" in err


def test_extension(infer, folder, tmp_path):
    Image.new("RGBA", (8, 8)).save(folder / "t.png")
    Image.new("P", (8, 8)).save(folder / "p.gif")
    assert infer("-i", folder, "-o", tmp_path / "out", "--ext", "jpg")[0] == 0
    assert files(tmp_path / "out") == {"a.jpg", "b.jpg", "c.jpg", "p.jpg", "t.png"}
    assert infer("-i", folder / "p.gif", "-o", tmp_path / "gif")[0] == 0
    assert files(tmp_path / "gif") == {"p.png"}


def test_equal_stems_stay_apart(infer, folder, tmp_path):
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    assert infer("-i", folder, "-o", tmp_path / "out", "--ext", "png")[0] == 0
    assert files(tmp_path / "out") == {"a_jpg.png", "a_png.png", "b.png", "c.png"}


def test_same_name_from_two_folders(infer, folder, tmp_path):
    Image.new("RGB", (8, 8)).save(folder / "sub" / "a.png")
    status, _, err = infer("-i", folder / "a.png", folder / "sub" / "a.png", "-o", tmp_path / "out")
    assert status == 2 and "would both become" in err


def test_suffix(infer, folder, tmp_path):
    assert infer("-i", folder / "a.png", "-o", tmp_path / "out", "--suffix", "_sr")[0] == 0
    assert files(tmp_path / "out") == {"a_sr.png"}
    assert infer("-i", folder / "a.png", "-o", folder, "-s", 2.5)[0] == 0
    assert (folder / "a_x2.5.png").is_file()


def test_existing_results(infer, folder, tmp_path):
    out = tmp_path / "out"
    assert infer("-i", folder / "a.png", "-o", out)[0] == 0
    first = (out / "a.png").read_bytes()
    status, _, err = infer("-i", folder, "-o", out)
    assert status == 2 and "a.png exists" in err and "--overwrite" in err
    assert len(infer.loads) == 1 and files(out) == {"a.png"}  # refused before anything was loaded
    status, text, _ = infer("-i", folder, "-o", out, "--skip-existing", "--seed", 1)
    assert status == 0 and "done 2, skipped 1, failed 0" in text
    assert (out / "a.png").read_bytes() == first
    assert infer("-i", folder, "-o", out, "--overwrite", "--seed", 1)[0] == 0
    assert (out / "a.png").read_bytes() != first


def test_inputs_are_never_replaced(infer, folder):
    before = (folder / "a.png").read_bytes()
    for output in (folder, folder / "a.png", folder / "sub" / ".." / "a.png"):
        status, _, err = infer("-i", folder / "a.png", "-o", output, "--suffix", "", "--overwrite")
        assert status == 2 and "would replace an input" in err
    assert (folder / "a.png").read_bytes() == before


# --- bad input ---


def test_bad_files_do_not_stop_the_rest(infer, folder, tmp_path):
    (folder / "bad.png").write_text("not an image")
    (folder / "empty.jpg").touch()
    whole = (folder / "b.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (20000, 20000)).save(folder / "vast.png")
    Image.new("F", (4, 4)).save(folder / "float.tif")
    status, out, err = infer("-i", folder, "-o", tmp_path / "out")
    assert status == 1 and files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp"}
    assert "done 3, skipped 0, failed 5" in out
    lines = err.splitlines()
    assert len(lines) == 5 and all(line.startswith("failed: ") for line in lines)
    for name, words in {
        "bad.png": "not an image",
        "empty.jpg": "empty",
        "half.jpg": "damaged",
        "vast.png": "million pixels",
        "float.tif": "F pixels",
    }.items():
        assert sum(name in line and words in line for line in lines) == 1


@pytest.mark.skipif(os.name == "nt", reason="links and pipes are POSIX's")
def test_what_only_looks_like_a_file(infer, folder, tmp_path):
    (folder / "dangling.png").symlink_to(folder / "gone")
    os.mkfifo(folder / "pipe.png")
    status, _, err = infer("-i", folder, "-o", tmp_path / "out")
    assert status == 1 and files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp"}
    assert "dangling.png: cannot be read" in err and "pipe.png: not a file" in err


def test_result_longer_than_its_format_allows(infer, tmp_path):
    Image.new("L", (4200, 1)).save(tmp_path / "long.webp")
    assert infer("-i", tmp_path / "long.webp", "-o", tmp_path / "out")[0] == 0
    assert files(tmp_path / "out") == {"long.png"}
    status, _, err = infer("-i", tmp_path / "long.webp", "-o", tmp_path / "out" / "r.webp")
    assert status == 1 and "16800 px" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-i", "{in}/gone.png"], "no such file or folder"),
        (["-i", "{in}/none"], "no images in"),
        (["-i", "{in}/*.xyz"], "no images in"),
        (["-i", "{in}", "-o", "{in}/notes.txt"], "neither a folder nor an image"),
        (["-i", "{in}", "-o", "{in}/one.png"], "names one file"),
        (["-i", "{in}/a.png", "-o", "{in}/r.gif"], "neither a folder nor an image"),
        (["-i", "{in}", "-s", "0"], "--scale 0"),
        (["-i", "{in}", "-s", "nan"], "--scale nan"),
        (["-i", "{in}", "--longest-side", "0"], "--longest-side 0"),
        (["-i", "{in}", "--repeat", "0"], "--repeat 0"),
        (["-i", "{in}", "--batch-size", "0"], "--batch-size 0"),
        (["-i", "{in}", "--quality", "101"], "--quality 101"),
        (["-i", "{in}", "--suffix", "a/b"], "--suffix 'a/b'"),
        (["-i", "{in}", "--plan", "ddpm", "--t-max", "0.5"], "belong to the plan nuts"),
        (["-i", "{in}", "--t-min", "0.9", "--t-max", "0.5"], "t_min 0.9"),
        (["-i", "{in}", "--json", "{in}/notes.txt/log"], "--json"),
    ],
)
def test_mistakes_get_one_line(infer, folder, tmp_path, arguments, words):
    (folder / "none").mkdir()
    before = files(folder)
    arguments = [argument.replace("{in}", str(folder)) for argument in arguments]
    if "-o" not in arguments:
        arguments += ["-o", tmp_path / "out"]
    status, _, err = infer(*arguments)
    assert status == 2
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert files(folder) == before and not (tmp_path / "out").exists()


def test_transparency_into_a_named_jpeg(infer, folder, tmp_path):
    Image.new("RGBA", (8, 8)).save(folder / "t.png")
    status, _, err = infer("-i", folder / "t.png", "-o", tmp_path / "r.jpg")
    assert status == 1 and "cannot hold its transparency" in err


def test_result_larger_than_memory(infer, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=80 * 16 * 12 * 9))
    status, _, err = infer("-i", folder / "a.png", "-o", tmp_path / "1")
    assert status == 0
    status, _, err = infer("-i", folder / "a.png", "-o", tmp_path / "2", "-s", 5)
    assert status == 1 and "smaller --scale" in err and not infer.loads[1:]


@pytest.mark.parametrize(("trouble", "words"), [("nan", "NaN"), ("memory", "memory ran out")])
def test_a_model_in_trouble_spoils_one_image(infer, model, folder, tmp_path, trouble, words):
    model.spoil = {"b.jpg": trouble}
    status, out, err = infer("-i", folder, "-o", tmp_path / "out")
    assert status == 1 and files(tmp_path / "out") == {"a.png", "c.webp"}
    assert "b.jpg" in err and words in err and "done 2, skipped 0, failed 1" in out


def test_defects_of_the_program_are_not_hidden(infer, model, folder, tmp_path):
    model.spoil = {"b.jpg": "bug"}
    with pytest.raises(RuntimeError, match="shapes"):
        infer("-i", folder, "-o", tmp_path / "out")


def test_forms_are_kept(infer, tmp_path, rng):
    base = tmp_path / "in"
    base.mkdir()
    for name, mode, shape, kind in (
        ("l.png", "L", (5, 6), np.uint8),
        ("la.png", "LA", (5, 6, 2), np.uint8),
        ("rgba.png", "RGBA", (5, 6, 4), np.uint8),
        ("deep.png", "I;16", (5, 6), np.uint16),
        ("cmyk.tif", "CMYK", (5, 6, 4), np.uint8),
        ("one.png", "RGB", (1, 1, 3), np.uint8),
    ):
        samples = rng.integers(0, 256, shape).astype(kind)
        Image.frombytes(mode, shape[1::-1], samples.tobytes()).save(base / name)
    assert infer("-i", base, "-o", tmp_path / "out")[0] == 0
    for path in base.iterdir():
        with Image.open(path) as before, Image.open(tmp_path / "out" / path.name) as after:
            assert after.mode == before.mode
            assert after.size == (4 * before.width, 4 * before.height)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (37, 53), (127, 640), (300, 20)])
@pytest.mark.parametrize("scale", [4, 2.5, 0.3])
def test_exact_sizes(infer, tmp_path, height, width, scale):
    Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    assert infer("-i", tmp_path / "a.png", "-o", tmp_path / "out", "-s", scale)[0] == 0
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.size == (max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5)))


def test_longest_side(infer, folder, tmp_path):
    assert infer("-i", folder / "a.png", "-o", tmp_path / "out", "--longest-side", 50)[0] == 0
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.size == (38, 50)


# --- noise, batches, processes ---


def pixels(path) -> dict[str, np.ndarray]:
    return {name: np.asarray(Image.open(path / name)) for name in files(path)}


def test_noise_depends_on_the_name_only(infer, model, folder, tmp_path):
    assert infer("-i", folder, "-o", tmp_path / "1", "--recursive", "--ext", "png")[0] == 0
    assert infer("-i", folder, "-o", tmp_path / "2", "--recursive", "--ext", "png", "--batch-size", 4)[0] == 0
    assert sorted(len(call.keys) for call in model.calls[4:]) == [1, 3]
    assert infer("-i", folder / "b.jpg", folder / "a.png", "-o", tmp_path / "3", "--ext", "png")[0] == 0
    one, two, three = (pixels(tmp_path / name) for name in "123")
    assert one.keys() == two.keys() == {"a.png", "b.png", "c.png", "sub/d.png"}
    assert all((one[name] == two[name]).all() for name in one)
    assert all((one[name] == three[name]).all() for name in three) and len(three) == 2
    assert infer("-i", folder, "-o", tmp_path / "4", "--seed", 1, "--ext", "png")[0] == 0
    assert (pixels(tmp_path / "4")["a.png"] != one["a.png"]).any()


def test_repeat(infer, folder, tmp_path):
    assert infer("-i", folder, "-o", tmp_path / "out", "--repeat", 2, "--batch-size", 2)[0] == 0
    assert files(tmp_path / "out") == {f"sample{i}/{name}" for i in (0, 1) for name in ("a.png", "b.jpg", "c.webp")}
    first, second = (np.asarray(Image.open(tmp_path / "out" / f"sample{i}" / "a.png")) for i in (0, 1))
    assert (first != second).any()
    assert infer("-i", folder / "a.png", "-o", tmp_path / "once")[0] == 0
    assert (np.asarray(Image.open(tmp_path / "once" / "a.png")) == first).all()


def test_processes_share_the_work(infer, folder, tmp_path, monkeypatch):
    assert infer("-i", folder, "-o", tmp_path / "alone", "--recursive")[0] == 0
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        status, out, _ = infer("-i", folder, "-o", tmp_path / "shared", "--recursive", "--json", tmp_path / "log")
        assert status == 0 and f"process {rank + 1} of 3" in out
    assert files(tmp_path / "shared") == files(tmp_path / "alone")
    for name in files(tmp_path / "alone"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(entry["key"] for entry in logged if entry["event"] == "image") == [
        "a.png",
        "b.jpg",
        "c.webp",
        "sub/d.png",
    ]
    monkeypatch.setenv("RANK", "3")
    assert infer("-i", folder, "-o", tmp_path / "shared")[0] == 2


# --- flags ---


def test_log(infer, folder, tmp_path):
    (folder / "bad.png").write_text("not an image")
    assert infer("-i", folder, "-o", tmp_path / "out", "--json", tmp_path / "logs" / "l.jsonl", "--seed", 7)[0] == 1
    entries = [json.loads(line) for line in (tmp_path / "logs" / "l.jsonl").read_text().splitlines()]
    run, *entries = entries
    assert run["event"] == "run" and run["settings"]["seed"] == 7
    by_key = {entry["key"]: entry for entry in entries}
    assert len(entries) == 4
    assert by_key["bad.png"]["status"] == "failed" and "not an image" in by_key["bad.png"]["error"]
    good = by_key["a.png"]
    assert good["status"] == "done" and good["result_size"] == [36, 48] and good["seed"] == 7
    assert os.path.isabs(good["target"]) and good["peak_mb"] > 0 and good["seconds"] > 0


def test_dry_run(infer, folder, tmp_path):
    (folder / "bad.png").write_text("not an image")
    status, out, _ = infer("-i", folder, "-o", tmp_path / "out", "--dry-run")
    assert status == 0 and not infer.loads and not (tmp_path / "out").exists()
    assert f"{folder / 'a.png'} -> {tmp_path / 'out' / 'a.png'} (36x48)" in out
    assert "bad.png -> not an image" in out and '"scale": 4.0' in out


def test_save_steps(infer, folder, tmp_path):
    assert infer("-i", folder, "-o", tmp_path / "out", "--save-steps", "--batch-size", 2)[0] == 0
    steps = {f"{name}_steps/00_t999.png" for name in ("a.png", "b.jpg", "c.webp")}
    assert files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp"} | steps
    with Image.open(tmp_path / "out" / "a.png_steps" / "00_t999.png") as image:
        assert image.size == (36, 48)


def test_quiet(infer, folder, tmp_path):
    (folder / "bad.png").write_text("not an image")
    status, out, err = infer("-i", folder, "-o", tmp_path / "out", "-q")
    assert status == 1 and out == "" and err.count("\n") == 1


def test_plan_flags(infer, model, folder, tmp_path):
    infer("-i", folder / "a.png", "-o", tmp_path / "1")
    assert model.calls[-1].plan is None
    infer("-i", folder / "a.png", "-o", tmp_path / "2", "--t-max", 0.5, "--t-min", 0.3, "--steps", 10)
    assert [step.t for step in model.calls[-1].plan] == [999, 499, 399]
    infer("-i", folder / "a.png", "-o", tmp_path / "3", "--steps", 1)
    assert [step.t for step in model.calls[-1].plan] == [999]
    infer("-i", folder / "a.png", "-o", tmp_path / "4", "--plan", "ddpm", "--steps", 4)
    assert [step.t for step in model.calls[-1].plan] == [999, 666, 333, 0]


def test_bad_flags_exit_with_2(infer, folder):
    for flags in (["--ext", "gif"], ["--tile", "-5"], ["--tile", "x"], ["--nonsense"]):
        with pytest.raises(SystemExit) as caught:
            infer("-i", folder, *flags)
        assert caught.value.code == 2


def test_unknown_device():
    from consissr.batch import choose_device
    from consissr.errors import UserError

    assert choose_device("cpu") == "cpu"
    for name in ("gpu", "cuda:99", "cuda:x"):
        with pytest.raises(UserError, match="no such device"):
            choose_device(name)


def test_nothing_heavy_before_the_plan(root):
    """--help, --dry-run and refusals must not wait for torch."""
    code = (
        "import sys, runpy; sys.argv = ['infer.py', '-i', 'no-such-folder'];\n"
        "try: runpy.run_path('scripts/infer.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules), 'heavy import'"
    )
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "error: no-such-folder: no such file or folder\n"
