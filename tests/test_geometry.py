"""Sizes, padding and colours around the network, by each rule."""

import numpy as np
import pytest
import torch
from PIL import Image

from consissr.images import color, formats
from consissr.images.geometry import Prepared, finish, prepare, to_pil, to_tensor, transfer
from consissr.images.resize import resize

SIZES = [(1, 1), (37, 53), (27, 140), (20, 300)]


def image(height, width):
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (1, 3, height, width), generator=generator) / 127.5 - 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.5, 1, 2.5, 4])
def test_results_have_the_promised_size(size, scale):
    found = prepare(image(*size), scale, "pad", 64)
    wanted = tuple(max(int(scale * side + 0.5), 1) for side in size)
    assert found.size == wanted
    assert found.shape == tuple(found.x.shape[2:])
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


def pillow(size, *resizes):
    """An image's input by Pillow: resized again and again to (width, height), bicubic unless said."""
    picture = to_pil(image(*size))
    for width, height, *kind in resizes:
        picture = picture.resize((width, height), *kind or [Image.Resampling.BICUBIC])
    return to_tensor(picture)


def test_inputs_of_the_released_rules_are_pillows():
    """Short side up to 64 / scale, then enlarged and floored to 8s (CCSR v2); enlarged, then up to 64 (the others)."""
    lanczos = Image.Resampling.LANCZOS
    cases = [
        ("ccsr", (10, 24), 4, [(38, 16), (152, 64)]),  # 64 // 4 = 16 = 1.6 * 10 and 1.6 * 24 = 38.4
        ("ccsr", (10, 24), 2.5, [(60, 25), (150, 62), (144, 56)]),  # 64 // 2.5 = 25
        ("ccsr", (70, 47), 2, [(94, 140), (88, 136)]),
        ("ccsr_v1", (33, 65), 2, [(130, 66), (128, 64, lanczos)]),
        ("ccsr_v1", (33, 64), 2, [(128, 66), (128, 64, lanczos)]),
        ("ccsr_v1", (10, 41), 4, [(164, 40), (263, 64), (256, 64, lanczos)]),  # 1.6 * 164 = 262.4 rounds up
    ]
    for rule, size, scale, resizes in cases:
        found = prepare(image(*size), scale, rule, 1, short_side=64)
        assert torch.equal(found.x, pillow(size, *resizes)), (rule, size)
        assert found.shape == found.upscaled == tuple(found.x.shape[2:])
    found = prepare(image(10, 41), 4, "consissr", 1, short_side=64)
    assert found.shape == (64, 320) and found.upscaled == (64, 263)
    assert torch.equal(found.x[..., :263], pillow((10, 41), (164, 40), (263, 64)))
    assert (found.x[..., 263:] == -1).all(), "black up to multiples of 64"
    tall = prepare(image(41, 10), 4, "consissr", 1, short_side=64)
    assert tall.shape == tuple(tall.x.shape[2:]) == (320, 64) and (tall.x[..., 263:, :] == -1).all()
    assert prepare(image(10, 20), 1, "consissr", 1).upscaled == (512, 1024), "both releases' short side"


def test_padded_input_is_the_image_resized():
    found = prepare(image(37, 53), 2, "pad", 8)
    assert found.shape == tuple(found.x.shape[2:]) == (80, 112) and found.upscaled == (74, 106)
    assert found.device == prepare(image(37, 53), 1, "ccsr", 8).device == torch.device("cpu")
    assert torch.equal(found.x[..., :74, :106], resize(image(37, 53), (74, 106)))
    assert torch.equal(torch.cat([found.rows(*rows) for rows in ((0, 9), (9, 77), (77, 80))], 2), found.x)


@pytest.mark.parametrize("rule", ["pad", "ccsr", "ccsr_v1", "consissr"])
@pytest.mark.parametrize("fix", ["none", "adain", "wavelet"])
def test_endings_by_hand(rule, fix):
    """CCSR v2 rounds to 8 bits and transfers the colours of those; the others transfer, then cut down to 8 bits."""
    x, y = image(16, 24).double(), image(16, 25)[..., :24].double() * 1.3 + 0.05  # some of y beyond [-1, 1]
    if rule == "consissr":
        x[..., 20:], y[..., 20:] = -1, 1.2  # its padding takes part in the colours' statistics
    size = (16, 20) if rule == "consissr" else (16, 24)
    content, style = y / 2 + 0.5, x / 2 + 0.5
    if rule == "ccsr":
        content = (content.clamp(0, 1) * 255).round() / 255
    if fix != "none":
        content = getattr(color, fix)(content, style)
    wanted = (content * 2 - 1).clamp(-1, 1)[..., : size[1]]
    if rule != "pad":
        levels = (content.clamp(0, 1) * 255)[..., : size[1]]
        wanted = (levels.round() if (rule, fix) == ("ccsr", "none") else levels.floor()) / 127.5 - 1
    result = finish(Prepared.of(x, size, size), y.clone(), rule, fix).double()
    assert ((result - wanted).abs() > 1e-5).double().mean() < 0.002  # 1e-5 moves a pixel at the edge of its level


