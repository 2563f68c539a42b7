"""The conformance command: its rules for passing, and its verdict on the fixtures beside the repository."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

import check  # noqa: E402
from fixtures import Check, Fixture, compare  # noqa: E402


@pytest.mark.parametrize(
    ("got", "want", "kind", "tolerance", "passes"),
    [
        ([1.0, 2.0], [1.0, 2.00001], "relative", 2e-5, True),
        ([1.0, 2.0], [1.0, 2.001], "relative", 2e-5, False),
        ([0.0, 0.0], [0.0, 0.0], "relative", 2e-5, True),
        ([0.5], [0.5009], "absolute", 1e-3, True),
        ([0.5], [0.502], "absolute", 1e-3, False),
        ([7, 9], [8, 8], "uint8", 0.0, True),
        ([7, 9], [9, 9], "uint8", 0.0, False),
        ([7], [7], "exact", 0.0, True),
        ([7], [8], "exact", 0.0, False),
        ([float("nan")], [1.0], "absolute", 1e-3, False),
        ([1.0, 1.0], [1.0], "absolute", 1e-3, False),
    ],
)
def test_what_passes(got, want, kind, tolerance, passes):
    found = Check("x", torch.tensor(got), torch.tensor(want), tolerance, kind)
    assert found.passed() is passes
    assert check.line(found).endswith("pass" if passes else "FAIL")


def test_stored_forms_are_parts_of_the_whole():
    whole = torch.rand(1, 3, 300, 300)
    stored = {
        "y_s4": whole[..., ::4, ::4],
        "y_crop": whole[..., 100:164, 200:264],
        "y_mean": whole.mean((0, 2, 3)),
        "y_std": whole[0].flatten(1).std(1),
        "y_other": torch.zeros(1),
    }
    found = list(compare("file", stored, "y", whole))
    assert [c.name for c in found] == ["file:y_s4", "file:y_crop", "file:y_mean", "file:y_std"]
    assert all(c.passed() for c in found)
    assert [c.name for c in compare("file", stored, "absent", whole)] == ["file:absent"]


@pytest.mark.parametrize("name", ["consissr_A", "consissr_train_A", "consissr_common", "ccsr_A"])
def test_networks_and_training_steps_equal_the_authors(shared, name):
    fixture = Fixture(shared / "conformance" / name)
    found = [
        c
        for cases in (check.consissr_networks.cases, check.ccsr_networks.cases, check.consissr_training.cases)
        for c in cases(fixture)
    ]
    assert all(isinstance(c, Check) for c in found), "these fixtures are complete"
    assert len(found) > 5
    assert not [check.line(c) for c in found if not c.passed()]


def test_a_change_of_one_weight_fails_and_missing_files_are_named(shared, tmp_path):
    """Rows of a copied fixture: one weight off by a tenth of a percent must be seen."""
    source = shared / "conformance" / "ccsr_A"
    for part in ("unet", "controlnet", "vae"):
        (tmp_path / part).mkdir()
        for file in (source / part).iterdir():
            (tmp_path / part / file.name).write_bytes(file.read_bytes())
    for name in ("networks.safetensors", "inputs.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    lines: list[str] = []
    assert check.run(str(tmp_path), lines.append)[1] == 0
    assert "lacks    run_*.safetensors" in lines
    weights = tmp_path / "controlnet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["condition_conv_in.weight"] *= 1.001
    save_file(state, weights)
    lines.clear()
    compared, failed = check.run(str(tmp_path), lines.append)
    assert 0 < failed < compared
    assert any(re.search(r"t999_down0 .* FAIL$", line) for line in lines)
    assert all("nocontrol" not in line for line in lines if line.endswith("FAIL"))


def test_exit_status(tmp_path, capsys):
    assert check.main([]) == 2
    assert check.main([str(tmp_path / "absent")]) == 2
    assert check.main([str(tmp_path)]) == 1, "a folder that holds nothing to compare is no success"
    assert "of no known kind" in capsys.readouterr().out
