"""PSNR, SSIM and NIQE: against a published per-image log, and against their definitions."""

import csv
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from consissr.errors import UserError
from consissr.evaluation import metrics
from consissr.evaluation.folders import read_image
from consissr.evaluation.niqe import halve, niqe, pristine

SAMPLE = ("Canon_001", "Canon_027", "Nikon_021", "Nikon_044")


@pytest.mark.parametrize("name", SAMPLE)
def test_published_values_are_reproduced(shared: Path, name: str) -> None:
    """OSEDiff's released log (pyiqa 0.1.10) of its released images."""
    data = shared / "data" / "realsr"
    with (data / "osediff_metrics.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["image"].startswith(name))
    sr, hr = (read_image(data / folder / row["image"]) for folder in ("osediff", "HR"))
    assert metrics.psnr(sr, hr).item() == pytest.approx(float(row["PSNR"]), abs=1e-4)
    assert metrics.ssim(sr, hr).item() == pytest.approx(float(row["SSIM"]), abs=1e-5)
    assert niqe(sr).item() == pytest.approx(float(row["NIQE"]), abs=0.011)  # twice the largest difference found


def images(count: int = 1, noise: float = 0.05, size: tuple[int, int] = (40, 48)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hr = torch.rand(count, 3, *size, generator=generator) * 0.8 + 0.1
    return hr + noise * torch.randn(hr.shape, generator=generator).clamp(-1, 1), hr


def test_rounding_may_leave_the_range_by_a_ten_thousandth() -> None:
    for value in (-1e-4, 1 + 1e-4):
        image = torch.full((1, 3, 8, 8), value, dtype=torch.float64)
        assert metrics.psnr(image, image).item() == pytest.approx(80)
        with pytest.raises(UserError, match=r"values in \[0, 1\]"):
            metrics.psnr(2 * image - 0.5, image)


def test_psnr_of_a_known_error() -> None:
    """A grey step of 1/255 is a Y step of 219/255/255: the scale that sets Y apart from full range."""
    hr = torch.full((2, 3, 8, 8), 0.5)
    expected = 20 * math.log10(255 * 255 / 219)
    assert metrics.psnr(hr + 1 / 255, hr).tolist() == pytest.approx([expected, expected], abs=0.01)
    full_range = metrics.psnr(hr + 1 / 255, hr, space="rgb")
    assert (metrics.psnr(hr + 1 / 255, hr) - full_range)[0].item() == pytest.approx(1.32, abs=0.01)


def test_luma_by_hand() -> None:
    """ITU-R BT.601: Y = 16 + 65.481 R + 128.553 G + 24.966 B, from 16 (black) to 235 (white)."""
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    wanted = [16, 235, 16 + 65.481, 16 + 128.553, 16 + 24.966]
    assert (metrics.luma(colours.view(5, 3, 1, 1)).flatten() * 255).tolist() == pytest.approx(wanted, rel=1e-12)
    assert metrics.luma(torch.zeros(2, 3, 4, 5, dtype=torch.float64)).shape == (2, 1, 4, 5)


def test_psnr_by_hand() -> None:
    """10 log10(1 / mse): 0.1 in red is a mean of 0.01 / 3 over the channels, and 6.5481 / 255 in Y, not rounded."""
    hr = torch.full((2, 3, 6, 6), 0.25, dtype=torch.float64)
    sr = hr.clone()
    sr[0, 0] += 0.1
    sr[1, 1, 2:4, 2:4] += 0.002  # a quarter of a level, in 4 of 36 pixels
    channels = [-10 * math.log10(0.01 / 3 + 1e-8), -10 * math.log10(4e-6 / 27 + 1e-8)]
    y = [-10 * math.log10((6.5481 / 255) ** 2 + 1e-8), -10 * math.log10((0.257106 / 255) ** 2 / 9 + 1e-8)]
    assert metrics.psnr(sr, hr, space="rgb").tolist() == pytest.approx(channels, rel=1e-9)
    assert metrics.psnr(sr, hr).tolist() == pytest.approx(y, rel=1e-9)
    inner = -10 * math.log10((0.257106 / 255) ** 2 / 4 + 1e-8)
    assert metrics.psnr(*(metrics.crop_border(image, 1) for image in (sr, hr))).tolist() == pytest.approx(
        [y[0], inner], rel=1e-9
    )
    assert metrics.psnr(sr.float(), hr.float()).dtype == torch.float64


def test_ssim_rounds_y_and_cuts_negative_structure_off() -> None:
    flat = torch.full((1, 3, 20, 20), 0.5)
    assert metrics.ssim(flat + 0.3 / 219, flat).item() == 1, "125.5 and 125.8 are one level"
    checks = ((torch.arange(20)[:, None] + torch.arange(20)) % 2).double().expand(1, 3, 20, 20)
    assert metrics.ssim(checks, 1 - checks).item() == 0
    c1 = (0.01 * 255) ** 2
    wanted = (2 * 16 * 235 + c1) / (16**2 + 235**2 + c1)  # black and white: nothing but luminance differs
    assert metrics.ssim(flat * 0, flat * 2).item() == pytest.approx(wanted, rel=1e-9)


def test_blur_is_the_gaussian_in_double_precision() -> None:
    point = torch.zeros(1, 1, 5, 7, dtype=torch.float64)
    point[..., 2, 3] = 1
    taps = np.exp(-(np.arange(-1, 2) ** 2) / (2 * 0.8**2))
    taps /= taps.sum()
    wanted = np.zeros((3, 5))
    wanted[:, 1:4] = np.outer(taps, taps)
    assert np.abs(metrics.gaussian_blur(point, 3, 0.8)[0, 0].numpy() - wanted).max() < 1e-15
    assert metrics.gaussian_blur(point.to("meta"), 3, 0.8).shape == (1, 1, 3, 5)


def test_identical_images() -> None:
    hr = images()[1]
    assert metrics.psnr(hr, hr).item() == pytest.approx(80.0)
    assert metrics.ssim(hr, hr).item() == pytest.approx(1.0)


def test_each_image_of_a_batch_is_measured_alone() -> None:
    sr, hr = images(3)
    for metric in (metrics.psnr, metrics.ssim):
        alone = [metric(sr[i : i + 1], hr[i : i + 1]).item() for i in range(3)]
        assert metric(sr, hr).tolist() == pytest.approx(alone, abs=1e-9)


def test_crop_leaves_the_border_out() -> None:
    sr, hr = images()
    sr = hr.clone()
    sr[..., :4, :] = 0
    assert metrics.psnr(*(metrics.crop_border(image, 4) for image in (sr, hr))).item() == pytest.approx(80.0)
    assert metrics.psnr(sr, hr).item() < 30


def test_smallest_images() -> None:
    """SSIM needs a window, PSNR a pixel after the crop."""
    assert metrics.ssim(torch.ones(1, 3, 11, 12), torch.ones(1, 3, 11, 12)).item() == 1
    for size in ((10, 30), (30, 10)):
        small = torch.ones(1, 3, *size)
        with pytest.raises(UserError, match=rf"^SSIM needs images of at least 11 pixels, .*\({size[0]}, {size[1]}\)$"):
            metrics.ssim(small, small)
    assert metrics.crop_border(torch.ones(3, 9, 20), 4).shape == (3, 1, 12)
    with pytest.raises(UserError, match="^an image of 20x8 is too small to crop 4 pixels"):
        metrics.crop_border(torch.ones(1, 3, 8, 20), 4)


def test_ssim_is_its_definition() -> None:
    """Window by window, in plain numpy."""
    sr, hr = images()
    weights = np.array([65.481, 128.553, 24.966])
    x, y = (np.round(np.tensordot(weights, i[0].numpy().astype(np.float64), 1) + 16) for i in (sr, hr))
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2
            cov = (window * a * b).sum() - ma * mb
            contrast = max(0.0, (2 * cov + 58.5225) / (va + vb + 58.5225))
            values.append(contrast * (2 * ma * mb + 6.5025) / (ma**2 + mb**2 + 6.5025))
    assert metrics.ssim(sr, hr).item() == pytest.approx(np.mean(values), abs=1e-6)


def test_halving_is_matlabs_imresize() -> None:
    """A linear ramp stays linear away from the border; a constant stays constant up to it."""
    ramp = torch.arange(32, dtype=torch.float64).expand(1, 1, 16, 32)
    assert halve(ramp)[0, 0, 3, 2:-2].tolist() == pytest.approx([0.5 + 2 * k for k in range(2, 14)])
    assert halve(torch.full((1, 1, 8, 8), 3.0).double()).tolist() == torch.full((1, 1, 4, 4), 3.0).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 2, r"^metrics take values in \[0, 1\]"),
        (lambda x: x - 0.2, r"^metrics take values in \[0, 1\], these lie in \[-0"),
        (lambda x: x * float("nan"), r"\[0, 1\]"),
        (lambda x: x[..., :-1], "different shapes"),
        (lambda x: x[0], r"^metrics take images of shape \(N, 3, H, W\), not \(3, 40, 48\)$"),
        (lambda x: x[:, :1], r"not \(1, 1, 40, 48\)$"),
    ],
)
def test_wrong_input_is_named(change, message: str) -> None:
    hr = images()[1]
    with pytest.raises(UserError, match=message):
        metrics.psnr(change(hr), hr if message.startswith("different") else change(hr))


