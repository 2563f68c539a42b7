"""Windows of the latent, and a denoiser through them."""

from contextlib import contextmanager
from statistics import NormalDist

import pytest
import torch

from consissr.diffusion.tiling import TiledDenoiser, even_chunks, gaussian_weights, patches, starts, windows
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


def test_windows_may_be_oblong():
    """4 rows and 8 columns, every 3 and every 6, of a latent of 10 x 21; none is larger than a latent of 3 x 6."""
    found = windows(10, 21, (4, 8), (3, 6))
    assert {(window.height, window.width) for window in found} == {(4, 8)}
    assert [tuple(window[:2]) for window in found] == [(top, left) for top in (0, 3, 6) for left in (0, 6, 12, 13)]
    assert windows(3, 6, (4, 8), (3, 6)) == [(0, 0, 3, 6)]
    assert [window.top for window in windows(9, 6, (4, 8), (4, 2))] == [0, 4, 5]


def test_three_images_and_areas_that_are_told():
    areas = []
    z, given, t = torch.randn(3, 4, 10, 21), condition(3, 10, 21), torch.tensor([1, 2, 3])
    tiled = TiledDenoiser(Pointwise(), (4, 8), (3, 6), on_tile=areas.append)
    assert torch.allclose(tiled(z, t, given), Pointwise()(z, t, given), atol=1e-4)
    assert areas == [32] * 12


def test_gaps_are_refused():
    for stride in (17, 0):
        with pytest.raises(ValueError, match=f"^stride {stride} must lie in 1..16, or the windows leave gaps$"):
            starts(100, 16, stride)


def test_weights_are_a_normal_density_over_each_side():
    """Deviation a tenth of the side, mean its middle; CCSR's release takes rows from half a pixel lower."""
    density = NormalDist(0, 0.1).pdf
    for form, middle in (("symmetric", 1.5), ("as_released", 2)):
        weights = gaussian_weights(4, 5, form)
        assert weights.dtype == torch.float64
        for i, row in enumerate(weights.tolist()):
            wanted = [density((i - middle) / 4) * density((j - 2) / 5) for j in range(5)]
            assert row == pytest.approx(wanted, rel=1e-12)


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


@pytest.mark.parametrize("form", ["symmetric", "as_released"])
def test_overlapping_windows_are_averaged_by_their_weights(form):
    """Two windows that say 1 and 2: each row is their mean, weighted by the distance to each one's middle."""

    class Says(torch.nn.Module):
        calls = 0

        def forward(self, z_t, t, given):
            self.calls += 1
            return torch.full_like(z_t, self.calls)

    z = torch.zeros(1, 4, 6, 4, dtype=torch.float64)
    out = TiledDenoiser(Says(), 4, 2, form, batch=1)(z, torch.tensor([5]), condition(1, 6, 4))
    w = gaussian_weights(4, 4, form)[:, 0]
    both = [(w[2 + i] + 2 * w[i]) / (w[2 + i] + w[i]) for i in (0, 1)]
    assert torch.allclose(out[0, 0, :, 1], torch.tensor([1, 1, *both, 2, 2], dtype=torch.float64), rtol=1e-12)
    by_default = TiledDenoiser(Says(), 4, 2, batch=1)(z, torch.tensor([5]), condition(1, 6, 4))
    assert torch.equal(by_default, out) == (form == "symmetric")


def test_four_windows_at_a_time_and_an_answer_for_each():
    z, t, inner = torch.zeros(1, 4, 16, 48), torch.tensor([5]), Pointwise()
    TiledDenoiser(inner, 16, 8)(z, t, condition(1, 16, 48))
    assert sorted(shape[0] for shape in inner.shapes) == [2, 3], "five windows in two passes"

    class Forgets(Pointwise):
        def forward(self, z_t, t, given):
            return super().forward(z_t, t, given)[:1]

    with pytest.raises(ValueError, match="shorter"):
        TiledDenoiser(Forgets(), 16, 8)(z, t, condition(1, 16, 48))