@pytest.mark.parametrize("rule", ["pad", "ccsr", "ccsr_v1", "consissr"])
@pytest.mark.parametrize("fix", ["adain", "wavelet"])
def test_part_of_the_colours(rule, fix):
    """At strength 0 none, exactly; at 1/4 a quarter of the way, to within the levels that are cut."""
    x, y = image(16, 24), image(16, 25)[..., :24] * 0.5 + 0.1
    results = {
        (name, strength): finish(Prepared.of(x, (16, 24), (16, 24)), y.clone(), rule, name, *strength)
        for name, strength in (("none", ()), (fix, (0.0,)), (fix, (0.25,)), (fix, (1.0,)), (fix, ()))
    }
    none, whole = results["none", ()], results[fix, (1.0,)]
    assert torch.equal(results[fix, (0.0,)], none) and torch.equal(results[fix, ()], whole)
    assert (none - whole).abs().mean() > 0.05
    if fix == "adain":
        moments = lambda t: torch.stack([t.mean((2, 3)), t.std((2, 3))])  # noqa: E731
        none, whole, some = moments(none), moments(whole), moments(results[fix, (0.25,)])
    else:
        some = results[fix, (0.25,)]
    assert (some - torch.lerp(none, whole, 0.25)).abs().max() < 2.1 / 127.5


@pytest.mark.parametrize(("rule", "kind"), [("ccsr", "BICUBIC"), ("ccsr_v1", "LANCZOS"), ("consissr", "LANCZOS")])
def test_endings_resize_with_pillow(rule, kind):
    x = image(16, 24)
    result = finish(Prepared.of(x, (11, 31), (16, 24)), x.clone(), rule, "none")
    levels = np.asarray(to_pil(x)) if rule == "ccsr" else np.floor((x[0] / 2 + 0.5).permute(1, 2, 0).numpy() * 255)
    wanted = Image.fromarray(levels.astype(np.uint8)).resize((31, 11), Image.Resampling[kind])
    assert torch.equal(result, to_tensor(wanted))


def test_a_margin_of_the_reflected_image():
    """The networks see it on all sides, results do not; colours come from the image alone."""
    x = image(10, 13)
    found = prepare(x, 2, "pad", 8, margin=3)
    assert found.shape == (32, 32) and found.upscaled == (20, 26)
    wide = np.pad(resize(x, (20, 26))[0].numpy(), [(0, 0), (3, 9), (3, 3)], "reflect")
    assert (found.x[0].numpy() == wide).all()
    y = found.x * 0.5
    plain = finish(prepare(x, 2, "pad", 1), y[:, :, 3:23, 3:29].clone(), "pad", "adain")
    assert torch.allclose(finish(found, y, "pad", "adain"), plain, atol=1e-6)


def test_large_images_take_their_colours_strip_by_strip():
    """As the whole does, up to rounding: 600 rows are three strips, whose blurs look beyond their borders."""
    x, y = image(600, 20), image(600, 21)[..., :20] * 0.8 + 0.1
    for fix in ("adain", "wavelet"):
        whole = getattr(color, fix)(y / 2 + 0.5, x / 2 + 0.5) * 2 - 1
        rows = transfer(y / 2 + 0.5, lambda top, bottom: x[:, :, top:bottom], fix)  # under the released rules
        assert torch.allclose(rows, whole / 2 + 0.5, atol=1e-6)
        found = finish(Prepared.of(x, (600, 20), (600, 20)), y.clone(), "pad", fix)
        assert torch.allclose(found, whole.clamp(-1, 1), atol=2e-6)


def test_small_results_are_made_as_large_as_the_networks_were_trained_for():
    """The short side is raised to `short_side`, and the result has the exact size, for every scale and shape."""
    for size, scale, raised in (((37, 53), 4, (512, 733)), ((30, 20), 2.5, (768, 512)), ((128, 200), 4, (512, 800))):
        found = prepare(image(*size), scale, "pad", 64, short_side=512)
        assert found.upscaled == raised and all(side % 64 == 0 and side >= 512 for side in found.x.shape[2:])
        result = finish(found, found.x.clone(), "pad", "adain")
        assert tuple(result.shape[2:]) == found.size == tuple(int(scale * side + 0.5) for side in size)
        want = prepare(image(*size), scale, "pad", 1).x  # enlarged and brought back: close to what it was
        assert (result - want).abs().mean() < 0.02
    assert prepare(image(37, 53), 4, "pad", 64).upscaled == (148, 212)


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
    grey = Image.new("L", (3, 2), 51)
    assert torch.allclose(to_tensor(grey), torch.full((1, 3, 2, 3), 51 / 127.5 - 1))