def test_rounding_errors_at_both_ends_are_no_error() -> None:
    """Images from [-1, 1] come back as 1.0000001 and the like."""
    assert metrics.psnr(torch.full((1, 3, 4, 4), 1.00005), torch.ones(1, 3, 4, 4)).item() > 70
    assert metrics.psnr(torch.full((1, 3, 4, 4), -0.00005), torch.zeros(1, 3, 4, 4)).item() > 70


@pytest.mark.parametrize("level", [0.0, 100 / 255, 1.0])
def test_niqe_of_flat_images_does_not_exist(level: float) -> None:
    """Fewer than two blocks with texture have no covariance; other images of the batch keep their values."""
    textured = torch.rand(1, 3, 96, 288, generator=torch.Generator().manual_seed(0))
    flat, nearly = torch.full_like(textured, level), textured.clone()
    nearly[..., 80:] = level  # texture in the first of three blocks
    values = niqe(torch.cat([flat, nearly, textured])).tolist()
    assert math.isnan(values[0]) and math.isnan(values[1])
    assert values[2] == pytest.approx(niqe(textured).item())


@pytest.mark.skipif(find_spec("basicsr") is None, reason="basicsr does not build on Python 3.13")
def test_niqe_compares_with_its_authors_numbers() -> None:
    """The shipped file holds the numbers that basicsr ships, to the last bit."""
    path = Path(find_spec("basicsr").origin).parent / "metrics" / "niqe_pris_params.npz"
    with np.load(path) as stored:
        assert np.array_equal(pristine()[0].numpy(), stored["mu_pris_param"][0])
        assert np.array_equal(pristine()[1].numpy(), stored["cov_pris_param"])


def test_niqe_refuses_small_images() -> None:
    with pytest.raises(UserError, match="at least 96x192, this one is 100x97$"):
        niqe(torch.rand(1, 3, 97, 100))
