"""Own low-quality partners of photographs: by name, at their scale, beside images to degrade."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from consissr.errors import UserError
from tests.data.conftest import photo, photos_of


def test_pairs_stay_aligned(tmp_path):
    for kind, side in (("hq", 96), ("lq", 24)):
        y, x = (np.mgrid[:side, :side] + 0.5) / side * 255
        (tmp_path / kind).mkdir()
        Image.fromarray(np.stack([x, y, x], -1).round().astype(np.uint8)).save(tmp_path / kind / "p.png")
    dataset = photos_of(tmp_path / "hq", flips="both", lq_paths=[str(tmp_path / "lq")])
    for n in range(20):
        sample = dataset[n]
        assert sample["lq"].shape == sample["hq"].shape == (3, 32, 32)
        assert (sample["hq"] - sample["lq"])[:, 4:-4, 4:-4].abs().max() < 0.02  # one HQ pixel is a step of 0.021


@pytest.mark.parametrize("scale", [1, 2])
def test_pairs_of_other_scales(tmp_path, scale):
    """Partners of the same size are taken as they are; of half the size they are enlarged."""
    y, x = (np.mgrid[:96, :96] + 0.5) / 96 * 255
    whole = Image.fromarray(np.stack([x, y, x], -1).round().astype(np.uint8))
    whole.save(tmp_path / "Canon_001_HR.png")
    part = np.clip(np.asarray(whole.resize((96 // scale, 96 // scale), Image.Resampling.BOX)).astype(int) + 9, 0, 255)
    Image.fromarray(part.astype(np.uint8)).save(tmp_path / "Canon_001_LR4.png")
    here = str(tmp_path)
    with pytest.raises(UserError, match=r"use data.pair_names=\[NAME_HR,NAME_LR4\]"):
        photos_of(here, lq_paths=[here], scale=scale, pair_names=["NAME_HR", "NAME_LR"])
    names = ["NAME_HR", "NAME_LR4"]
    dataset = photos_of(here, lq_paths=[here], scale=scale, pair_names=names)
    assert len(dataset) == 1
    for n in range(8):
        sample = dataset[n]
        inner = (sample["hq"] < 0.9).all(0)[4:-4, 4:-4]
        difference = (sample["lq"] - sample["hq"])[:, 4:-4, 4:-4][:, inner] * 127.5
        assert (difference - 9).abs().max() < (0.01 if scale == 1 else 2)


def test_pairs_in_the_layout_of_lsdir(folder, tmp_path):
    for file in folder.rglob("*.png"):
        partner = tmp_path / "LR/X4" / file.relative_to(folder).with_stem(file.stem + "x4")
        partner.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((15, 12)).save(partner)
    dataset = photos_of(folder, lq_paths=[str(tmp_path / "LR/X4")], pair_names=["NAME", "NAMEx4"])
    photo, partner = dataset.pair(5)
    assert (photo.name, partner.name) == ("b/c/5.png", "b/c/5x4.png")


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "relative"])
def test_pairs_named_by_text_lists(folder, tmp_path, whole):
    """Names are compared below the folder that a list's images share."""
    lists = []
    for kind in ("HR", "LR"):
        shutil.copytree(folder, tmp_path / kind)
        lists.append(tmp_path / f"{kind}.txt")
        files = sorted((tmp_path / kind).rglob("*.png"))
        lists[-1].write_text("".join(f"{file if whole else file.relative_to(tmp_path)}\n" for file in files))
    for partners in (lists[1], tmp_path / "LR"):
        dataset = photos_of(lists[0], lq_paths=[str(partners)])
        for n in range(8):
            photo, partner = (str(file.name) for file in dataset.pair(n))
            assert photo.endswith(partner.replace(f"{tmp_path}/", "").replace("LR/", "")), partners


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "relative"])
def test_how_names_in_text_lists_differ_is_told(folder, tmp_path, whole):
    lists = []
    for kind, end in (("HR", ""), ("LR", "x4")):
        lists.append(tmp_path / f"{kind}.txt")
        shutil.copytree(folder, tmp_path / kind)
        files = [file.rename(file.with_stem(file.stem + end)) for file in list((tmp_path / kind).rglob("*.png"))]
        lists[-1].write_text("".join(f"{file if whole else file.relative_to(tmp_path)}\n" for file in files))
    with pytest.raises(UserError, match=r"8 of 8 images have no single partner.*: use data.pair_names=\[NAME,NAMEx4\]"):
        photos_of(lists[0], lq_paths=[str(lists[1])])


def test_names_on_two_drives_are_compared_as_they_are(folder, tmp_path, monkeypatch):
    """Windows' D:/hq and E:/lq share no folder, which os.path tells by a ValueError."""

    def two_drives(paths):
        raise ValueError("Paths don't have the same drive")

    (tmp_path / "hq.txt").write_text("".join(f"{file}\n" for file in folder.rglob("*.png")))
    monkeypatch.setattr(os.path, "commonpath", two_drives)
    with pytest.raises(UserError, match="8 of 8 images have no single partner"):
        photos_of(tmp_path / "hq.txt", lq_paths=[str(folder)])


def test_pairs_beside_images_without(folder, tmp_path):
    """Real pairs and images to degrade, drawn as their probabilities say."""
    for kind, side in (("hq", 96), ("lq", 24)):
        (tmp_path / kind).mkdir()
        photo(0, side, side).save(tmp_path / kind / "p.png")
    paths, partners = [str(folder), str(tmp_path / "hq")], ["", str(tmp_path / "lq")]
    dataset = photos_of(*paths, lq_paths=partners, probabilities=[1, 3])
    samples = [dataset[n] for n in range(200)]
    assert all(("lq" in sample) == (sample["name"] == "p.png") for sample in samples)
    assert 0.65 < sum("lq" in sample for sample in samples) / 200 < 0.85


def test_pairs_without_partner_or_of_wrong_size(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "lq")
    dataset = photos_of(folder, lq_paths=[str(tmp_path / "lq")])
    with pytest.raises(UserError, match="not 4 times its partner's 60x48"):
        dataset[0]
    (tmp_path / "lq/a/2.png").unlink()
    with pytest.raises(UserError, match="1 of 8 images have no single partner.*a/2.png"):
        photos_of(folder, lq_paths=[str(tmp_path / "lq")])
