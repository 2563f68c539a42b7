"""G-STD and L-STD by hand, and against values that CCSR's own scripts computed."""

import json
from pathlib import Path
from statistics import pstdev

import numpy as np
import pytest

from consissr.errors import UserError
from consissr.evaluation.stability import global_std, local_std, local_std_of_files


@pytest.fixture
def recorded(shared: Path) -> tuple[np.lib.npyio.NpzFile, dict]:
    folder = shared / "conformance" / "ccsr_A"
    return np.load(folder / "stability_inputs.npz"), json.loads((folder / "stability_outputs.json").read_text())


@pytest.mark.parametrize("metric", ["psnr", "lpips"])
def test_global_std_is_the_release_s(recorded, metric: str) -> None:
    inputs, outputs = recorded
    values = inputs[f"{metric}_MN"].T
    assert global_std(values) == pytest.approx(outputs["G_STD"][metric], abs=1e-6)
    assert values.mean() == pytest.approx(outputs["G_STD_mean_metric"][metric], abs=1e-6)


@pytest.mark.parametrize(("crop", "key"), [(4, "official_crop4"), (0, "nocrop")])
def test_local_std_is_the_release_s(recorded, crop: int, key: str) -> None:
    inputs, outputs = recorded
    scenes = []
    for runs in inputs["images_MNHWC"] / np.float32(255):
        height, width = runs.shape[1:3]
        scenes.append(local_std(runs[:, crop : height - crop, crop : width - crop]))
    assert scenes == pytest.approx(outputs[f"L_STD_{key}_per_scene"], abs=1e-6)
    assert np.mean(scenes) == pytest.approx(outputs[f"L_STD_{key}"], abs=1e-6)


def test_global_std_by_hand() -> None:
    """Two runs (rows) of two images: deviations over the runs 1 and 3, divided by N = 2, then the mean (Eq. 4)."""
    assert global_std([[0.0, 10.0], [2.0, 16.0]]) == 2
    single = np.array([[0.1], [0.2], [0.4]], np.float32)
    assert global_std(single) == pytest.approx(pstdev(map(float, single[:, 0])), rel=1e-12), "in double precision"


def test_local_std_by_hand() -> None:
    """Three runs of two pixels: deviations over the runs 0.4 and 0, then the mean over the pixels (Eq. 5)."""
    root = 0.5 * 1.5**0.5  # of the values 0.5 - root, 0.5, 0.5 + root: deviation 0.5
    runs = np.array([[0.5 - root, 0.2], [0.5, 0.2], [0.5 + root, 0.2]])
    assert local_std(runs) == pytest.approx(0.25, abs=1e-7)
    assert local_std(np.array([[[0.0]], [[2.0]]])) == 1.0


def test_local_std_takes_images_in_single_precision_and_sums_in_double(rng) -> None:
    """As the release's, whose images are float32. Steps of 1 / 4096 have exact deviations, whose sum float32 rounds."""
    steps = rng.integers(0, 4096, (500, 500))
    runs = np.stack([np.zeros((500, 500)), steps / 4096]).astype(np.float32)
    assert local_std(runs) == int(steps.sum()) / 2 / 4096 / 500**2
    assert local_std([[0.1], [0.3]]) == local_std(np.array([[0.1], [0.3]], np.float32))


def test_local_std_of_files(tmp_path: Path, save) -> None:
    """Levels 0 and 51 of 255 differ by 0.2, deviation 0.1, in half of the pixels; a crop leaves the border out."""
    first, second = np.zeros((2, 4, 4, 3), np.uint8)
    second[:, 2:] = 51
    second[0] = first[0] = 255
    for run, picture in enumerate((first, second)):
        save(tmp_path / f"sample{run}", {"a": picture})
    files = [tmp_path / f"sample{run}" / "a.png" for run in (0, 1)]
    assert local_std_of_files(files) == pytest.approx(0.1 * 6 / 16, abs=1e-7)
    assert local_std_of_files(files, crop=1) == pytest.approx(0.1 / 2, abs=1e-7)


def test_one_run_has_no_local_std() -> None:
    with pytest.raises(UserError, match="^L-STD compares repeated runs: .*, ...$"):
        local_std(np.zeros((1, 3, 4, 4)))
