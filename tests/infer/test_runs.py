"""Noise, batches and processes of scripts/infer.py, and its other flags; what is told of a run."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from consissr.inference import processes, progress
from consissr.inference.batch import Outcome
from consissr.inference.jobs import Job
from consissr.inference.progress import Terminal


def pixels(path) -> dict[str, np.ndarray]:
    """Samples by file name, of the PNG files below `path`."""
    return {p.relative_to(path).as_posix(): np.asarray(Image.open(p)) for p in path.rglob("*.png")}


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


def test_repeat(infer, folder, tmp_path, files):
    assert infer("-i", folder, "-o", tmp_path / "out", "--repeat", 2, "--batch-size", 2)[0] == 0
    assert files(tmp_path / "out") == {f"sample{i}/{name}" for i in (0, 1) for name in ("a.png", "b.jpg", "c.webp")}
    first, second = (np.asarray(Image.open(tmp_path / "out" / f"sample{i}" / "a.png")) for i in (0, 1))
    assert (first != second).any()
    assert infer("-i", folder / "a.png", "-o", tmp_path / "once")[0] == 0
    assert (np.asarray(Image.open(tmp_path / "once" / "a.png")) == first).all()


def test_processes_share_the_work(infer, folder, tmp_path, monkeypatch, files):
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


@pytest.mark.slow
def test_a_bad_file_does_not_end_the_other_processes(root, tmp_path, rng):
    """torchrun ends all processes when one fails: the first, whose only file is no image, has to wait for the second.

    Waiting is short: the second one still imports its networks when the first has nothing left to do.
    """
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("not an image")
    Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(tmp_path / "in" / "b.png")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    call = ["scripts/infer.py", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *call], cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "a.png: not an image" in done.stderr and "process 2 of 2: done 1, skipped 0, failed 0" in done.stdout
    assert (tmp_path / "out" / "b.png").is_file()


def test_without_an_agent_nobody_waits(monkeypatch):

    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    processes.finish(failed=True, world=2)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    processes.finish(failed=True, world=1)


@pytest.mark.parametrize(("failed", "arrived"), [(True, 2), (True, 1), (False, 1)])
def test_a_failed_process_waits_for_the_others_and_not_for_ever(monkeypatch, failed, arrived):
    """`arrived` of two processes come to the end, this one included."""
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in {"ADDR": "localhost", "PORT": str(store.port)}.items():
        monkeypatch.setenv(f"MASTER_{name}", value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setattr(processes, "PATIENCE", 1.2)
    naps = []
    monkeypatch.setattr(
        processes.time, "sleep", lambda seconds, nap=processes.time.sleep: naps.append(seconds) or nap(seconds)
    )
    if arrived == 2:
        processes.finish(failed=False, world=2)
    assert not naps
    processes.finish(failed, world=2)
    assert bool(naps) == (failed and arrived == 1)


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
    assert (good["precision"], good["device"]) == ("fp32", "cpu")
    assert os.path.isabs(good["target"]) and good["peak_mb"] > 0 and good["seconds"] > 0


def test_dry_run(infer, folder, tmp_path):
    (folder / "bad.png").write_text("not an image")
    status, out, _ = infer("-i", folder, "-o", tmp_path / "out", "--dry-run")
    assert status == 0 and not infer.loads and not (tmp_path / "out").exists()
    assert f"{folder / 'a.png'} -> {tmp_path / 'out' / 'a.png'} (36x48)" in out
    assert "bad.png -> not an image" in out and '"scale": 4.0' in out


def test_save_steps(infer, folder, tmp_path, files):
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
    for steps, wanted in ((1, [999]), (2, [999, 666]), (4, [999, 666, 499, 332])):  # of NUTS' grid of 6, t_max 2/3
        infer("-i", folder / "a.png", "-o", tmp_path / f"3_{steps}", "--steps", steps)
        assert [step.t for step in model.calls[-1].plan] == wanted
    status, _, err = infer("-i", folder / "a.png", "-o", tmp_path / "3_6", "--steps", 6)
    assert status == 2 and err == "error: 6 steps: this model can take 1 to 5\n"
    infer("-i", folder / "a.png", "-o", tmp_path / "4", "--plan", "ddpm", "--steps", 4)
    assert [step.t for step in model.calls[-1].plan] == [999, 666, 333, 0]


@pytest.mark.parametrize(
    ("text", "flags", "wanted"),
    [
        ("guidance: 2.0", [], {"guidance": 2.0}),
        ("guidance: 2.0\ncolor_fix: none", ["--guidance", "3"], {"guidance": 3.0, "color_fix": "none"}),
        ("t_min: 0.3", [], {"t_min": 0.3}),
        ("plan: ddpm\ntimesteps: [[9, -1, x0]]", [], {"plan": "ddpm", "timesteps": [[9, -1, "x0"]]}),
        ("", ["--positive", "sharp"], {"positive": "sharp"}),
    ],
)
def test_a_file_changes_only_what_stands_in_it(tmp_path, text, flags, wanted):
    from consissr.inference.flags import parser, sampler_settings

    (tmp_path / "sampler.yaml").write_text(text)
    args = parser("").parse_args(["-i", "a.png", "--config", str(tmp_path / "sampler.yaml"), *flags])
    assert sampler_settings(args) == wanted


def test_bad_flags_exit_with_2(infer, folder):
    for flags in (["--ext", "gif"], ["--tile", "-5"], ["--tile", "x"], ["--nonsense"]):
        with pytest.raises(SystemExit) as caught:
            infer("-i", folder, *flags)
        assert caught.value.code == 2


def test_unknown_device():
    from consissr.errors import UserError
    from consissr.inference.processes import choose_device

    assert choose_device("cpu") == "cpu"
    for name in ("gpu", "cuda:99", "cuda:x"):
        with pytest.raises(UserError, match="no such device"):
            choose_device(name)


def test_loading_is_told_at_a_terminal(infer, folder, tmp_path, monkeypatch):
    """It takes seconds, and with a cold disk half a minute."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    words = ("-i", folder, "-o", tmp_path / "out", "-m", "nano-ccsr")
    assert infer(*words)[2].startswith("loading nano-ccsr ...\n")
    assert infer(*words, "--skip-existing")[2].count("loading") == 0, "nothing is loaded"
    assert infer(*words, "--overwrite", "-q")[2].count("loading") == 0
    monkeypatch.delenv("FORCE_COLOR")
    assert infer(*words, "--overwrite")[2].count("loading") == 0


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


