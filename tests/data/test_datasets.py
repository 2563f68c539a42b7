"""Training photographs: what a sample number gives, whatever is damaged, missing or asked for in another order."""

import io
import logging
import shutil
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.data import listing
from consissr.data import photo as photo_module
from consissr.data.datasets import PhotoDataset, center_crop
from consissr.data.listing import MANY_SHARDS, list_photos, read_shard
from consissr.data.photo import decode
from consissr.errors import UserError


def photo(seed: int, width: int = 60, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def no_cache(tmp_path_factory, monkeypatch):
    """Nothing is remembered of other tests' shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    """Eight images in two sub-folders, and a file that is none."""
    root = tmp_path / "photos"
    for i in range(8):
        path = root / ("a" if i < 4 else "b/c") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(path)
    (root / "notes.txt").write_text("not a list\n")
    return root


def same(a: dict, b: dict) -> bool:
    return torch.equal(a["hq"], b["hq"]) and a["name"] == b["name"] and a["seed"] == b["seed"]


# --- order ---


def test_sample_is_a_function_of_seed_and_number(folder):
    first, second = (PhotoDataset([str(folder)], crop=32, seed=7, cache_mb=mb) for mb in (0, 64))
    forward = [first[n] for n in range(40)]
    assert all(same(second[n], forward[n]) for n in reversed(range(40)))
    with ThreadPoolExecutor(4) as pool:
        assert all(same(a, b) for a, b in zip(pool.map(second.__getitem__, range(40)), forward, strict=True))
    other = PhotoDataset([str(folder)], crop=32, seed=8)
    assert not all(same(other[n], forward[n]) for n in range(8))


def test_epochs_are_different_permutations(folder):
    dataset = PhotoDataset([str(folder)], crop=32, seed=0)
    epochs = [[dataset[n]["name"] for n in range(8 * e, 8 * e + 8)] for e in range(3)]
    assert all(sorted(names) == sorted(epochs[0]) and len(set(names)) == 8 for names in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    crops = [dataset[n]["hq"] for n in range(16) if dataset[n]["name"] == "a/0.png"]
    assert not torch.equal(*crops)


def test_crops_and_flips_are_windows_of_the_image(folder):
    dataset = PhotoDataset([str(folder)], crop=32, seed=0, flips="both")
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
    dataset = PhotoDataset([str(tmp_path)], crop=32, seed=0, flips="none")
    corners = {tuple(((dataset[n]["hq"][:2, 0, 0] + 1) * 127.5).round().int().tolist()) for n in range(200)}
    assert corners == {(left, top) for left in range(2) for top in range(3)}


def test_probabilities(folder):
    paths = [str(folder / "a"), str(folder / "b")]
    dataset = PhotoDataset(paths, crop=32, seed=0, probabilities=[3, 1])
    names = [dataset[n]["name"] for n in range(400)]
    assert abs(sum(not name.startswith("c/") for name in names) / 400 - 0.75) < 0.08
    assert len(set(names)) == 8


def test_names_and_order_of_a_folder(folder):
    expected = [f"a/{i}.png" for i in range(4)] + [f"b/c/{i}.png" for i in range(4, 8)]
    for entry in (str(folder), f"{folder}/"):
        assert [photo.name for photo in list_photos(entry)] == expected


# --- crop rules ---


def test_center_crop_keeps_the_short_side():
    ramp = np.broadcast_to(np.linspace(0, 255, 80)[None, :, None], (200, 80, 3)).astype(np.uint8)
    crop = center_crop(ramp, 32)  # 80 -> 40 by halving -> 32 bicubic
    assert crop.shape == (32, 32, 3)
    np.testing.assert_allclose(crop[16, :, 0], (np.arange(32) + 0.5) * 255 / 32, atol=4)
    bands = np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 40)[:, None, None].repeat(40, 1).repeat(3, 2)
    assert (center_crop(bands, 40)[2:-2] == 100).all()  # the middle fifth of 200 rows
    assert center_crop(ramp[:, :20], 32).shape == (32, 32, 3)  # a small image is enlarged


# --- damage ---


def test_damaged_images_are_replaced_counted_and_named_once(folder, caplog):
    (folder / "a/0.png").write_bytes(b"no image at all")
    data = (folder / "b/c/5.png").read_bytes()
    (folder / "b/c/5.png").write_bytes(data[: len(data) // 2])
    photo(0, 20, 20).save(folder / "a/small.png")
    dataset = PhotoDataset([str(folder)], crop=32, seed=0)
    with caplog.at_level(logging.WARNING):
        names = {dataset[n]["name"] for n in range(27)}
    assert names == {f"a/{i}.png" for i in (1, 2, 3)} | {f"b/c/{i}.png" for i in (4, 6, 7)}
    assert len(dataset.skipped) == 3 and len(caplog.records) == 3
    reasons = {key.rsplit("/", 1)[1]: reason for key, reason in dataset.skipped.items()}
    assert "not an image" in reasons["0.png"]
    assert "20x20" in reasons["small.png"] and "32" in reasons["small.png"]
    again = PhotoDataset([str(folder)], crop=32, seed=0)
    assert all(same(again[n], dataset[n]) for n in range(27))


def test_folder_deleted_in_mid_run(folder):
    dataset = PhotoDataset([str(folder)], crop=32, seed=0, cache_mb=0)
    dataset[0]
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="No such file.*data.paths"):
        dataset[1]


def test_a_read_that_fails_once_changes_nothing(folder, monkeypatch):
    """A network's hiccup: the read is tried again, and the file again when it is next drawn."""
    wanted = [PhotoDataset([str(folder)], crop=32, seed=0, cache_mb=0)[n] for n in range(16)]
    monkeypatch.setattr(photo_module, "WAITS", (0, 0))
    usual, calls, failing = photo_module.Photo._read, Counter(), {"a/1.png": 2, "b/c/5.png": 3}

    def hiccup(self):
        calls[self.name] += 1
        if calls[self.name] <= failing.get(self.name, 0):
            raise OSError(5, "Input/output error")
        return usual(self)

    monkeypatch.setattr(photo_module.Photo, "_read", hiccup)
    dataset = PhotoDataset([str(folder)], crop=32, seed=0, cache_mb=0)
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
    dataset = PhotoDataset([str(tmp_path)], crop=100, seed=0, crop_rule="center", flips="none")
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


# --- lists and shards ---


def write_shard(path, folder) -> None:
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.png")):
            tar.add(file, file.relative_to(folder).as_posix())
            text = b"{}"
            info = tarfile.TarInfo(file.stem + ".json")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))


