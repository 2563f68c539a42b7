"""How much results differ between runs with different noise: G-STD per image, L-STD per pixel.

Both take the population standard deviation (divided by N), as CCSR's scripts do. Eq. 5 as printed lacks the square of
the deviation; without it the sum would be zero.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from consissr.errors import UserError


def global_std(values: np.ndarray) -> float:
    """G-STD of a metric: (N runs, M images) -> mean over images of the standard deviation over runs."""
    # (Eq. 4, CCSR)
    return float(np.mean(np.std(np.asarray(values, dtype=np.float64), axis=0)))


def local_std(runs: np.ndarray) -> float:
    """L-STD of one image: (N runs, ...) in [0, 1] -> mean over channels and pixels of the deviation over runs."""
    # (Eq. 5, CCSR), with the missing square; range and mean over channels as in CCSR v1's script
    runs = np.asarray(runs, dtype=np.float32)
    if runs.shape[0] < 2:
        raise UserError("L-STD compares repeated runs: give a folder with sample0, sample1, ...")
    return float(np.mean(np.std(runs, axis=0), dtype=np.float64))


def local_std_of_files(files: Iterable[Path], crop: int = 0) -> float:
    """L-STD of one image from its files, one per run, `crop` pixels cut from each side."""
    from consissr.evaluation.folders import read_image
    from consissr.evaluation.metrics import crop_border

    return local_std(np.concatenate([crop_border(read_image(file), crop).numpy() for file in files]))
