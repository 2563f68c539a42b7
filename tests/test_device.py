"""Pixels that a GPU works on: the same results as the CPU's, within a level of 8 bits. Here the CPU plays the GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.images import codec, device
from consissr.images.inputs import packed
from consissr.images.resize import resize
from consissr.images.rows import Rows
from consissr.models.memory import pixel_device
from consissr.restorer import Restorer


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    def switch(on):
        monkeypatch.setattr(device, "KINDS", ("cuda", "cpu") if on else ("cuda",))

    return switch


@pytest.mark.parametrize("size", [(40, 56), (17, 9), (20, 80), (33, 28)])
def test_resizing(as_on_a_gpu, size):
    x = torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x[..., :5, :] = 1.0  # an edge, at which the cubic overshoots
    expected = resize(x, size)
    as_on_a_gpu(True)
    found = resize(x, size)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5
    assert not torch.equal(found, expected)  # it was computed otherwise


def photographs(folder, rng):
    """Colour with transparency, grey of 16 bits, colour of 16 bits, plain colour."""
    levels = rng.integers(0, 256, (13, 18, 4)).astype(np.uint8)
    Image.fromarray(levels).save(folder / "alpha.png")
    Image.fromarray(levels[..., 0].astype(np.uint16) * 251).save(folder / "grey16.png")
    deep = torch.from_numpy(levels[..., :3].transpose(2, 0, 1) / 127.5 - 1).float()
    codec.write(folder / "deep.png", codec.Photo(deep, None, codec.Form(bits=16)))
    Image.fromarray(levels[..., :3]).save(folder / "plain.png")
    return sorted(folder.glob("*.png"))


@pytest.mark.parametrize("fix", ["adain", "wavelet"])
def test_from_file_to_file(as_on_a_gpu, tiny_model, tmp_path, rng, fix):
    restorer = Restorer.load(str(tiny_model), "cpu", "fp32", color_fix=fix, short_side=64)
    for path in photographs(tmp_path, rng):
        values = []
        for on in (False, True):
            as_on_a_gpu(on)
            photo = codec.read(path, restorer.device)
            y = restorer(photo.pixels[None], 2.5)
            samples = codec.samples_for("a.png", photo.restored(y[0]))
            samples.arrived()
            values.append(samples.values)
        level = 1 if values[0].dtype == np.uint8 else 257
        assert values[0].dtype == values[1].dtype and values[0].shape == values[1].shape
        assert np.abs(values[0].astype(int) - values[1].astype(int)).max() <= level
        assert np.ptp(values[0]) > 100 * level


def test_whole_numbers_survive_both_ways(as_on_a_gpu):
    as_on_a_gpu(True)
    for kind, top in ((np.uint8, 255), (np.uint16, 65535)):
        samples = np.array([[0, 1, top // 2, top // 2 + 1, top]], dtype=kind)
        values = device.sent(samples, "cpu")
        assert values.dtype == torch.float32 and values.tolist() == samples.tolist()
        there, arrived = device.fetched(values.to(torch.uint8 if top == 255 else torch.int32))
        arrived()
        assert there.dtype == kind and np.array_equal(there, samples)


def test_results_too_large_for_the_device_are_worked_on_by_the_cpu(monkeypatch):
    monkeypatch.setattr("consissr.models.memory.total_memory", lambda device: 8 * 2**30)
    gpu = torch.device("cuda")
    assert pixel_device(gpu, (3000, 3500)) == gpu and pixel_device(gpu, (3500, 3500)).type == "cpu"
    assert pixel_device(torch.device("mps"), (10, 10)).type == "cpu"


def test_a_result_comes_back_to_its_input_s_device(monkeypatch):
    """Also one that the CPU made, as under the released size rules. ("meta" plays the GPU.)"""
    monkeypatch.setattr(device, "KINDS", ("cuda", "meta"))
    y = packed(torch.zeros(1, 3, 2, 2, device="meta"), [], [Rows.of(torch.zeros(1, 3, 4, 4))], pixel_device)
    assert y.is_meta and y.shape == (1, 3, 4, 4)


def test_what_is_not_a_number_is_found_where_the_pixels_are(as_on_a_gpu):
    as_on_a_gpu(True)
    photo = codec.Photo(torch.zeros(3, 4, 4), None, codec.Form())
    photo = replace(photo, pixels=photo.pixels.index_fill(1, torch.tensor([2]), float("nan")))
    with pytest.raises(codec.UserError, match="NaN"):
        codec.samples_for("a.png", photo)