def test_shard_gives_what_its_folder_gives(folder, tmp_path):
    write_shard(tmp_path / "x.tar", folder)
    plain = PhotoDataset([str(folder)], crop=32, seed=0)
    for entry in (tmp_path / "x.tar", tmp_path / "*.tar"):
        packed = PhotoDataset([str(entry)], crop=32, seed=0)
        assert all(same(packed[n], plain[n]) for n in range(8))


def test_truncated_shard(folder, tmp_path, caplog):
    path = tmp_path / "x.tar"
    write_shard(path, folder)
    path.write_bytes(path.read_bytes()[: list_photos(path)[5].offset + 100])
    with caplog.at_level(logging.WARNING):
        photos = list_photos(path)
    assert len(photos) == 5
    assert "x.tar is damaged" in caplog.text and "first 5 images" in caplog.text
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match="x.tar holds no complete image"):
        list_photos(path)


def test_shard_shortened_in_mid_run(folder, tmp_path):
    path = tmp_path / "x.tar"
    write_shard(path, folder)
    dataset = PhotoDataset([str(path)], crop=32, seed=0, cache_mb=0)
    path.write_bytes(path.read_bytes()[: dataset.pair(1)[0].offset])
    assert {dataset[n]["name"] for n in range(3)} == {dataset.pair(0)[0].name}
    assert all("before the end of" in reason for reason in dataset.skipped.values())


def test_shards_are_read_once(folder, tmp_path, monkeypatch):
    """What a shard holds is remembered until the shard changes; many are read side by side."""
    for number in range(MANY_SHARDS):
        write_shard(tmp_path / f"{number:02}.tar", folder)
    first = list_photos(tmp_path / "*.tar")
    assert len(first) == 8 * MANY_SHARDS and first[8].path.endswith("01.tar")
    read = []
    monkeypatch.setattr(listing, "read_shard", lambda path: read.append(path) or read_shard(path))
    assert list(list_photos(tmp_path / "*.tar")) == list(first) and read == []
    with tarfile.open(tmp_path / "03.tar", "a") as tar:
        tar.add(folder / "a/0.png", "more.png")
    assert [photo.name for photo in list_photos(tmp_path / "03.tar")][-1] == "more.png"
    assert read == [str(tmp_path / "03.tar")]


def test_braces(folder, tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"{number:03}.tar", folder)
    assert len(list_photos(tmp_path / "{000..001}.tar")) == 16
    assert len(list_photos(f"{folder}/{{a,b}}")) == 8
    assert [photo.name for photo in list_photos(f"{folder}/a/{{2..3}}.*")] == ["2.png", "3.png"]
    with pytest.raises(UserError, match=r"includes .*/003.tar, which does not exist"):
        list_photos(tmp_path / "{000..003}.tar")


