"""Pairing: everything that does not pair is named in one clear line."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from consissr.errors import UserError
from consissr.evaluation.folders import Listing, list_images, list_runs, pair, parse_methods, read_image
from consissr.evaluation.provenance import fingerprint


def problems(sets: dict[str, Path], **kwargs) -> list[str]:
    with pytest.raises(UserError) as caught:
        pair({"good": sets["good"]}, sets["hr"], kwargs.get("lr"))
    return str(caught.value).splitlines()


def test_pairs_by_name(sets: dict[str, Path]) -> None:
    pairs = pair({"good": sets["good"], "runs": sets["runs"]}, sets["hr"], sets["lr"])
    assert pairs.images == ["a", "b", "c"]
    assert [len(method.runs) for method in pairs.methods] == [1, 3]
    assert pairs.lr["a"].name == "a.png" and pairs.sizes["a"] == (192, 96)


def test_missing_and_surplus_names(sets: dict[str, Path]) -> None:
    (sets["good"] / "b.png").rename(sets["good"] / "bb.png")
    lines = problems(sets)
    assert len(lines) == 2
    assert "lacks 1 of the 3 images" in lines[0] and lines[0].endswith(": b")
    assert "without a partner" in lines[1] and lines[1].endswith(": bb")


def test_wrong_size(sets: dict[str, Path], save: Callable[..., Path]) -> None:
    save(sets["good"], {"c": np.zeros((48, 96, 3), np.uint8)})
    (line,) = problems(sets)
    assert "c has size 96x48, but 192x96" in line


def test_jpeg_among_png(sets: dict[str, Path]) -> None:
    Image.open(sets["good"] / "a.png").save(sets["good"] / "a.jpg")
    (sets["good"] / "a.png").unlink()
    (line,) = problems(sets)
    assert "a is JPEG among PNG files" in line


def test_jpeg_content_under_a_png_name(sets: dict[str, Path]) -> None:
    Image.open(sets["good"] / "a.png").save(sets["good"] / "a.png", "JPEG")
    (line,) = problems(sets)
    assert "JPEG among PNG" in line


def test_unreadable_file(sets: dict[str, Path]) -> None:
    (sets["good"] / "b.png").write_bytes(b"not an image")
    (line,) = problems(sets)
    assert "b.png: not an image that can be read" in line


def test_an_image_too_large_to_be_trusted(sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)  # half of these images
    assert all(".png: has more than 0 million pixels" in line for line in problems(sets))


def test_truncated_file_is_named_when_it_is_read(sets: dict[str, Path]) -> None:
    path = sets["good"] / "b.png"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="b.png"):
        read_image(path)


def test_missing_lr(sets: dict[str, Path]) -> None:
    (sets["lr"] / "a.png").unlink()
    (line,) = problems(sets, lr=sets["lr"])
    assert line.startswith("LR") and line.endswith(": a")


def test_results_in_jpeg_are_noted(sets: dict[str, Path]) -> None:
    for path in list(sets["good"].iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    assert "JPEG" in pair({"good": sets["good"]}, sets["hr"], None).methods[0].note


def test_a_gap_in_the_runs(sets: dict[str, Path]) -> None:
    shutil.rmtree(sets["runs"] / "sample1")
    with pytest.raises(UserError, match="without a gap"):
        list_runs(sets["runs"])


def test_images_beside_the_runs(sets: dict[str, Path]) -> None:
    shutil.copytree(sets["good"], sets["runs"] / "other")
    with pytest.raises(UserError, match="beside its runs sample0, ...: other/a.png, other/b.png, other/c.png; move"):
        list_runs(sets["runs"])


def test_step_pictures_are_not_results(sets: dict[str, Path], save: Callable[..., Path]) -> None:
    save(sets["good"] / "a.png_steps", {"00_t999": np.zeros((8, 8, 3), np.uint8)})
    assert pair({"good": sets["good"]}, sets["hr"], None).images == ["a", "b", "c"]


def test_no_image_is_passed_over(sets: dict[str, Path], tmp_path: Path) -> None:
    """A folder that is called like step pictures, one that is a link, and formats that are only read."""
    good = sets["good"]
    (good / "stone_steps").mkdir()
    (good / "a.png").rename(good / "stone_steps" / "a.png")
    (tmp_path / "real").mkdir()
    (good / "b.png").rename(tmp_path / "real" / "b.png")
    (good / "sub").symlink_to(tmp_path / "real")
    for place in (good, tmp_path / "real"):
        (place / "again").symlink_to(good)  # nor is any listed twice
    Image.open(good / "c.png").save(good / "c.ppm")
    (good / "c.png").unlink()
    assert sorted(list_images(good)) == ["c", "stone_steps/a", "sub/b"]


def test_names_of_methods(tmp_path: Path) -> None:
    (folder := tmp_path / "gamma=10").mkdir()
    assert parse_methods([str(folder), f"A(b=1)={folder}"]) == {"gamma=10": folder, "A(b=1)": folder}
    assert parse_methods(["x/one", "B=y"]) == {"one": Path("x/one"), "B": Path("y")}
    assert parse_methods(["TALA(gamma=10)=x"]) == {"TALA(gamma=10)": Path("x")}
    with pytest.raises(UserError, match="NAME=FOLDER"):
        parse_methods(["x/one", "y/one"])


def test_eight_bit_samples_are_exact(sets: dict[str, Path]) -> None:
    levels = np.asarray(Image.open(sets["hr"] / "a.png"))
    assert (read_image(sets["hr"] / "a.png")[0].permute(1, 2, 0).numpy() == levels / np.float32(255)).all()


def test_sizes_are_those_after_rotation(sets: dict[str, Path]) -> None:
    """A picture that its EXIF tag turns pairs with an upright one; Pillow turns TIFF's sides itself."""
    upright = Image.open(sets["good"] / "a.png")
    turned = upright.transpose(Image.Transpose.ROTATE_90)  # orientation 6 says: turn clockwise to see it
    exif = Image.Exif()
    exif[0x0112] = 6
    (sets["good"] / "a.png").unlink()
    for ending in (".tif", ".webp"):
        folder = sets["good"].with_name(f"turned{ending}")
        folder.mkdir()
        turned.save(folder / f"a{ending}", exif=exif)
        assert Listing(folder).sizes == {"a": upright.size}
        assert read_image(folder / f"a{ending}").shape[2:] == upright.size[::-1]


