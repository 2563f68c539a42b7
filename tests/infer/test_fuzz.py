"""Some of the odd pictures, calls and model folders of tests/fuzz.py; `python tests/fuzz.py` runs them all."""

import importlib.util


def test_nothing_odd_ends_in_a_traceback_or_loses_a_file(root, monkeypatch):
    spec = importlib.util.spec_from_file_location("fuzz", root / "tests" / "fuzz.py")
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    said = []
    assert fuzz.run(["images", "calls", "folders"], cases=8, say=said.append) == 0, said
    assert len(said) == 3 and all(" as wanted" in line for line in said)
