"""Damaged files, mistakes in the call, a model in trouble: one line each, and the rest goes on."""

import os
from types import SimpleNamespace

import psutil
import pytest
import torch
from PIL import Image
from torch._dynamo.exc import BackendCompilerFailed

from consissr.config.sampler import SamplerConfig
from consissr.images import codec


def test_bad_files_do_not_stop_the_rest(infer, folder, tmp_path, files):
    (folder / "bad.png").write_text("not an image")
    (folder / "empty.jpg").touch()
    whole = (folder / "b.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (20000, 20000)).save(folder / "vast.png")
    Image.new("F", (4, 4)).save(folder / "float.tif")
    status, out, err = infer("-i", folder, "-o", tmp_path / "out")
    assert status == 1 and files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp"}
    assert "done 3, skipped 0, failed 5" in out
    lines = err.splitlines()
    assert len(lines) == 5 and all(line.startswith("failed: ") for line in lines)
    for name, words in {
        "bad.png": "not an image",
        "empty.jpg": "empty",
        "half.jpg": "damaged",
        "vast.png": "million pixels",
        "float.tif": "F pixels",
    }.items():
        assert sum(name in line and words in line for line in lines) == 1


@pytest.mark.skipif(os.name == "nt", reason="links and pipes are POSIX's")
def test_what_only_looks_like_a_file(infer, folder, tmp_path, files):
    (folder / "dangling.png").symlink_to(folder / "gone")
    os.mkfifo(folder / "pipe.png")
    status, _, err = infer("-i", folder, "-o", tmp_path / "out")
    assert status == 1 and files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp"}
    assert "dangling.png: cannot be read" in err and "pipe.png: not a file" in err


def test_result_longer_than_its_format_allows(infer, tmp_path, files):
    Image.new("L", (4200, 1)).save(tmp_path / "long.webp")
    assert infer("-i", tmp_path / "long.webp", "-o", tmp_path / "out")[0] == 0
    assert files(tmp_path / "out") == {"long.png"}
    status, _, err = infer("-i", tmp_path / "long.webp", "-o", tmp_path / "out" / "r.webp")
    assert status == 1 and "16800 px" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-i", "{in}/gone.png"], "no such file or folder"),
        (["-i", "{in}/none"], "no images in"),
        (["-i", "{in}/nul.txt"], "must be UTF-8 text"),
        (["-i", "{in}/*.xyz"], "no images in"),
        (["-i", "{in}", "-o", "{in}/notes.txt"], "neither a folder nor an image"),
        (["-i", "{in}", "-o", "{in}/one.png"], "names one file"),
        (["-i", "{in}/a.png", "-o", "{in}/r.gif"], "neither a folder nor an image"),
        (["-i", "{in}", "-s", "0"], "--scale 0"),
        (["-i", "{in}", "-s", "nan"], "--scale nan"),
        (["-i", "{in}", "--longest-side", "0"], "--longest-side 0"),
        (["-i", "{in}", "--repeat", "0"], "--repeat 0"),
        (["-i", "{in}", "--repeat", "100000000"], "use 1 to 1000"),
        (["-i", "{in}", "--batch-size", "0"], "--batch-size 0"),
        (["-i", "{in}", "--quality", "101"], "--quality 101"),
        (["-i", "{in}", "--suffix", "a/b"], "--suffix 'a/b'"),
        (["-i", "{in}", "--batch-size", "0", "--dry-run"], "--batch-size 0"),
        (["-i", "{in}", "--quality", "0", "--dry-run"], "--quality 0"),
        (["-i", "{in}", "--config", "none.yaml", "--dry-run"], "none.yaml does not exist"),
        (["-i", "{in}", "--fidelity", "7", "--dry-run"], "fidelity is 7.0: use 0 to 1"),
        (["-i", "{in}", "--t-max", "3", "--dry-run"], "t_max is 3.0: use 0 to 1"),
        (["-i", "{in}", "--json", "{in}/a.png/log", "--dry-run"], "--json"),
        (["-i", "{in}", "--json", "{in}/a.png", "--dry-run"], "is no log"),
        (["-i", "{in}", "--plan", "ddpm", "--t-max", "0.5"], "belong to the plan nuts"),
        (["-i", "{in}", "--t-min", "0.9", "--t-max", "0.5"], "t_min 0.9"),
        (["-i", "{in}", "--json", "{in}/notes.txt/log"], "--json"),
    ],
)
def test_mistakes_get_one_line(infer, folder, tmp_path, arguments, words, files):
    (folder / "none").mkdir()
    (folder / "nul.txt").write_bytes(b"a\0b.png")
    before = files(folder)
    arguments = [argument.replace("{in}", str(folder)) for argument in arguments]
    if "-o" not in arguments:
        arguments += ["-o", tmp_path / "out"]
    status, _, err = infer(*arguments)
    assert status == 2
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert files(folder) == before and not (tmp_path / "out").exists()


