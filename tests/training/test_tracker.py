"""The tracker that runs have by default, which other tests leave out."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from consissr.training.run_log import read_log
from scripts.train import main
from tests.training.tiny import words


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of everything that TensorBoard shows of a run, by its name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_shows_pictures_and_the_config(photos: Path, tmp_path: Path) -> None:
    """Those that lie in the run's folder, too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = (f"data.validation={photos}", "data.validation_count=2", "validate_every=1", "tracker=tensorboard")
    assert main(words("autoencoder", photos, tmp_path, *more)) == 0
    (folder,) = {path.parent for path in tmp_path.rglob("*tfevents*")}
    found = EventAccumulator(str(folder)).Reload()
    shown = found.Images("validation")
    assert [image.step for image in shown] == [1, 2]
    picture = np.asarray(Image.open(io.BytesIO(shown[1].encoded_image_string)))
    assert (picture == np.asarray(Image.open(tmp_path / "autoencoder/validation/step-2.png"))).all()
    (text,) = found.Tensors("config/text_summary")
    assert b"output_dir" in text.tensor_proto.string_val[0]


def test_tensorboard_shows_every_step_once(photos: Path, tmp_path: Path) -> None:
    """Also of a run that goes on from an earlier step than it had told of."""
    arguments = words("autoencoder", photos, tmp_path, "tracker=tensorboard", "steps=3")
    assert main(arguments) == 0
    shutil.rmtree(tmp_path / "autoencoder/checkpoint-3")
    assert main(["--resume", "latest", *arguments]) == 0
    (folder,) = {path.parent for path in tmp_path.rglob("*tfevents*")}
    log, shown = read_log(tmp_path / "autoencoder/log.jsonl"), scalars(folder)
    losses = [tag for tag in shown if tag.endswith("/loss")]
    assert losses
    for tag in losses:
        assert [step for step, _ in shown[tag]] == [1, 2, 3]
        told = [line[tag] for line in log]
        assert all(abs(a - b) <= 1e-6 * abs(b) for (_, a), b in zip(shown[tag], told, strict=True))


def test_wandb_goes_on_with_its_run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: pictures and the config are in the run's folder, and a resumed run has the name of the first."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    more = (f"data.validation={photos}", "data.validation_count=2", "validate_every=1", "tracker=wandb")
    arguments = words("autoencoder", photos, tmp_path, *more)
    assert main(arguments) == 0
    assert main(["--resume", "latest", *arguments, "steps=3"]) == 0
    runs = sorted((tmp_path / "autoencoder/wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len({run.name.rsplit("-", 1)[1] for run in runs}) == 1
    assert [len(list(run.rglob("validation_*.png"))) for run in runs] == [2, 1]
