"""A film goes in and comes out: frames by ffmpeg (a stand-in, but for the last test), one noise for all, sound kept."""

import shutil
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image

from consissr.images import formats
from consissr.inference import film

SAID = "Stream #0:0: Video: h264 (High), yuv420p(tv, bt709), 12x10, 29.97 fps, 29.97 tbr\nAt least one output file"


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What ffmpeg was asked for; it finds three frames, and makes a film of the results."""
    asked = []
    monkeypatch.setattr(film.shutil, "which", lambda name: str(tmp_path / name))

    class Run:
        def __init__(self, command, **how):
            self.returncode, self.stderr, words = 0, "", [str(word).removeprefix("file:") for word in command]
            asked.append([str(word) for word in command])
            if words[-2] == "-i":
                self.returncode, self.stderr = 1, SAID
            elif words[-1].endswith("%06d.png"):
                for number in (1, 2, 3):
                    Image.new("RGB", (12, 10), "teal").save(words[-1] % number)
            else:
                results = Path(words[words.index("-framerate") + 3] % 1).parent
                Path(words[-1]).write_bytes(b"film" + bytes([len(list(results.glob("*.png")))]))

    monkeypatch.setattr(film.subprocess, "run", Run)
    return asked


def test_a_film(infer, model, tmp_path, calls, files, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    status, _, err = infer("-i", tmp_path / "a.mp4", tmp_path / "b.mp4", "-o", tmp_path / "out")
    assert status == 2 and "films are restored one at a time" in err
    status, _, err = infer("-i", tmp_path / "a.mp4", "-o", tmp_path / "out", "--quality", 0)
    assert status == 2 and "--quality 0" in err and not calls, "told before it is taken apart"
    for flags in (("--outscale", 100), ("--longest-side", 0), ("--suffix", "a/b")):
        for more in ([], ["--dry-run"]):
            status, _, err = infer("-i", tmp_path / "a.mp4", "-o", tmp_path / "out", *flags, *more)
            assert status == 2 and err.startswith(f"error: {flags[0].replace('out', '')} ") and err.count("\n") == 1
    status, _, err = infer("-i", tmp_path / "a.mp4", "-o", tmp_path / "b.mp4", "--suffix", "_x4")
    assert status == 2 and "b.mp4 is the result's whole name: leave out --suffix" in err
    monkeypatch.setattr(formats, "READABLE", formats.READABLE - {".heic"})  # as where its plug-in is not installed
    for name in ("b.png", "b.heic"):
        status, _, err = infer("-i", tmp_path / "a.mp4", "-o", tmp_path / name)
        assert status == 2 and f"{name} is neither a folder nor a film that is written (.avi " in err
    assert not calls and files(tmp_path) == {"a.mp4"}
    status, out, err = infer("-i", tmp_path / "a.mp4", "-o", tmp_path / "out", "-s", 2)
    assert status == 0 and "done 3" in out and (tmp_path / "out" / "a.mp4").read_bytes() == b"film\3"
    assert files(tmp_path) == {"a.mp4", "out/a.mp4"}
    assert {tuple(call.keys) for call in model.calls} == {("frame",)}
    assert calls[1][calls[1].index("-vf") + 1].startswith("fps=30000/1001,")
    assert calls[2][calls[2].index("-framerate") + 1] == "30000/1001"
    assert calls[2][-3:-1] == ["-c:a", "copy"] and "1:a?" in calls[2]
    status, _, err = infer("-i", tmp_path / "a.mp4", "-o", tmp_path / "out")
    assert status == 2 and "exists: use --overwrite" in err and len(calls) == 3


def test_a_film_goes_on_where_it_stopped(infer, model, tmp_path, calls, files):
    """A frame that fails leaves the others; the next run takes only what is missing."""
    (tmp_path / "a.mov").write_bytes(b"x")
    model.spoil = {"frame": "memory"}
    status, _, err = infer("-i", tmp_path / "a.mov", "-o", tmp_path / "b.mov", "-s", 2)
    assert status == 1 and "not put together; its frames are in" in err and not (tmp_path / "b.mov").exists()
    model.spoil = {}
    frames = tmp_path / "b.mov_frames"
    (frames / "out").mkdir()
    shutil.copy(frames / "in" / "000002.png", frames / "out" / "000002.png")
    status, out, _ = infer("-i", tmp_path / "a.mov", "-o", tmp_path / "b.mov", "-s", 2, "--skip-existing")
    assert status == 0 and "done 2, skipped 1" in out and files(tmp_path) == {"a.mov", "b.mov"}
    assert sum("fps=30000/1001" in str(call) for call in calls) == 1


def test_frames_of_another_film_or_of_other_settings_are_not_taken(infer, model, tmp_path, calls, files):
    (tmp_path / "a.mov").write_bytes(b"x")
    model.spoil = {"frame": "memory"}
    assert infer("-i", tmp_path / "a.mov", "-o", tmp_path / "b.mov", "-s", 2)[0] == 1
    model.spoil = {}
    (tmp_path / "c.mov").write_bytes(b"another")
    for source, scale in (("c.mov", 2), ("a.mov", 3)):
        status, _, err = infer("-i", tmp_path / source, "-o", tmp_path / "b.mov", "-s", scale, "--skip-existing")
        assert status == 2 and "b.mov_frames has frames of another film or of other settings" in err
    assert infer("-i", tmp_path / "c.mov", "-o", tmp_path / "b.mov", "-s", 2, "--overwrite")[0] == 0
    assert sum("fps=30000/1001" in str(call) for call in calls) == 2 and "b.mov" in files(tmp_path)


@pytest.mark.parametrize("record", [None, b"\xff\xfe\0\0"])
def test_a_folder_that_has_a_film_s_name_is_kept(infer, tmp_path, calls, files, record):
    """Nobody who replaces results means a folder of their own; a record that is no text is another film's."""
    (tmp_path / "a.mov").write_bytes(b"x")
    mine = tmp_path / "out" / "a.mov_frames"
    mine.mkdir(parents=True)
    (mine / "mine.txt").write_text("mine")
    if record:
        (mine / "film.json").write_bytes(record)
    flags = [] if record else ["--overwrite"]
    status, _, err = infer("-i", tmp_path / "a.mov", "-o", tmp_path / "out", *flags)
    assert status == 2 and ("frames of another film" if record else "was not made here: move it away") in err
    assert (mine / "mine.txt").is_file() and not infer.loads


