"""The conformance command: its rules for passing, what it compares of incomplete folders, and what it says of them."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
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


@pytest.mark.parametrize(
    ("files", "kinds"),
    [
        (["weights.safetensors", "colorfix.npz"], {"consissr", "consissr_common"}),
        (["weights.safetensors", "outputs.safetensors", "train_outputs.safetensors"], {"consissr", "consissr_train"}),
        (["weights.safetensors", "train_outputs.safetensors"], {"consissr_train"}),
        (["degradation_seeded.npz"], {"ccsr"}),
        (["geometry.json"], {"ccsr"}),
        (["schedule.npz"], {"consissr_common"}),
        (["resize_cases.json"], {"consissr_common"}),
        (["notes.txt"], set()),
    ],
)
def test_files_make_the_kinds(tmp_path, files, kinds):
    for name in files:
        (tmp_path / name).touch()
    assert Fixture(tmp_path).kinds == kinds


def test_the_working_folder_is_a_folder_like_any_other(tmp_path, monkeypatch):
    (tmp_path / "consissr_train_B").mkdir()
    monkeypatch.chdir(tmp_path / "consissr_train_B")
    assert Fixture(".").weights_folder == tmp_path.resolve() / "consissr_B"


def test_only_what_the_fixture_lacks_is_called_lacking(tmp_path, monkeypatch):
    (tmp_path / "stability_outputs.json").write_text('{"G_STD": {}}')

    def asks_the_fixture(fixture):
        yield Check("one", torch.ones(1), torch.ones(1))
        yield Check("two", fixture.json("stability_outputs.json")["L_STD_nocrop"], 0)

    def asks_our_code(fixture):
        yield Check("three", {}["weight"], 0)

    monkeypatch.setattr(check, "CASES", (asks_the_fixture, asks_our_code))
    lines: list[str] = []
    assert check.run(str(tmp_path), lines.append) == (1, 1)
    assert "lacks    stability_outputs.json:L_STD_nocrop" in lines
    assert any(line.startswith(f"{__name__}: KeyError: 'weight'") and line.endswith("FAIL") for line in lines)


def test_what_nothing_checks_is_listed_and_counted(tmp_path):
    source = np.zeros((8, 6, 3), np.uint8)
    np.savez(tmp_path / "image_ops.npz", src=source, auto_resize_6=source, mystery=source)
    (tmp_path / "schedule50.json").write_text('{"timesteps4": [999, 666, 333, 0], "other50": [1]}')
    lines: list[str] = []
    assert check.run(str(tmp_path), lines.append) == (2, 1), "steps are written in ascending order"
    assert [line for line in lines if line.startswith("unchecked")] == [
        "unchecked image_ops.npz:mystery",
        "unchecked schedule50.json:other50",
    ]
    assert ", 2 unchecked; lacking: " in lines[-1]


@pytest.fixture
def small(tmp_path):
    """CCSR's small folder, without what takes longest."""
    with tarfile.open(Path(__file__).parent / "small" / "ccsr.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for name in ("run_S3_g1", "run_S2_g45", "run_S2_noise_g1", "run_V1_noNUTS_g1", "run_tile_S2_g45", "tile_inputs"):
        (tmp_path / "ccsr" / f"{name}.safetensors").unlink()
    for name in ("stage1_inputs", "stage1_outputs", "stage2_inputs", "stage2_outputs"):
        (tmp_path / "ccsr" / f"{name}.safetensors").unlink()
    return tmp_path / "ccsr"


@pytest.mark.parametrize(
    ("absent", "seen", "broken"),
    [
        (
            {"inputs.safetensors": "", "geometry.json": "", "stability_outputs.json": ""},
            ["color_fix.npz:adain"],
            ["networks of CCSR", "stability"],
        ),
        ({"vae": "vae/", "unet": "unet/"}, ["networks.safetensors:t999_down0"], ["samplings of CCSR"]),
        (
            {"controlnet": "controlnet/config.json"},
            ["stability_outputs.json:L_STD_nocrop"],
            ["networks of CCSR", "samplings of CCSR"],
        ),
        ({"run_S1_g1.safetensors": "run_*.safetensors"}, ["networks.safetensors:t999_eps"], ["samplings of CCSR"]),
    ],
    ids=["inputs", "vae", "controlnet", "runs"],
)
def test_what_is_absent_is_named_and_a_promise_that_is_not_kept_fails(small, absent, seen, broken):
    """The rest is compared; of what the inputs are there for, something must be."""
    for name in absent:
        shutil.rmtree(small / name) if (small / name).is_dir() else (small / name).unlink()
    lines: list[str] = []
    compared, failed = check.run(str(small), lines.append)
    assert compared and failed == len(broken), [line for line in lines if line.endswith("FAIL")]
    assert {f"lacks    {said or name}" for name, said in absent.items()} <= set(lines)
    passed = [line for line in lines if line.endswith("pass")]
    assert all(any(line.startswith(name) for line in passed) for name in seen)
    assert [line.split(":")[0] for line in lines if line.endswith("the inputs are there FAIL")] == broken
    assert all(name in lines[-1] for name in [*broken, *(said or name for name, said in absent.items())])


def test_a_folder_without_its_results_fails(small):
    """Tables alone, which need no networks, do not make up for them."""
    for name in ("networks.safetensors", "run_S1_g1.safetensors", "stability_outputs.json"):
        (small / name).unlink()
    lines: list[str] = []
    compared, failed = check.run(str(small), lines.append)
    assert compared and failed == 2  # of what networks.safetensors is for it holds the inputs, too
    assert "samplings of CCSR, stability, " in lines[-1]


def test_a_change_of_one_weight_fails(small):
    """Off by a tenth of a percent."""
    lines: list[str] = []
    assert check.run(str(small), lines.append)[1] == 0, lines
    weights = small / "controlnet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["condition_conv_in.weight"] = state["condition_conv_in.weight"].float() * 1.001
    save_file(state, weights)
    lines.clear()
    compared, failed = check.run(str(small), lines.append)
    assert 0 < failed < compared
    assert any(re.search(r"t999_down0 .* FAIL$", line) for line in lines)
    assert all("nocontrol" not in line for line in lines if line.endswith("FAIL"))


def test_exit_status(tmp_path, capsys):
    assert check.main([]) == 2
    assert check.main([str(tmp_path / "absent")]) == 2
    assert check.main([str(tmp_path)]) == 1, "a folder that holds nothing to compare is no success"
    assert "of no known kind" in capsys.readouterr().out


def test_what_fails_is_tried_once_more(tmp_path: Path, monkeypatch, capsys) -> None:
    """A quantity must fail under both arithmetics; equal names are told apart by their order."""
    told = [
        "a:x  1 1 rel FAIL",
        "a:x  1 1 rel pass",
        "b:y  1 1 rel FAIL",
        "# 3 compared, 2 failed, 0 lacking",
    ]
    again = [
        "a:x  0 0 rel pass",
        "a:x  0 0 rel FAIL",
        "b:y  2 2 rel FAIL",
        "# 3 compared, 2 failed, 0 lacking",
    ]
    of = {"DEFAULT": told, "SSE41": again}
    monkeypatch.setattr(
        check, "run", lambda folder, write: ([write(text) for text in of[os.environ["ONEDNN_MAX_CPU_ISA"]]], (3, 2))[1]
    )
    assert check.twice(str(tmp_path)) == (3, 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:3]] == ["again", "pass", "again"]
    assert lines[3:] == ["# 3 compared, 2 to try again, 0 lacking", again[0], again[2],
                         "# 3 compared, 1 failed, 0 lacking"]  # fmt: skip
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


def test_a_check_that_dies_fails(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(check, "run", lambda folder, write: os._exit(1))
    assert check.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "# 0 compared, 1 failed, 0 lacking, 0 unchecked"
