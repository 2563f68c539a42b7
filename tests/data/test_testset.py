"""scripts/make_testset.py: what it writes is what its record says."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.data.degradation import degrade, preset

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_testset.py"


@pytest.fixture
def make(monkeypatch, capsys):
    """Runs the script in this process: (exit status, stdout, stderr)."""

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        status = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        coarse = Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 26, 3), dtype=np.uint8))
        coarse.resize((130, 100), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    (folder / "bad.jpg").write_bytes(b"nothing")
    return folder


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 127.5 - 1


def test_set_is_fixed_and_recorded(photos, tmp_path, make):
    for name in ("one", "two"):
        words = ("--count", 6, "--crop", 96, "--preset", "consissr", "--seed", 3)
        status, out, err = make("-i", photos, "-o", tmp_path / name, *words)
        assert status == 0, err
        assert "6 pairs" in out and "1 photographs unusable" in out
    record = json.loads((tmp_path / "one/testset.json").read_text())
    assert record["seed"] == 3 and record["preset"] == "consissr" and list(record["unusable"]) == ["bad.jpg"]
    assert len(record["images"]) == 6
    for entry in record["images"]:
        for kind in ("HR", "LR"):
            first, second = (tmp_path / name / kind / entry["file"] for name in ("one", "two"))
            assert first.read_bytes() == second.read_bytes()
        hr, lr = (pixels(tmp_path / "one" / kind / entry["file"]) for kind in ("HR", "LR"))
        assert hr.shape == (1, 3, 96, 96)
        again, _ = degrade(hr, preset(record["preset"]), [entry["degradation_seed"]])
        torch.testing.assert_close(again, lr, atol=1 / 120, rtol=0)  # one 8-bit step of rounding


def test_long_names_are_cut(tmp_path, make):
    """With a number before it, a name of 255 bytes would be too long; half a character is none."""
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / ("\u6c34" * 83 + ".png"))
    status, _, err = make("-i", tmp_path / "photos", "-o", tmp_path / "out", "--crop", 96)
    assert status == 0, err
    assert [file.name for file in (tmp_path / "out/HR").iterdir()] == ["0000_" + "\u6c34" * 66 + ".png"]


def test_mistakes_are_named(photos, tmp_path, make):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    for words, message in (
        (("-i", photos, "-o", tmp_path / "full"), "exists and is not empty"),
        (("-i", tmp_path / "gone", "-o", tmp_path / "x"), "gone does not exist"),
        (("-i", photos, "-o", tmp_path / "x", "--crop", 98), "do not divide by the scale"),
        (("-i", photos, "-o", tmp_path / "x", "--preset", "csr"), "ccsr"),
        (("-i", photos, "-o", tmp_path / "x", "--count", -1), "--count -1"),
        (("-i", photos, "-o", tmp_path / "x", "--seed", -1), "--seed -1"),
    ):
        status, _, err = make(*words)
        assert status == 2 and message in err and err.count("\n") == 1, err
