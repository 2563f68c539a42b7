"""The check's figures and its baselines."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from consissr.errors import UserError
from consissr.evaluation import check, flat
from consissr.evaluation.folders import read_image


def half_flat() -> torch.Tensor:
    """64x160: a quiet left half and a busy right half."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 64, 160, generator=generator).expand(1, 3, 64, 160)
    strength = torch.full((160,), 0.002)
    strength[80:] = 0.1
    return (0.5 + noise * strength).clamp(0, 1)


def test_flat_blocks_are_hr_s_flattest_tenth() -> None:
    hr = half_flat()
    assert flat.block_std(hr).shape == (4 * 10,)
    assert flat.flat_block_ratio([hr], [hr]) == 1.0
    louder = hr.clone()
    louder[..., 80:] = 0.5  # busy blocks do not count
    assert flat.flat_block_ratio([louder], [hr]) == 1.0
    rough = 0.5 + (hr - 0.5) * torch.where(torch.arange(160) < 80, 3.0, 1.0)
    assert flat.flat_block_ratio([rough], [hr]) == pytest.approx(3.0, rel=1e-4)


def test_flat_blocks_pool_over_images() -> None:
    hr = half_flat()
    busy = hr[..., 80:]
    louder = (0.5 + (busy - 0.5) * 0.5).clamp(0, 1)
    pooled = flat.flat_block_ratio([hr[..., :80], louder], [hr[..., :80], busy])
    assert pooled == 1.0, "the flattest tenth lies wholly in the quiet image"
    with pytest.raises(UserError, match="do not match"):
        flat.flat_block_ratio([hr], [busy])


@pytest.mark.filterwarnings("error")
def test_flat_blocks_of_constant_photographs_do_not_exist() -> None:
    assert math.isnan(flat.flat_block_ratio([half_flat()], [torch.full((1, 3, 64, 160), 0.5)]))


def test_baselines() -> None:
    lr = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    smooth, grainy = check.bicubic_baseline(lr), check.bicubic_plus_grain(lr, seed=3)
    assert smooth.shape == (1, 3, 96, 128) and ((smooth * 255).round() / 255 == smooth).all()
    inner = (smooth > 0.1) & (smooth < 0.9)
    grain = (grainy - smooth)[inner] * 255
    assert grain.std().item() == pytest.approx(check.GRAIN, rel=0.1)
    assert torch.equal(grainy, check.bicubic_plus_grain(lr, seed=3))
    assert not torch.equal(grainy, check.bicubic_plus_grain(lr, seed=4))


def test_rows(sets: dict[str, Path], tmp_path: Path) -> None:
    rows = check.check({"good": sets["good"]}, sets["hr"], sets["lr"], tmp_path / "out", {"good": sets["bad"]}, jobs=1)
    assert list(rows) == ["bicubic", "bicubic+grain", "good"]
    smooth, grainy, good = (dict(zip(check.TITLES, row, strict=True)) for row in rows.values())
    assert grainy["flat-block ratio"] > smooth["flat-block ratio"] and grainy["PSNR-Y dB"] < smooth["PSNR-Y dB"]
    drop = "wrong-condition drop dB"
    assert good[drop] > 10 and smooth[drop] != smooth[drop]
    with pytest.raises(UserError, match="'bicubic' names a row of the check itself"):
        check.check({"bicubic": sets["good"]}, sets["hr"], sets["lr"], tmp_path / "out", jobs=1)
    text = check.as_text(rows)
    assert f"{good[drop]:.2f}" in text and "| bicubic+grain |" in text
    assert {path.name for path in (tmp_path / "out" / "baselines").rglob("*.png")} == {"a.png", "b.png", "c.png"}


def test_baselines_are_of_the_given_images(sets: dict[str, Path], tmp_path: Path) -> None:
    """Under one folder: other images of the same names, another scale, fewer names; what is there is kept."""
    lr, out = sets["lr"], tmp_path / "out"
    first = check.write_baselines(lr, out)["bicubic"]
    times = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert check.write_baselines(lr, out)["bicubic"] == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == times
    (lr / "a.png").write_bytes((lr / "b.png").read_bytes())
    (lr / "c.png").unlink()
    folder = check.write_baselines(lr, out)["bicubic"]
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png"]
    smaller = check.write_baselines(lr, out, scale=2)["bicubic"]
    assert read_image(smaller / "a.png").shape == (1, 3, 48, 96)


def test_folders_that_do_not_fit_are_named(sets: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--wrong-condition x: no --sr folder of that name; write NAME=DIR"):
        check.check({"good": sets["good"]}, sets["hr"], sets["lr"], tmp_path / "out", {"x": sets["bad"]}, jobs=1)
    with pytest.raises(UserError, match="its images are smaller than those of LR .*: were the two folders exchanged"):
        check.scale_between(sets["hr"], sets["lr"])
    shutil.copy(sets["hr"] / "b.png", sets["lr"] / "b.png")
    with pytest.raises(UserError, match="b has size 192x96, LR's is 192x96: not 4 times as large"):
        check.check({"good": sets["good"]}, sets["hr"], sets["lr"], tmp_path / "out", jobs=1)
    (sets["lr"] / "a.png").rename(sets["lr"] / "z.png")
    with pytest.raises(UserError, match="lacks 1 of the 3 images"):
        check.check({"good": sets["good"]}, sets["hr"], sets["lr"], tmp_path / "out", jobs=1)


def test_mean_change(tmp_path: Path) -> None:
    for name, level in (("one", 100), ("other", 103)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), (level, 100, 100)).save(tmp_path / name / "a.png")
        Image.new("RGB", (8, 2), (7, 7, 7)).save(tmp_path / name / "b.png")
    assert check.mean_change(tmp_path / "one", tmp_path / "other") == pytest.approx(0.5)
    assert check.mean_change(tmp_path / "one", tmp_path / "one") == 0


def test_low_quality_images_with_an_alpha_channel(sets: dict[str, Path], tmp_path: Path) -> None:
    plain = check.write_baselines(sets["lr"], tmp_path / "plain")["bicubic"]
    for path in sets["lr"].iterdir():
        Image.open(path).convert("RGBA").save(path)
    opaque = check.write_baselines(sets["lr"], tmp_path / "opaque")["bicubic"]
    assert Image.open(opaque / "a.png").mode == "RGB" and check.mean_change(plain, opaque) == 0
