"""G-STD and L-STD against values that CCSR's own scripts computed."""

import json
from pathlib import Path

import numpy as np
import pytest

from consissr.errors import UserError
from consissr.evaluation.stability import global_std, local_std


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


def test_standard_deviation_divides_by_n() -> None:
    assert global_std(np.array([[0.0], [2.0]])) == 1.0
    assert local_std(np.array([[[0.0]], [[2.0]]])) == 1.0


def test_one_run_has_no_local_std() -> None:
    with pytest.raises(UserError, match="repeated runs"):
        local_std(np.zeros((1, 3, 4, 4)))
