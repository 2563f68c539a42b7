"""Sizes of images: resizing as Pillow does it, padding and cropping, and how large a result becomes."""

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.images import codec, formats
from consissr.images.resize import resize, resized_rows


@pytest.mark.parametrize("size", [(97, 31), (40, 200), (13, 9), (1, 1)])
def test_resize_equals_pillow(rng, size):
    before = rng.integers(0, 256, (30, 50, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(before).resize(size[::-1], Image.Resampling.BICUBIC))
    x = torch.from_numpy(before).permute(2, 0, 1)[None] / 127.5 - 1
    result = codec.to_uint8(resize(x, size))[0].permute(1, 2, 0).numpy()
    assert result.shape == expected.shape
    assert np.abs(result.astype(int) - expected).max() <= 1


def test_rows_of_a_resized_image(rng):
    """Made from as few rows as they need, they are those of the whole, larger and smaller, up to rounding
    (Pillow keeps where a part begins in 32 bits)."""
    x = torch.from_numpy(rng.random((1, 2, 301, 5), dtype=np.float32))
    for height in (700, 301, 77):
        whole = resize(x, (height, 7))
        for top, bottom in ((0, 1), (33, 76), (height - 3, height)):
            assert torch.allclose(resized_rows(x, (height, 7), top, bottom), whole[:, :, top:bottom], atol=1e-4)
    assert torch.allclose(whole[0, 0], bicubic(x[0, 0], (77, 7)), atol=1e-6)


def bicubic(plane, size):
    """Pillow's own in one piece, clamped after each pass."""
    wide = np.asarray(Image.fromarray(plane.numpy()).resize((size[1], plane.shape[0]), Image.Resampling.BICUBIC))
    both = Image.fromarray(wide.clip(-1, 1)).resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(both).clip(-1, 1))


def test_resize_conformance(shared):
    arrays = np.load(shared / "conformance" / "consissr_common" / "image_ops.npz")
    x = torch.from_numpy(arrays["src"]).permute(2, 0, 1) / 127.5 - 1
    result = codec.to_uint8(resize(x, (175, 128))).permute(1, 2, 0).numpy()
    assert np.abs(result.astype(int) - arrays["auto_resize_128"]).max() <= 1


def test_output_size():
    assert formats.output_size(37, 53, 4) == (148, 212)
    assert formats.output_size(3, 5, 1.5) == (5, 8)  # 4.5 rounds up, 7.5 rounds up
    assert formats.output_size(1, 1, 0.1) == (1, 1)
    assert formats.output_size(100, 50, 4, longest=333) == (333, 167)