def test_windows_on_another_device():
    """("meta" stands for any device.) Weights and rows are made where the latent is, two by two images and windows."""
    z, t = torch.zeros(2, 4, 24, 16, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    assert TiledDenoiser(Pointwise(), 16, 8)(z, t, condition(2, 24, 16).to("meta")).shape == z.shape


def test_preparing_leaves_the_hint_to_each_window():
    """Tokens are the whole image's and prepared once; a denoiser that prepares nothing is asked for nothing."""
    calls, given = [], condition(1, 24, 16)

    class Prepares(Pointwise):
        def prepare(self, condition, like=None, hint=True):
            calls.append((condition, like, hint))
            return "prepared"

    assert TiledDenoiser(Prepares(), 16, 8).prepare(given, "known") == "prepared"
    assert calls == [(given, "known", False)]
    assert TiledDenoiser(Pointwise(), 16, 8).prepare(given) is given


def test_a_latent_no_larger_than_a_tile_goes_straight_through():
    inner = Pointwise()
    TiledDenoiser(inner, 16, 8)(torch.zeros(1, 4, 9, 16), torch.tensor([5]), condition(1, 9, 16))
    assert inner.shapes == [(1, 4, 9, 16)]


def test_chunks_are_even():
    assert [len(chunk) for chunk in even_chunks(list(range(10)), 4)] == [3, 4, 3]
    assert sum(even_chunks(list(range(10)), 4), []) == list(range(10))
    assert even_chunks([1, 2], 1) == even_chunks([1, 2], 0) == [[1], [2]]


def test_no_window_copies_the_whole_hint():
    """Of a large image it would take gigabytes for a batch of windows."""
    copied = []

    class Watched(Condition):
        def rows(self, index):
            copied.append(self.hint.numel())
            return super().rows(index)

    given = condition(1, 40, 40)
    watched = Watched(given.text, given.hint, given.image)
    z, t = torch.zeros(1, 4, 40, 40), torch.tensor([5])
    assert torch.equal(TiledDenoiser(Pointwise(), 16, 8)(z, t, watched), TiledDenoiser(Pointwise(), 16, 8)(z, t, given))
    assert copied and max(copied) <= 4 * 16 * 16


def test_patches_stand_in_the_middle_of_equal_parts():
    """At most 36, each 32 wide and high where the latent is, more of them along the longer side."""
    square = [24, 72, 120, 168, 216, 264]  # (i + 0.5) (320 - 32) / 6
    assert patches(320, 320) == [(top, left, 32, 32) for top in square for left in square]
    assert patches(100, 400) == [(top, round((i + 0.5) * 368 / 12), 32, 32) for top in (11, 34, 57) for i in range(12)]
    assert patches(20, 2000) == [(0, round((i + 0.5) * 1968 / 36), 20, 32) for i in range(36)]
    assert patches(2000, 20) == [(round((i + 0.5) * 1968 / 36), 0, 32, 20) for i in range(36)]
    assert patches(8, 8) == 36 * [(0, 0, 8, 8)]


def test_what_windows_share_is_measured_on_patches_before_them():
    """The context is given the network, the number of images and a run on patches; windows run within it."""
    inner, events = Pointwise(), []

    @contextmanager
    def sharing(network, images, run):
        assert network is inner and images == 2
        z_t = run()
        events.append(z_t)
        inner.shapes.clear()
        yield
        events.append(list(inner.shapes))

    given, t = condition(2, 40, 50), torch.tensor([5, 7])
    z = torch.randn(2, 4, 40, 50, generator=torch.Generator().manual_seed(0))
    out = TiledDenoiser(inner, 16, 8, sharing=sharing)(z, t, given)
    wanted = torch.cat([out[..., top : top + h, left : left + w] for top, left, h, w in patches(40, 50)])
    assert torch.allclose(events[0], wanted, atol=1e-5), "each patch with its image's time, tokens and part of the hint"
    assert sum(shape[0] for shape in events[1]) == 2 * len(windows(40, 50, 16, 8)), "all windows within the context"
