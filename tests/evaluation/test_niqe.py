"""NIQE's parts against their equations (Mittal et al. 2012), in plain Python and numpy."""

import json
from math import gamma

import numpy as np
import pytest
import torch

from consissr.errors import UserError
from consissr.evaluation import niqe as parts


def test_halving_is_the_antialiased_cubic(rng) -> None:
    """MATLAB's imresize by one half: the cubic of a = -0.5, stretched to twice its width, over mirrored borders."""

    def cubic(x: float) -> float:
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2

    taps = [cubic(abs(k - 3.5) / 2) / 2 for k in range(8)]
    assert sum(taps) == 1
    image = rng.random((6, 10)) * 255
    padded = np.pad(image, 3, mode="symmetric")
    rows = sum(tap * padded[k : k + 6 : 2] for k, tap in enumerate(taps))
    wanted = sum(tap * rows[:, k : k + 10 : 2] for k, tap in enumerate(taps))
    assert np.abs(parts.halve(torch.from_numpy(image)[None, None])[0, 0].numpy() - wanted).max() < 1e-12


def test_local_contrast_is_divided_out(rng) -> None:
    """(I - mu) / (sigma + 1) with a 7 x 7 Gaussian of deviation 7 / 6, edges repeated (Eq. 1 to 3)."""
    image = rng.integers(0, 256, (5, 6)).astype(float)
    taps = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    patches = np.lib.stride_tricks.sliding_window_view(np.pad(image, 3, mode="edge"), (7, 7))
    mean = (patches * window).sum((2, 3))
    deviation = np.sqrt((patches**2 * window).sum((2, 3)) - mean**2)
    result = parts.normalized(torch.from_numpy(image)[None, None])[0, 0].numpy()
    assert np.abs(result - (image - mean) / (deviation + 1)).max() < 1e-9


def test_fit_of_the_asymmetric_gaussian_by_hand() -> None:
    """Half zeros, half +-1: mean |x| squared over mean x^2 is 1/2, the Laplace distribution's (shape 1)."""
    alpha, left, right = parts.asymmetric_gaussian(torch.tensor([[0, 0, 1, -1]], dtype=torch.float64))
    assert alpha.item() == pytest.approx(1, abs=1e-9)
    assert (left.item(), right.item()) == pytest.approx((0.5**0.5, 0.5**0.5), rel=1e-9)  # Gamma(1) / Gamma(3) = 1/2
    # -3 and 6: gamma = 1/2, and the ratio (9/4)^2 / (45/4) times (gamma^3 + 1) (gamma + 1) / (gamma^2 + 1)^2 = 0.486.
    alpha, left, right = (x.item() for x in parts.asymmetric_gaussian(torch.tensor([[0, 0, 6, -3]]).double()))
    moment = {a: gamma(2 / a) ** 2 / (gamma(1 / a) * gamma(3 / a)) for a in (alpha - 5e-4, alpha + 5e-4)}
    assert moment[alpha - 5e-4] < 0.486 < moment[alpha + 5e-4], "the nearest of the table's shapes, 0.001 apart"
    scale = (gamma(1 / alpha) / gamma(3 / alpha)) ** 0.5
    assert (left, right) == pytest.approx((3 * scale, 6 * scale), rel=1e-9)
    ends = [torch.ones(1, 4).double() * torch.tensor([1, -1, 1, -1]), torch.eye(100).double()[:1] - 1e-9]
    assert [parts.asymmetric_gaussian(x)[0].item() for x in ends] == pytest.approx([10, 0.2], abs=1e-9)


