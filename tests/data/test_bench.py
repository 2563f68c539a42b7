"""scripts/bench.py degradation: prints both paths."""

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench.py"


@pytest.mark.skipif(find_spec("basicsr") is None, reason="basicsr does not build on Python 3.13")
def test_degradation(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "degradation", "--images", "12"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "basicsr" in out and "images/s" in out
    assert float(re.search(r"ours is ([0-9.]+) times as fast", out)[1]) > 0


def test_mistake_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "degradation", "--preset", "csr"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2
    assert "ccsr" in capsys.readouterr().err
