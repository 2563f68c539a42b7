"""scripts/infer.py with the bundled model: results are exactly floor(scale * side + 0.5) large, whatever the input."""

from math import floor

import numpy as np
import pytest
from PIL import Image

SMALL, LARGE = [(1, 1), (37, 53)], [(127, 640), (3000, 200)]
"""Width and height in pixels."""
ONE_STEP = ("--steps", "1", "--t-min", "0")


def check_sizes(script, folder, rng, sizes, scale, *flags):
    """Restore noisy images of these sizes, upright and lying, and measure the results."""
    (folder / "in").mkdir()
    sizes = {f"{width}x{height}.png": (width, height) for size in sizes for width, height in {size, size[::-1]}}
    for name, (width, height) in sizes.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(folder / "in" / name)
    flags = [*flags, "--device", "cpu", "--scale", str(scale)]
    assert script("infer").main(["-i", str(folder / "in"), "-o", str(folder / "out"), *flags]) == 0
    for name, size in sizes.items():
        result = Image.open(folder / "out" / name)
        assert result.size == tuple(floor(scale * side + 0.5) for side in size)
        assert np.ptp(np.asarray(result)) > 0 or size == (1, 1)


def test_small_images_four_times(script, tmp_path, rng):
    check_sizes(script, tmp_path, rng, SMALL, 4)


def test_fractions(script, tmp_path, rng):
    check_sizes(script, tmp_path, rng, [*SMALL, (127, 64)], 2.6, *ONE_STEP)


def test_large_images_smaller(script, tmp_path, rng):
    """127x640 and 3000x200 both ways; fractions that round up and down."""
    check_sizes(script, tmp_path, rng, LARGE, 0.3, *ONE_STEP)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.3, 4])
def test_large_images(script, tmp_path, rng, scale):
    """Up to 12000 x 800 pixels."""
    check_sizes(script, tmp_path, rng, LARGE, scale)