def test_listing_decodes_no_picture(sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are listed several times before anything is computed."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels are decoded"))
    assert len(Listing(sets["good"]).sizes) == 3


def test_what_is_hidden_is_no_image(sets: dict[str, Path]) -> None:
    """Jupyter's .ipynb_checkpoints, macOS' ._a.png."""
    (sets["good"] / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/a-checkpoint.png", "._a.png"):
        (sets["good"] / name).write_bytes((sets["good"] / "a.png").read_bytes())
    assert sorted(list_images(sets["good"])) == ["a", "b", "c"]


def test_a_sub_folder_that_cannot_be_read_is_an_error(sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images would be left out of every measure, and nobody told. (Root, as whom tests may run, may read all.)"""
    (sets["good"] / "locked").mkdir()
    scandir = os.scandir

    def refusing(path: str | Path) -> Iterator[os.DirEntry]:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"good/locked cannot be read \(Permission denied\)"):
        list_images(sets["good"])


def test_a_hidden_folder_that_a_link_shows_counts(sets: dict[str, Path]) -> None:
    """Its images are listed, as infer.py restores them, and what is kept of them knows when they change."""
    album = sets["good"] / ".store" / "album"
    album.mkdir(parents=True)
    (album / "x.png").write_bytes((sets["good"] / "a.png").read_bytes())
    (sets["good"] / "album").symlink_to(album)
    assert sorted(list_images(sets["good"])) == ["a", "album/x", "b", "c"]
    before = fingerprint(sets["good"])
    (album / "x.png").write_bytes((sets["good"] / "b.png").read_bytes())
    assert fingerprint(sets["good"]) != before