def test_names_that_mean_something_else_to_ffmpeg(infer, tmp_path, calls, monkeypatch):
    """A % is a number's place to it, and what stands before a colon a protocol."""
    monkeypatch.chdir(tmp_path)
    for name in ("10:30.mp4", "50% a.mp4"):
        Path(name).write_bytes(b"x")
        assert infer("-i", name, "-o", "100%d", "-s", 2)[0] == 0
        assert Path("100%d", name).read_bytes() == b"film\3"
        paths = [word for call in calls for word in call[1:] if ".mp4" in word]
        assert len(paths) == 6 and all(word.startswith("file:") for word in paths)
        calls.clear()


def test_what_is_no_film_or_cannot_be_one(infer, tmp_path, calls, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    for flags, words in (
        (["-o", tmp_path], "would replace an input"),
        (["-o", tmp_path / "o", "--repeat", 2], "restored once"),
        (["-o", tmp_path / "o", "--save-steps"], "--save-steps is for pictures"),
        (["-o", path / "o"], "is no folder"),
    ):
        status, _, err = infer("-i", path, *flags)
        assert status == 2 and words in err and err.count("\n") == 1
    sound = "Input #0, mov\n  Stream #0:0: Audio: aac\nAt least one output file must be specified"
    hdr = SAID.replace("bt709", "smpte2084")
    for said, words in (("a.mp4: Invalid data", "Invalid data"), (hdr, "HDR"), (sound, "a.mp4: holds no film\n")):
        monkeypatch.setitem(globals(), "SAID", said)
        status, _, err = infer("-i", path, "-o", tmp_path / "o")
        assert status == 2 and words in err
    monkeypatch.setattr(film.shutil, "which", lambda name: None)
    status, _, err = infer("-i", path, "-o", tmp_path / "o")
    assert status == 2 and err == "error: films need ffmpeg: install it, or give a folder of frames with --frames\n"
    assert not infer.loads


def test_rates(monkeypatch):
    rates = {"25": 25, "23.98": Fraction(24000, 1001), "59.94": Fraction(60000, 1001), "12.5": 12.5, "1k": 1000}
    for said, rate in rates.items():
        monkeypatch.setattr(film, "ffmpeg", lambda *words, said=said, **how: f"Stream #0:1: Video: x, {said} fps")
        assert film.frame_rate(Path("a")) == rate


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg")
def test_a_real_film(infer, tmp_path):
    """Odd sides, colours and sound survive."""
    made = ("-f", "lavfi", "-i", "color=0x20A0C0:s=19x14:d=0.4:r=10", "-f", "lavfi", "-i", "sine=d=0.4")
    film.ffmpeg(*made, "-vf", "scale=out_color_matrix=bt709", *film._COLOURS, "-pix_fmt", "yuv444p", tmp_path / "a.mkv")
    assert infer("-i", tmp_path / "a.mkv", "-o", tmp_path / "b.mkv", "-s", 1.5)[0] == 0
    said = film.ffmpeg("-i", tmp_path / "b.mkv", fails=True)
    assert "Audio:" in said and "28x20" in said and "10 fps" in said
    film.ffmpeg("-i", tmp_path / "b.mkv", tmp_path / "%d.png")
    shown = Image.open(tmp_path / "4.png").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert all(abs(one - other) < 6 for one, other in zip(shown, (0x20, 0xA0, 0xC0), strict=True)), shown


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg")
def test_pixels_that_are_not_square_become_so(infer, tmp_path):
    """A DVD's 4:3 pixels: what is 20 pixels wide and shown as 27 is restored from 27, and nothing is squeezed."""
    for aspect, seen in (("4/3", "54x32"), ("1/2", "40x64"), ("1/1", "40x32")):
        made = ("-f", "lavfi", "-i", "color=gray:s=20x16:d=0.2:r=10", "-vf", f"setsar={aspect}")
        film.ffmpeg(*made, "-pix_fmt", "yuv420p", tmp_path / "a.mkv")
        assert infer("-i", tmp_path / "a.mkv", "-o", tmp_path / "b.mkv", "-s", 2, "--overwrite")[0] == 0
        said = film.ffmpeg("-i", tmp_path / "b.mkv", fails=True)
        assert seen in said and ("SAR" not in said or "SAR 1:1" in said), said
