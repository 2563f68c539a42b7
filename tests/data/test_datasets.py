"""Training photographs: what a sample number gives, whatever is damaged, missing or asked for in another order."""

import io
import logging
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.data import photo as photo_module
from consissr.errors import UserError
from consissr.images.rgb8 import center_crop, decode
from tests.data.conftest import photo, photos_of, same


def test_sample_is_a_function_of_seed_and_number(folder):
    first, second = (photos_of(folder, seed=7, cache_mb=mb) for mb in (0, 64))
    forward = [first[n] for n in range(40)]
    assert all(same(second[n], forward[n]) for n in reversed(range(40)))
    with ThreadPoolExecutor(4) as pool:
        assert all(same(a, b) for a, b in zip(pool.map(second.__getitem__, range(40)), forward, strict=True))
    other = photos_of(folder, seed=8)
    assert not all(same(other[n], forward[n]) for n in range(8))


def test_epochs_are_different_permutations(folder):
    dataset = photos_of(folder)
    epochs = [[dataset[n]["name"] for n in range(8 * e, 8 * e + 8)] for e in range(3)]
    assert all(sorted(names) == sorted(epochs[0]) and len(set(names)) == 8 for names in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    orders = [[photos_of(folder, seed=seed)[n]["name"] for n in range(8)] for seed in (0, 1, 2)]
    assert epochs[0] == orders[0] != orders[1] != orders[2], "and so are the seeds'"
    crops = [dataset[n]["hq"] for n in range(16) if dataset[n]["name"] == "a/0.png"]
    assert not torch.equal(*crops)


def test_crops_and_flips_are_windows_of_the_image(folder):
    dataset = photos_of(folder, flips="both")
    seen = set()
    for n in range(64):
        sample = dataset[n]
        whole = np.asarray(Image.open(folder / sample["name"]))
        crop = ((sample["hq"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        for mirror in (False, True):
            for upend in (False, True):
                view = crop[:: -1 if upend else 1, :: -1 if mirror else 1]
                tops, lefts = np.nonzero((whole[:17, :29] == view[0, 0]).all(-1))
                if any((whole[t : t + 32, x : x + 32] == view).all() for t, x in zip(tops, lefts, strict=True)):
                    seen.add((mirror, upend))
                    break
            else:
                continue
            break
        else:
            pytest.fail(f"sample {n} is no window of {sample['name']}")
    assert len(seen) == 4


def test_every_window_can_be_drawn(tmp_path):
    y, x = np.mgrid[:34, :33]
    Image.fromarray(np.stack([x, y, y], -1).astype(np.uint8)).save(tmp_path / "p.png")
    dataset = photos_of(tmp_path, flips="none")
    corners = {tuple(((dataset[n]["hq"][:2, 0, 0] + 1) * 127.5).round().int().tolist()) for n in range(200)}
    assert corners == {(left, top) for left in range(2) for top in range(3)}


def test_photographs_smaller_than_the_crop_name_the_setting(folder):
    with pytest.raises(UserError, match=r"60x48 pixels are fewer than a 64-pixel crop needs; check .*data\.crop"):
        photos_of(folder, crop=64)[0]


def test_probabilities(folder):
    paths = [str(folder / "a"), str(folder / "b")]
    dataset = photos_of(*paths, probabilities=[3, 1])
    names = [dataset[n]["name"] for n in range(400)]
    assert abs(sum(not name.startswith("c/") for name in names) / 400 - 0.75) < 0.08
    assert len(set(names)) == 8


def test_center_crop_keeps_the_short_side():
    ramp = np.broadcast_to(np.linspace(0, 255, 80)[None, :, None], (200, 80, 3)).astype(np.uint8)
    crop = center_crop(ramp, 32)  # 80 -> 40 by halving -> 32 bicubic
    assert crop.shape == (32, 32, 3)
    np.testing.assert_allclose(crop[16, :, 0], (np.arange(32) + 0.5) * 255 / 32, atol=4)
    bands = np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 40)[:, None, None].repeat(40, 1).repeat(3, 2)
    assert (center_crop(bands, 40)[2:-2] == 100).all()  # the middle fifth of 200 rows
    assert center_crop(ramp[:, :20], 32).shape == (32, 32, 3)  # a small image is enlarged


def test_damaged_images_are_replaced_counted_and_named_once(folder, caplog):
    (folder / "a/0.png").write_bytes(b"no image at all")
    data = (folder / "b/c/5.png").read_bytes()
    (folder / "b/c/5.png").write_bytes(data[: len(data) // 2])
    photo(0, 20, 20).save(folder / "a/small.png")
    dataset = photos_of(folder)
    with caplog.at_level(logging.WARNING):
        names = {dataset[n]["name"] for n in range(27)}
    assert names == {f"a/{i}.png" for i in (1, 2, 3)} | {f"b/c/{i}.png" for i in (4, 6, 7)}
    assert len(dataset.skipped) == 3 and len(caplog.records) == 3
    reasons = {key.rsplit("/", 1)[1]: reason for key, reason in dataset.skipped.items()}
    assert "not an image" in reasons["0.png"]
    assert "20x20" in reasons["small.png"] and "32" in reasons["small.png"]
    again = photos_of(folder)
    assert all(same(again[n], dataset[n]) for n in range(27))


def test_folder_deleted_in_mid_run(folder):
    dataset = photos_of(folder, cache_mb=0)
    dataset[0]
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="No such file.*data.paths"):
        dataset[1]


def test_a_read_that_fails_once_changes_nothing(folder, monkeypatch):
    """A network's hiccup: the read is tried again, and the file again when it is next drawn."""
    wanted = [photos_of(folder, cache_mb=0)[n] for n in range(16)]
    monkeypatch.setattr(photo_module, "WAITS", (0, 0))
    usual, calls, failing = photo_module.PhotoFile._read, Counter(), {"a/1.png": 2, "b/c/5.png": 3}

    def hiccup(self):
        calls[self.name] += 1
        if calls[self.name] <= failing.get(self.name, 0):
            raise OSError(5, "Input/output error")
        return usual(self)

    monkeypatch.setattr(photo_module.PhotoFile, "_read", hiccup)
    dataset = photos_of(folder, cache_mb=0)
    got = [dataset[n] for n in range(16)]
    differ = [n for n in range(16) if not same(got[n], wanted[n])]
    assert [wanted[n]["name"] for n in differ] == ["b/c/5.png"] and differ[0] < 8  # in the second epoch it is back
    assert [label.rsplit("/", 1)[1] for label in dataset.skipped] == ["5.png"]


def test_jpegs_that_shrink_are_decoded_small(tmp_path):
    """The same picture, but for rounding, from a fraction of the pixels."""
    y, x = np.mgrid[:480, :720]
    smooth = np.stack([127 + 90 * np.sin(x / 60), 127 + 90 * np.cos(y / 50), (x + y) / 5], -1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "p.jpg", quality=95, subsampling=0)
    assert decode((tmp_path / "p.jpg").read_bytes(), least=100).shape == (120, 180, 3)
    dataset = photos_of(tmp_path, crop=100, crop_rule="center", flips="none")
    got = (dataset[0]["hq"] + 1) * 127.5
    assert np.abs(got.permute(1, 2, 0).numpy() - center_crop(smooth, 100)).mean() < 1.5


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_modes(mode):
    picture = Image.fromarray(np.full((8, 6), 40000, dtype=np.uint16)) if mode == "I;16" else photo(0, 6, 8)
    buffer = io.BytesIO()
    if mode not in ("I;16", "RGB"):
        picture = picture.convert(mode)
    picture.save(buffer, "TIFF")
    pixels = decode(buffer.getvalue())
    assert pixels.shape == (8, 6, 3) and pixels.dtype == np.uint8
    if mode == "I;16":
        assert (pixels == round(40000 / 257)).all()


def test_exif_rotation():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(0, 6, 8).save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue()).shape == (6, 8, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"paths": ["/nowhere"]}, "/nowhere does not exist"),
        ({"paths": []}, "data.paths"),
        ({"probabilities": [0.5, 0.5]}, "2 entries for 1"),
        ({"probabilities": [0.0]}, "not all 0"),
        ({"probabilities": [float("nan")]}, "probabilities is .nan."),
        ({"lq_paths": ["x"], "scale": 3}, "data.scale is 3"),
        ({"lq_paths": ["x"], "pair_names": ["NAME_HR", "LR"]}, "data.pair_names is"),
        ({"lq_paths": ["x"], "crop_rule": "center"}, "must be 'random'"),
        ({"lq_paths": ["x"], "crop": 30}, "does not divide"),
    ],
)
def test_wrong_settings_are_named(folder, settings, message):
    with pytest.raises(UserError, match=message):
        photos_of(*settings.get("paths", [folder]), **{k: v for k, v in settings.items() if k != "paths"})


def test_shrunk_crops_show_more_of_the_photograph(tmp_path):
    x = np.add.outer(np.zeros(96, int), np.arange(96)).astype(np.uint8)  # a ramp: its step tells the factor
    Image.fromarray(np.repeat(x[..., None], 3, 2)).save(tmp_path / "ramp.png")
    dataset = photos_of(tmp_path, flips="none", shrink=0.5)
    factors = []
    for n in range(40):
        row = (dataset[n]["hq"][0, 16] + 1) * 127.5
        factors.append(float(28 / (row[30] - row[2])))  # pixels of the crop per level, that is per source pixel
    assert 0.48 < min(factors) < 0.6 and 0.9 < max(factors) < 1.06
    with pytest.raises(UserError, match="data.shrink is 0"):
        photos_of(tmp_path, shrink=0)
    with pytest.raises(UserError, match="random crops"):
        photos_of(tmp_path, shrink=0.5, crop_rule="center")
