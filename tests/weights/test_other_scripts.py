"""Names in training, evaluation and measurement: what `infer.py` knows, they know."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.evaluation import produce
from consissr.weights.files import read_config
from tests.weights.standin import commit, serve

V2 = "kharma1/ccsr_v2_repost"


@pytest.fixture
def named(machine, all_in_one) -> str:
    """A name that the hub has, and nothing else: neither the model nor its base is on this machine."""
    serve(machine, V2, *all_in_one.iterdir())
    return "ccsr-v2"


@pytest.fixture
def photos(tmp_path, rng):
    """Pairs lr/ (16x16) and hr/ (64x64)."""
    for name, side in (("lr", 16), ("hr", 64)):
        (tmp_path / name).mkdir()
        for i in range(2):
            pixels = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_training_starts_from_a_name_on_its_own_base(named, photos, script, tmp_path):
    """`init=ccsr-v2` with the papers' configuration fetches nothing but that; what was trained names the same base."""
    config = ["--config", "configs/ccsr/nuts.yaml", f"init={named}", f"data.paths=[{photos / 'hr'}]", "data.crop=64"]
    small = ["steps=1", "batch=1", "micro_batch=1", "tracker=none", "compile=false", "precision=fp32"]
    small += ["frozen_precision=fp32", "log_every=1", f"output_dir={tmp_path / 'run'}"]
    assert script("train").main([*config, *small]) == 0
    model = read_config(tmp_path / "run").model
    assert model.base == f"{V2}@{commit(V2)}"
    assert (tmp_path / "run" / "vae").is_dir(), "the tuned decoder goes on"


def test_a_table_restores_with_a_name(named, photos, script, tmp_path, monkeypatch, capsys):
    infer = script("infer").main
    (tmp_path / "quick.yaml").write_text("geometry: pad\nshort_side: 0\n")

    def run(command: list[str], **_):
        return SimpleNamespace(returncode=infer(command[2:]))

    monkeypatch.setattr(produce, "subprocess", SimpleNamespace(run=run))
    call = ["--table", "ccsr/table6", "--dataset", "RealSR", "--hr", photos / "hr", "--lr", photos / "lr"]
    call += ["--run", f"CCSR-S1={named}", "--repeat", "1", "--metrics", "psnr", "--jobs", "1", "-o", tmp_path / "out"]
    flags = f"--config {tmp_path / 'quick.yaml'} --device cpu --plan nuts --steps 1 --guidance 1 -q"
    assert script("eval").main([*map(str, call), "--infer-flags", flags]) == 0
    assert "CCSR-S1" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "results").rglob("*.png"))) == 2


def test_measurements_take_a_name(named):
    from consissr.bench.models import from_folder

    networks, config = from_folder(named, {"guidance": 1.0}, torch.device("cpu"), torch.float32)
    assert networks.denoiser is not None and config.posterior == "sample" and config.guidance == 1