def test_text_list(folder, tmp_path):
    path = folder / "train.txt"
    path.write_text(f"# chosen by hand\na/1.png\n\n{folder}/b/c/4.png\n")
    assert [photo.path for photo in list_photos(path)] == [f"{folder}/a/1.png", f"{folder}/b/c/4.png"]
    path.write_text("gone/1.png\ngone/2.png\n")
    with pytest.raises(UserError, match="none of its first 2 files exists.*gone/1.png"):
        list_photos(path)


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
        PhotoDataset(**({"paths": [str(folder)], "crop": 32, "seed": 0} | settings))


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        list_photos(tmp_path)


# --- pairs ---


def test_pairs_stay_aligned(tmp_path):
    for kind, side in (("hq", 96), ("lq", 24)):
        y, x = (np.mgrid[:side, :side] + 0.5) / side * 255
        (tmp_path / kind).mkdir()
        Image.fromarray(np.stack([x, y, x], -1).round().astype(np.uint8)).save(tmp_path / kind / "p.png")
    dataset = PhotoDataset([str(tmp_path / "hq")], 32, 0, flips="both", lq_paths=[str(tmp_path / "lq")])
    for n in range(20):
        sample = dataset[n]
        assert sample["lq"].shape == sample["hq"].shape == (3, 32, 32)
        assert (sample["hq"] - sample["lq"])[:, 4:-4, 4:-4].abs().max() < 0.02  # one HQ pixel is a step of 0.021
    batch = dataset.batch(range(3))
    assert batch["lq"].shape == (3, 3, 32, 32) and len(batch["names"]) == len(batch["seeds"]) == 3


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
        PhotoDataset([here], 32, 0, lq_paths=[here], scale=scale, pair_names=["NAME_HR", "NAME_LR"])
    names = ["NAME_HR", "NAME_LR4"]
    dataset = PhotoDataset([here], 32, 0, lq_paths=[here], scale=scale, pair_names=names)
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
    dataset = PhotoDataset([str(folder)], 32, 0, lq_paths=[str(tmp_path / "LR/X4")], pair_names=["NAME", "NAMEx4"])
    photo, partner = dataset.pair(5)
    assert (photo.name, partner.name) == ("b/c/5.png", "b/c/5x4.png")


def test_pairs_beside_images_without(folder, tmp_path):
    """Real pairs and images to degrade, drawn as their probabilities say."""
    for kind, side in (("hq", 96), ("lq", 24)):
        (tmp_path / kind).mkdir()
        photo(0, side, side).save(tmp_path / kind / "p.png")
    paths, partners = [str(folder), str(tmp_path / "hq")], ["", str(tmp_path / "lq")]
    dataset = PhotoDataset(paths, 32, 0, lq_paths=partners, probabilities=[1, 3])
    samples = [dataset[n] for n in range(200)]
    assert all(("lq" in sample) == (sample["name"] == "p.png") for sample in samples)
    assert 0.65 < sum("lq" in sample for sample in samples) / 200 < 0.85


def test_pairs_without_partner_or_of_wrong_size(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "lq")
    dataset = PhotoDataset([str(folder)], 32, 0, lq_paths=[str(tmp_path / "lq")])
    with pytest.raises(UserError, match="not 4 times its partner's 60x48"):
        dataset[0]
    (tmp_path / "lq/a/2.png").unlink()
    with pytest.raises(UserError, match="1 of 8 images have no single partner.*a/2.png"):
        PhotoDataset([str(folder)], 32, 0, lq_paths=[str(tmp_path / "lq")])


def test_shrunk_crops_show_more_of_the_photograph(tmp_path):
    x = np.add.outer(np.zeros(96, int), np.arange(96)).astype(np.uint8)  # a ramp: its step tells the factor
    Image.fromarray(np.repeat(x[..., None], 3, 2)).save(tmp_path / "ramp.png")
    dataset = PhotoDataset([str(tmp_path)], crop=32, seed=0, flips="none", shrink=0.5)
    factors = []
    for n in range(40):
        row = (dataset[n]["hq"][0, 16] + 1) * 127.5
        factors.append(float(28 / (row[30] - row[2])))  # pixels of the crop per level, that is per source pixel
    assert 0.48 < min(factors) < 0.6 and 0.9 < max(factors) < 1.06
    with pytest.raises(UserError, match="data.shrink is 0"):
        PhotoDataset([str(tmp_path)], crop=32, seed=0, shrink=0)
    with pytest.raises(UserError, match="random crops"):
        PhotoDataset([str(tmp_path)], crop=32, seed=0, shrink=0.5, crop_rule="center")
