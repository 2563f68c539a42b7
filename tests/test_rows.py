"""Large images are not in memory as a whole: rows are made when they are read, with the values of a tensor."""

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.images import codec
from consissr.images.geometry import finish, finished, prepare
from consissr.images.rows import Rows, rows_of, strips
from consissr.models.vae.tiling import TiledLatents
from consissr.restorer import Restorer


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_read_row_by_row(tmp_path, rng, mode):
    """600 rows are three strips, and lines 250 to 530 reach into all."""
    kind, shape = (np.uint16, (600, 7)) if mode == "I;16" else (np.uint8, (600, 7, 3) if mode == "RGB" else (600, 7))
    Image.fromarray(rng.integers(0, np.iinfo(kind).max, shape).astype(kind)).save(tmp_path / "a.png")
    whole, photo = codec.read(tmp_path / "a.png"), codec.read(tmp_path / "a.png", whole=False)
    assert isinstance(photo.pixels, Rows) and photo.pixels.shape == (1, 3, 600, 7)
    assert torch.equal(rows_of(photo.image, 250, 530)[0], whole.pixels[:, 250:530])
    assert torch.equal(photo.pixels.whole()[0], whole.pixels)
    one, other = (codec.samples_for("b.png", image) for image in (whole, photo))
    assert np.array_equal(one.values, other.values) and one.values.dtype == kind


@pytest.mark.parametrize("fix", ["none", "adain", "wavelet"])
def test_finished_row_by_row(fix):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(1, 3, 600, 9, generator=generator) * 2 - 1, torch.randn(1, 3, 616, 32, generator=generator)
    prepared = prepare(x, 1, "pad", 8, margin=8)
    y, before = y[..., : prepared.shape[1]].bfloat16(), y[..., : prepared.shape[1]].bfloat16()
    lazily = finished(prepared, y, "pad", fix, 0.75)
    parts = torch.cat([lazily.make(*strip) for strip in strips(600)], 2)
    assert torch.equal(parts, finish(prepared, y, "pad", fix, 0.75)) and parts.dtype == torch.float32
    assert torch.allclose(lazily.make(250, 270), parts[:, :, 250:270], atol=1e-6)
    assert torch.equal(y, before), "what the rows are made of stays as it is"


def test_photos_come_back_as_photos(tiny_model, rng):
    """With the pixels that the same PIL images get."""
    restorer = Restorer.load(str(tiny_model), "cpu", "fp32")
    images = [Image.fromarray(rng.integers(0, 256, (9, 13, 4)).astype(np.uint8)).convert(m) for m in ("RGB", "RGBA")]
    photos = restorer([codec.from_pil(image) for image in images], 2)
    for photo, image in zip(photos, restorer(images, 2), strict=True):
        assert isinstance(photo.pixels, Rows) and np.array_equal(codec.to_pil(photo), image)


def test_decoded_tiles_wait_in_the_networks_precision(tiny_model):
    """A result in float32 would take as much memory as all else."""
    restorer = Restorer.load(str(tiny_model), "cpu", "bf16")
    z = torch.randn(1, restorer.latents.channels, 12, 10).bfloat16()
    for mode in ("sampled", "exact"):
        assert TiledLatents(restorer.latents, 4, mode).decode(z).dtype == torch.bfloat16