def test_an_interrupt_within_a_picture_keeps_the_others(infer, model, folder, tmp_path, files):
    """Between two tiles of the second."""
    restore = model.__class__.__call__

    class Interrupted(model.__class__):
        def __call__(self, images, **settings):
            if settings["keys"] == ["b.jpg"]:
                settings["on_tile"](1, 8, 0.1)
                raise KeyboardInterrupt
            return restore(self, images, **settings)

    model.__class__ = Interrupted
    status, _, err = infer("-i", folder, "-o", tmp_path / "out")
    assert status == 130 and "--skip-existing continues" in err
    assert files(tmp_path / "out") <= {"a.png"}, "what is there is whole, and nothing else is"
    model.__class__ = Interrupted.__base__
    assert infer("-i", folder, "-o", tmp_path / "out", "--skip-existing")[0] == 0
    assert files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp"}


def test_quality(infer, folder, tmp_path):
    sizes = {}
    for quality in (10, 95):
        assert infer("-i", folder / "b.jpg", "-o", tmp_path / str(quality), "--quality", quality)[0] == 0
        sizes[quality] = (tmp_path / str(quality) / "b.jpg").stat().st_size
    assert sizes[10] < sizes[95] / 2


def test_seconds_per_image_leave_the_first_out():
    terminal = Terminal(Console(file=io.StringIO()), 3)
    for seconds in (10.0, 0.8, 0.8):
        terminal.tell(Outcome(Job(source=None, key="a"), "done", seconds=seconds))
    assert "0.80 s per image in the model (bf16)" in terminal.summary({"done": 3}, "bf16")


def test_redirected_runs_tell_how_far_they_are(monkeypatch):
    """Where no bar shows: a line of how many are done, and not one per image."""
    out, times = io.StringIO(), iter([0.0, 10.0, 10.0, 40.0, 40.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    terminal = Terminal(Console(file=out), 4)
    for _ in range(2):
        terminal.tell(Outcome(Job(source=None, key="a"), "done", seconds=1.0))
    assert out.getvalue() == "restored 2 of 4, 40 s left\n"


def test_the_bar_shows_names_as_they_are():
    """photo[draft].png: brackets are no markup."""
    out = io.StringIO()
    with Terminal(Console(file=out, force_terminal=True, width=120), 1) as terminal:
        terminal.on_tile(Job(source=Path("photo[draft].png"), key="a"), 1, 2, 0.5)
    assert "photo[draft].png: tile 1 of 2" in out.getvalue()


def test_names_are_told_as_they_are(infer, folder, tmp_path):
    """Not with a picture of a cat in place of its name."""
    (folder / "a.png").rename(folder / "a:cat:.png")
    (folder / "b.jpg").write_bytes(b"")
    (folder / "b.jpg").rename(folder / "b:dog:.jpg")
    assert "a:cat:.png -> " in infer("-i", folder, "-o", tmp_path / "out", "--dry-run")[1]
    assert "b:dog:.jpg: " in infer("-i", folder, "-o", tmp_path / "out")[2]


def test_results_matter_more_than_what_is_said_of_them():
    """A log on a full disk; a pipe that nobody reads any more."""
    for error in (OSError(28, "No space left on device"), BrokenPipeError()):
        out = io.StringIO()
        out.write = out.flush = lambda *_, error=error: (_ for _ in ()).throw(error)
        terminal = Terminal(Console(file=out), 1, remark="not read: 1 .heic")
        terminal.tell(Outcome(Job(source=None, key="a"), "failed", error="truncated"))
        assert terminal.ended == 1