def test_transparency_into_a_named_jpeg(infer, folder, tmp_path):
    Image.new("RGBA", (8, 8)).save(folder / "t.png")
    status, _, err = infer("-i", folder / "t.png", "-o", tmp_path / "r.jpg")
    assert status == 1 and "cannot hold its transparency" in err


def test_result_larger_than_memory(infer, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=(24 + 350) * 16 * 12 * 9))
    status, _, err = infer("-i", folder / "a.png", "-o", tmp_path / "1")
    assert status == 0
    status, _, err = infer("-i", folder / "a.png", "-o", tmp_path / "2", "-s", 5)
    assert status == 1 and "make it smaller" in err and not infer.loads[1:]


def test_result_that_the_networks_see_larger_than_memory(infer, model, folder, tmp_path, monkeypatch):
    """The model raises short sides, which is known once it is loaded: a strip of 4x64 pixels, 32 times as large.

    Or 128 times, where its rules raise them to 512 unasked.
    """
    Image.new("RGB", (16, 1)).save(folder / "strip.png")
    for config, side in ((SamplerConfig(short_side=128), 128), (SamplerConfig(geometry="ccsr"), 512)):
        model.sampler = config
        area = side * 16 * side
        one_piece = min(area, 2048 * 2048) / area
        for each, status in ((24 + 340 * one_piece, 1), (24 + 350 * one_piece, 0)):
            free = SimpleNamespace(available=each * area)
            monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: free)
            found, _, err = infer("-i", folder / "strip.png", "-o", tmp_path / f"{side} {status}")
            told = f"for the networks {side / 4:g} times as large, needs" in err
            assert found == status and told == bool(status)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(("trouble", "words"), [("nan", "NaN"), ("memory", "memory ran out")])
def test_a_model_in_trouble_spoils_one_image(infer, model, folder, tmp_path, trouble, words, files, batch_size):
    """a.png, of equal size, is restored whether or not it shares a batch with b.jpg."""
    model.spoil = {"b.jpg": trouble}
    status, out, err = infer("-i", folder, "-o", tmp_path / "out", "--batch-size", batch_size)
    assert status == 1 and files(tmp_path / "out") == {"a.png", "c.webp"}
    assert "b.jpg" in err and words in err and "done 2, skipped 0, failed 1" in out


def test_memory_that_is_taken_while_a_file_is_read_ahead(infer, folder, tmp_path, monkeypatch, files):
    """By the image before, on a GPU: the file is read again when its turn comes."""
    read, met = codec.read, set()

    def full(path, *args, **how):
        if path not in met:
            met.add(path)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(path, *args, **how)

    monkeypatch.setattr(codec, "read", full)
    status, out, _ = infer("-i", folder, "-o", tmp_path / "out")
    assert status == 0 and files(tmp_path / "out") == {"a.png", "b.jpg", "c.webp"}


def test_what_cannot_be_compiled_is_told(infer, model, folder, tmp_path, monkeypatch):
    """No compiler, or a file of an earlier run that is damaged."""

    def fail(*_, **__):
        error = RuntimeError.__new__(BackendCompilerFailed)  # its constructor differs from one torch to the next
        error.inner_exception = ImportError("main.so: file too short\nand more")
        raise error

    monkeypatch.setattr(type(model), "__call__", fail)
    status, _, err = infer("-i", folder, "-o", tmp_path / "out", "--compile")
    assert status == 2 and err.endswith("or leave out --compile\n")
    assert "error: the networks could not be compiled (main.so: file too short): install a C++ compiler" in err


def test_defects_of_the_program_are_not_hidden(infer, model, folder, tmp_path):
    model.spoil = {"b.jpg": "bug"}
    with pytest.raises(RuntimeError, match="shapes"):
        infer("-i", folder, "-o", tmp_path / "out")
