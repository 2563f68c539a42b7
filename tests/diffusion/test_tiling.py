"""Windows of the latent, and a denoiser through them."""

import pytest
import torch

from consissr.diffusion.tiling import TiledDenoiser, even_chunks, gaussian_weights, starts, windows
from consissr.models.denoiser import Condition


def condition(images, height, width, tokens=None):
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(images, 2, 5, generator=generator)
    return Condition(text, torch.randn(images, 4, height, width, generator=generator), tokens)


class Pointwise(torch.nn.Module):
    """A denoiser without spatial mixing: tiling must not change it. Remembers the shapes it met."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, z_t, t, given):
        self.shapes.append(tuple(z_t.shape))
        shift = given.text.mean((1, 2)) if given.image is None else given.image.mean((1, 2))
        return z_t * 2 + given.hint + (shift + t)[:, None, None, None]


@pytest.mark.parametrize(
    ("size", "tile", "stride"), [(24, 16, 8), (40, 16, 8), (17, 16, 12), (16, 16, 1), (5, 16, 8), (33, 16, 16)]
)
def test_windows_cover_everything(size, tile, stride):
    covered = torch.zeros(size, 30)
    for place in windows(size, 30, tile, stride):
        assert (place.height, place.width) == (min(tile, size), min(tile, 30))
        part = place.crop(covered)
        assert part.shape == (place.height, place.width)
        part.add_(1)
    assert covered.min() > 0


def test_starts_as_in_the_release():
    assert starts(40, 16, 8) == [0, 8, 16, 24]
    assert starts(42, 16, 8) == [0, 8, 16, 24, 26]


def test_gaps_are_refused():
    with pytest.raises(ValueError, match="gaps"):
        starts(100, 16, 17)


def test_weights_are_symmetric_unless_as_released():
    weights = gaussian_weights(16, 20)
    assert torch.allclose(weights, weights.flip(0)) and torch.allclose(weights, weights.flip(1))
    assert weights.argmax() == weights[7:9, 9:11].argmax() + 7 * 20 + 9
    released = gaussian_weights(16, 20, "as_released")
    assert not torch.allclose(released, released.flip(0)) and torch.allclose(released, released.flip(1))


@pytest.mark.parametrize("image", [False, True])
def test_tiles_reproduce_a_denoiser_without_mixing(image):
    inner = Pointwise()
    tokens = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(5)) if image else None
    given = condition(2, 24, 40, tokens)
    z, t = torch.randn(2, 4, 24, 40, generator=torch.Generator().manual_seed(4)), torch.tensor([999, 3])
    tiled = TiledDenoiser(inner, 16, 8, batch=3)(z, t, given)
    wanted = Pointwise()(z, t, given)
    assert torch.allclose(tiled, wanted, atol=1e-3)
    assert {shape[2:] for shape in inner.shapes} == {(16, 16)}
    assert max(shape[0] for shape in inner.shapes) <= 3 * 2
    assert sum(shape[0] for shape in inner.shapes) == 2 * len(windows(24, 40, 16, 8))


def test_a_latent_no_larger_than_a_tile_goes_straight_through():
    inner = Pointwise()
    TiledDenoiser(inner, 16, 8)(torch.zeros(1, 4, 9, 16), torch.tensor([5]), condition(1, 9, 16))
    assert inner.shapes == [(1, 4, 9, 16)]


def test_chunks_are_even():
    assert [len(chunk) for chunk in even_chunks(list(range(10)), 4)] == [3, 4, 3]
    assert sum(even_chunks(list(range(10)), 4), []) == list(range(10))
