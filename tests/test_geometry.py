"""Sizes, padding and colours around the network, by each rule."""

import pytest
import torch

from consissr.images import formats
from consissr.images.geometry import finish, prepare, to_pil, to_tensor

SIZES = [(1, 1), (37, 53), (127, 640), (200, 3000)]


def image(height, width):
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (1, 3, height, width), generator=generator) / 127.5 - 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.5, 1, 2.5, 4])
def test_results_have_the_promised_size(size, scale):
    found = prepare(image(*size), scale, "pad", 64)
    wanted = tuple(max(int(scale * side + 0.5), 1) for side in size)
    assert found.size == wanted
    assert all(side % 64 == 0 for side in found.x.shape[2:])
    assert tuple(finish(found, found.x.clone(), "pad", "adain").shape[2:]) == wanted


@pytest.mark.parametrize(("size", "resized"), [((37, 53), (64, 64)), ((200, 130), (768, 512))])
def test_sizes_of_ccsr_v1(size, resized):
    """Enlarged, a short side raised, then down to multiples of 64; the result is as large as promised."""
    image_ = image(*size)
    scale, short = (1, 64) if size[0] == 37 else (4, 512)
    found = prepare(image_, scale, "ccsr_v1", 8, short_side=short)
    assert found.x.shape[2:] == resized == found.shape
    assert found.size == tuple(scale * side for side in size)
    assert finish(found, found.x.clone(), "ccsr_v1", "adain").shape[2:] == found.size


@pytest.mark.parametrize("rule", ["pad", "ccsr", "ccsr_v1", "consissr"])
@pytest.mark.parametrize(
    ("size", "scale", "longest"),
    [((37, 53), 2.5, None), ((41, 66), 0.7, None), ((10, 24), 4, 100), ((60, 96), 1, 100), ((3, 49), 2.3, None)],
)
def test_every_rule_gives_the_planned_size(rule, size, scale, longest):
    """Rounding up would give another size than a run's plan and log say; and 96 (100 / 96) is more than 100."""
    found = prepare(image(*size), scale, rule, 8, longest, short_side=64)
    assert found.size == formats.output_size(*size, scale, longest)
    assert longest is None or max(found.size) == longest
    assert tuple(finish(found, found.x.clone(), rule, "adain").shape[2:]) == found.size


def test_padding_reflects_and_the_image_stays():
    found = prepare(image(10, 70), 1, "pad", 64)
    assert found.x.shape[2:] == (64, 128)
    assert torch.equal(found.x[..., :10, :70], image(10, 70))
    assert torch.equal(found.x[..., :10, 70], found.x[..., :10, 68])
    assert torch.equal(finish(found, found.x.clone(), "pad", "none"), image(10, 70))


def test_longest_side_replaces_the_scale():
    assert prepare(image(20, 50), 4, "pad", 8, longest=75).size == (30, 75)


@pytest.mark.parametrize("fix", ["adain", "wavelet"])
@pytest.mark.parametrize("rule", ["pad", "ccsr", "consissr"])
def test_colours_come_from_the_input(rule, fix):
    lq = image(40, 48).mul(0.2).sub(0.5).add(torch.tensor([0.4, 0.0, -0.2]).view(1, 3, 1, 1))
    found = prepare(lq, 2, rule, 8, short_side=64)
    cast = found.x * 0.5 + torch.tensor([-0.3, 0.4, 0.1]).view(1, 3, 1, 1)
    result = finish(found, cast.clone(), rule, fix)
    difference = (result.mean((2, 3)) - lq.mean((2, 3))).abs().max()
    assert difference < 0.08  # ConsisSR's zero padding tints the edge
    assert (finish(found, cast, rule, "none").mean((2, 3)) - lq.mean((2, 3))).abs().max() > 0.1
    assert result.min() >= -1 and result.max() <= 1


def test_pad_keeps_the_colours_of_the_visible_part_only():
    """Padding must not take part in the colour statistics."""
    lq = image(9, 9)
    assert torch.allclose(finish(prepare(lq, 1, "pad", 64), prepare(lq, 1, "pad", 64).x, "pad", "adain"), lq, atol=1e-4)


def test_pillow_round_trip():
    assert torch.equal(to_tensor(to_pil(image(5, 7))), image(5, 7))
