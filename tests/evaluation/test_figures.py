"""Figures and curves from small result folders."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from consissr.errors import UserError
from consissr.evaluation import curves, figures
from consissr.evaluation.protocols import get_measures, get_protocol
from consissr.evaluation.tables import load_table

pytest.importorskip("matplotlib")
TABLES = Path(__file__).resolve().parents[2] / "configs" / "tables"


@pytest.fixture
def steps(sets: dict[str, Path], save: Callable[..., Path], make_picture: Callable[..., np.ndarray]) -> Path:
    """The runs with pictures of three sampling steps, better and better."""
    for run in range(3):
        for index, name in enumerate("abc"):
            noises = {"00_t999": 30, "01_t666": 9, "02_t499": 3}
            pictures = {step: make_picture(index, noise) for step, noise in noises.items()}
            save(sets["runs"] / f"sample{run}" / f"{name}.png_steps", pictures)
    return sets["runs"]


def arguments(sets: dict[str, Path], output: Path, **changes) -> Namespace:
    return Namespace(**{
        "hr": sets["hr"], "lr": sets["lr"], "image": [], "metrics": "psnr,ssim", "protocol": None, "weights": None,
        "device": "cpu", "jobs": 1, "output": output, "prompts": [], **changes,
    })  # fmt: skip


DRAWN = ("consissr/figure2", "consissr/figure7", "ccsr/figure1", "ccsr/figure5", "consissr/figure6")


@pytest.mark.parametrize("name", DRAWN)
def test_figures_are_png_and_pdf(sets: dict[str, Path], steps: Path, tmp_path: Path, name: str) -> None:
    files = figures.draw(load_table(name, TABLES), {"ours": steps}, arguments(sets, tmp_path / "out"), None)
    assert [file.suffix for file in files] == [".png", ".pdf"]
    assert files[0].read_bytes()[:4] == b"\x89PNG" and files[1].read_bytes()[:4] == b"%PDF"


def test_extremes_are_best_and_worst(sets: dict[str, Path]) -> None:
    inputs = figures.Inputs({"runs": sets["runs"], "good": sets["good"]}, sets["hr"], sets["lr"], ["b"], (0, 0, 20, 10))
    ((overview, best, worst, single, hr),) = figures.extreme_rows(inputs)
    assert overview[0] == "LR" and hr[0] == "HR" and single[0].startswith("good")
    values = [float(entry[0].split()[-2]) for entry in (best, worst)]
    assert values[0] > values[1] and best[0].startswith("runs best")
    assert best[1].shape == (10, 20, 3)
    assert overview[2] == (0, 0, 5, 2.5), "the box, in the LR image's pixels"


def test_curves_average_images_and_runs(sets: dict[str, Path], steps: Path, tmp_path: Path) -> None:
    measures, protocol = get_measures(["psnr"]), get_protocol("ccsr")
    done = curves.step_evaluation({"ours": steps}, sets["hr"], measures, protocol, tmp_path / "s.jsonl", jobs=1)
    found = curves.step_curves(*done, measures)
    timesteps, values = zip(*found["ours"]["psnr"], strict=True)
    assert timesteps == (999, 666, 499) and values[0] < values[1] < values[2]


def test_what_is_missing_is_named(sets: dict[str, Path], steps: Path, tmp_path: Path) -> None:
    args = arguments(sets, tmp_path)
    with pytest.raises(UserError, match="--save-steps"):
        figures.draw(load_table("consissr/figure2", TABLES), {"good": sets["good"]}, args, None)
    with pytest.raises(UserError, match="--repeat 2"):
        figures.draw(load_table("ccsr/figure1", TABLES), {"good": sets["good"]}, args, None)
    with pytest.raises(UserError, match="leaves"):
        figures.draw(load_table("consissr/figure7", TABLES), {"good": sets["good"]}, args, (0, 0, 999, 5))
    with pytest.raises(UserError, match="no image 'z'"):
        changed = arguments(sets, tmp_path, image=["z"])
        figures.draw(load_table("consissr/figure7", TABLES), {"good": sets["good"]}, changed, None)
    with pytest.raises(UserError, match="--sr"):
        figures.draw(load_table("consissr/figure7", TABLES), {}, args, None)
    (steps / "sample1" / "a.png_steps" / "02_t499.png").unlink()
    with pytest.raises(UserError, match="steps differ"):
        figures.draw(load_table("consissr/figure6", TABLES), {"ours": steps}, args, None)


def test_step_pictures_are_in_order(steps: Path) -> None:
    found = curves.step_pictures(steps / "sample0")
    assert list(found) == ["a", "b", "c"] and list(found["a"]) == [999, 666, 499]
    assert np.all([path.is_file() for path in found["a"].values()])
