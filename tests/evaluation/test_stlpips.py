"""ST-LPIPS against the package whose weights it uses."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch

from consissr.errors import UserError
from consissr.evaluation import stlpips
from consissr.evaluation.folders import read_image


@pytest.fixture(scope="module")
def own() -> stlpips.ShiftTolerantLpips:
    if stlpips.weights_file() is None:
        pytest.skip("stlpips-pytorch is not installed")
    return stlpips.ShiftTolerantLpips(stlpips.weights_file())


@pytest.fixture
def package(own, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The package's own metric; two modules that it names and does not use are replaced by empty ones."""
    for name, attribute in (("IPython", "embed"), ("torchsummary", "summary")):
        stand_in = types.ModuleType(name)
        setattr(stand_in, attribute, None)
        monkeypatch.setitem(sys.modules, name, stand_in)
    module = importlib.import_module("stlpips_pytorch.stlpips")
    return module.LPIPS(net="alex", variant="shift_tolerant", verbose=False)


def test_values_are_the_package_s(own, package) -> None:
    """Ten pairs, of sides that do and do not divide by the strides."""
    generator = torch.Generator().manual_seed(0)
    for pair in range(10):
        hr = torch.rand(1, 3, 64 + 5 * pair, 80 - 3 * pair, generator=generator)
        sr = (hr + 0.03 * pair * torch.randn(hr.shape, generator=generator)).clamp(0, 1)
        with torch.no_grad():
            expected = package(2 * sr - 1, 2 * hr - 1).item()
        assert own(sr, hr) == pytest.approx(expected, abs=1e-6)
        assert own(sr, sr) == 0 == own(hr, hr) and own(sr, hr) == pytest.approx(expected, abs=1e-6), (
            "no stale reference"
        )
    assert expected > 0.01


def test_it_tells_detail_from_blur_where_niqe_does_not(own, shared: Path) -> None:
    """OSEDiff's result of one pair is closer to HR than bicubic enlargement is."""
    data = shared / "data" / "realsr"
    name = "Canon_001_LR4.png"
    hr, sr, lr = (read_image(data / part / name) for part in ("HR", "osediff", "LR"))
    enlarged = torch.nn.functional.interpolate(lr, scale_factor=4, mode="bicubic").clamp(0, 1)
    assert own(hr, hr) == 0 < own(sr, hr) < own(enlarged, hr)


def test_small_images_are_refused(own) -> None:
    with pytest.raises(UserError, match="at least 16 pixels"):
        own(torch.rand(1, 3, 12, 40), torch.rand(1, 3, 12, 40))


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "stlpips_pytorch"
    (package / stlpips.FILE).parent.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / stlpips.FILE).write_bytes(b"x")
    monkeypatch.setattr(stlpips, "find_spec", lambda name: types.SimpleNamespace(origin=str(package / "__init__.py")))
    stlpips.weights_file.cache_clear()
    try:
        with pytest.raises(UserError, match="is not the file of stlpips-pytorch"):
            stlpips.weights_file()
    finally:
        stlpips.weights_file.cache_clear()
