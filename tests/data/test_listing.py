"""Which photographs folders, lists, shards and patterns hold."""

import io
import logging
import tarfile

import pytest

from consissr.data import listing
from consissr.data.listing import MANY_SHARDS, list_photos, read_shard
from consissr.errors import UserError
from tests.data.conftest import photos_of, same


def test_names_and_order_of_a_folder(folder):
    expected = [f"a/{i}.png" for i in range(4)] + [f"b/c/{i}.png" for i in range(4, 8)]
    for entry in (str(folder), f"{folder}/"):
        assert [photo.name for photo in list_photos(entry)] == expected


def write_shard(path, folder) -> None:
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.png")):
            tar.add(file, file.relative_to(folder).as_posix())
            text = b"{}"
            info = tarfile.TarInfo(file.stem + ".json")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))


def test_links_list_nothing_twice(folder, tmp_path, monkeypatch):
    """A link to the folder itself, or to what lies in it; one to a folder elsewhere is followed."""
    names = [photo.name for photo in list_photos(folder)]
    (tmp_path / "elsewhere").mkdir()
    (folder / "a" / "0.png").rename(tmp_path / "elsewhere" / "0.png")
    (folder / "a" / "0").symlink_to(tmp_path / "elsewhere")
    for place in (folder / "b", tmp_path / "elsewhere"):
        (place / "again").symlink_to(folder)
    expected = sorted([*names[1:], "a/0/0.png"])
    assert sorted(photo.name for photo in list_photos(folder)) == expected
    monkeypatch.chdir(folder)
    assert sorted(photo.name for photo in list_photos(".")) == expected


def test_shard_gives_what_its_folder_gives(folder, tmp_path):
    write_shard(tmp_path / "x.tar", folder)
    plain = photos_of(folder)
    for entry in (tmp_path / "x.tar", tmp_path / "*.tar"):
        packed = photos_of(entry)
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
    dataset = photos_of(path, cache_mb=0)
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


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        list_photos(tmp_path)