def test_each_side_has_its_own_root_mean_square() -> None:
    """-1 and -3 give sqrt(5), three times 2 gives 2; both are scaled by sqrt(Gamma(1/a) / Gamma(3/a))."""
    samples = torch.tensor([[-1.0, -3.0, 2.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    alpha, left, right = (value.item() for value in parts.asymmetric_gaussian(samples))
    scale = (gamma(1 / alpha) / gamma(3 / alpha)) ** 0.5
    assert (left, right) == pytest.approx((5**0.5 * scale, 2 * scale), rel=1e-12)


def test_the_pristine_statistics_are_read_as_they_were_written(root) -> None:
    stored = json.loads((root / "consissr" / "evaluation" / "niqe_pristine.json").read_text(encoding="utf-8"))
    mean, covariance = parts.pristine()
    assert mean.dtype == covariance.dtype == torch.float64 and mean.tolist() == stored["mean"]
    assert [row[: i + 1] for i, row in enumerate(covariance.tolist())] == stored["covariance"]
    assert torch.equal(covariance, covariance.T)


def test_too_small_an_image_is_named() -> None:
    with pytest.raises(UserError, match="^NIQE needs an image of at least 96x192, this one is 191x100$"):
        parts.niqe(torch.rand(1, 3, 100, 191))


def test_features_of_each_block(rng) -> None:
    """Shape and mean scale; then of products with the four neighbours: shape, mean (Eq. 8), left and right scale."""
    gray = torch.from_numpy(rng.integers(0, 256, (1, 1, 12, 18))).double()
    result = parts.block_features(gray, 6)
    assert result.shape == (1, 6, 18)
    whole = parts.normalized(gray)[0, 0].numpy()
    for block, (top, left) in enumerate((top, left) for top in (0, 6) for left in (0, 6, 12)):
        x = whole[top : top + 6, left : left + 6]
        alpha, low, high = (v.item() for v in parts.asymmetric_gaussian(torch.from_numpy(x.copy())))
        wanted = [alpha, (low + high) / 2]
        for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
            product = torch.from_numpy(x * np.roll(x, shift, (0, 1)))
            alpha, low, high = (v.item() for v in parts.asymmetric_gaussian(product))
            wanted += [alpha, (high - low) * gamma(2 / alpha) / gamma(1 / alpha), low, high]
        assert result[0, block].tolist() == pytest.approx(wanted, rel=1e-9), block


def test_distance_to_the_pristine_photographs(rng) -> None:
    """sqrt(d^T pinv((S1 + S2) / 2) d) (Eq. 10); an undefined feature is left out of the mean, its block out of S2."""
    mean, covariance = (x.numpy() for x in parts.pristine())
    assert mean.shape == (36,) and covariance.shape == (36, 36)
    assert np.array_equal(covariance, covariance.T) and np.linalg.eigvalsh(covariance).min() > 0
    blocks = mean + rng.normal(0, 0.1, (4, 36))
    blocks[3, 5] = np.nan
    off = mean - np.nanmean(blocks, 0)
    wanted = np.sqrt(off @ np.linalg.pinv((covariance + np.cov(blocks[:3].T)) / 2) @ off)
    assert parts.distance(torch.from_numpy(blocks)).item() == pytest.approx(wanted, rel=1e-9)
    assert (
        parts.distance(torch.from_numpy(blocks[1:])).isfinite() and parts.distance(torch.from_numpy(blocks[2:])).isnan()
    )


def test_niqe_joins_its_parts() -> None:
    """Grey in whole levels, blocks of 96 and, at half the size, of 48; what does not fill a block is cut off."""
    image = torch.rand(2, 3, 99, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    red, green, blue = (image[:, :, :96, :192] * 255).round().unbind(1)
    gray = ((299 * red + 587 * green + 114 * blue) / 1000).round()[:, None]
    features = torch.cat([parts.block_features(gray, 96), parts.block_features(parts.halve(gray), 48)], 2)
    wanted = [parts.distance(blocks).item() for blocks in features]
    assert parts.niqe(image).tolist() == pytest.approx(wanted, rel=1e-9)


def test_niqe_is_the_same_with_any_number_of_threads() -> None:
    """Also where the image is flat, whose features hang on the sign of rounding errors."""
    image = torch.rand(1, 3, 192, 288, generator=torch.Generator().manual_seed(0))
    image[..., :60] = 200 / 255
    before, values = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            values.append(parts.niqe(image).item())
    finally:
        torch.set_num_threads(before)
    assert values[0] == values[1] == values[2]
