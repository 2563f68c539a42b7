"""`infer.py --compile`: the same pictures. Compiling takes a minute."""

import numpy as np
import pytest
from PIL import Image


@pytest.mark.slow
def test_compiled_networks_restore_the_same(script, tiny_model, tmp_path, rng):
    Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(tmp_path / "b.png")
    results = {}
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        call = ["-i", tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / name, "-m", tiny_model, *flags]
        assert script("infer").main([str(word) for word in [*call, "--device", "cpu", "-s", "2"]]) == 0
        results[name] = [np.asarray(Image.open(tmp_path / name / f"{letter}.png")).astype(int) for letter in "ab"]
    for plain, compiled in zip(results["plain"], results["compiled"], strict=True):
        assert np.abs(plain - compiled).max() <= 1
