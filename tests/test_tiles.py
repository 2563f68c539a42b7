"""The bundled model in tiles: no seams, nearly the untiled result, and memory that hardly grows with the image."""

import pytest
import torch
from PIL import Image

from ccsr import nuts_plan
from consissr.bench.tiles import measure, table
from consissr.errors import UserError
from consissr.images import codec
from consissr.images.resize import resize
from consissr.inference import progress
from consissr.models import memory
from consissr.models.tiles import OVERLAP
from consissr.models.vae.tiling import TiledLatents
from consissr.restorer import Restorer

TILE = 128


@pytest.fixture(scope="module")
def restorer():
    return Restorer.load("nano-ccsr", device="cpu")


@pytest.fixture(scope="module", params=[1, 2])
def results(restorer, root, request):
    """A photograph's part enlarged to 256x256: in one piece, in tiles, and in one piece with another seed; steps."""
    photo = codec.from_pil(Image.open(root / "consissr" / "assets" / "samples" / "cat.jpg").convert("RGB"))
    x = photo.pixels[None, :, :64, :64]
    plan = nuts_plan(6, 2 / 3, 2 / 3 if request.param == 1 else 1 / 2)
    whole = {"tile": 0, "vae_tile": 0, "plan": plan, "margin": 0}
    tiled = {
        "tile": TILE,
        "tile_overlap": int(TILE * OVERLAP),
        "vae_tile": TILE,
        "plan": plan,
        "margin": 0,
    }
    return restorer(x, 4, **whole), restorer(x, 4, **tiled), restorer(x, 4, seed=1, **whole), request.param


def test_tiles_change_little(results):
    """Half of what a second seed does, and in one step, where seeds hardly matter, two thirds."""
    whole, tiled, other, steps = results
    share = (tiled - whole).abs().mean() / (other - whole).abs().mean()
    assert 0 < share < (0.8 if steps == 1 else 0.6)


def test_no_seams(results):
    """Steps from one column (row) to the next, against those of the untiled result: no larger where tiles meet."""
    whole, tiled, *_ = results
    size, stride = whole.shape[3], TILE - int(TILE * OVERLAP)
    starts = [*range(0, size - TILE, stride), size - TILE]
    borders = {*starts, *(start + TILE for start in starts), *range(0, size, TILE)} - {0, size}
    at = torch.tensor([i + 1 in borders for i in range(size - 1)])
    for axis, others in ((3, (0, 1, 2)), (2, (0, 1, 3))):
        ratio = tiled.diff(dim=axis).abs().mean(others) / whole.diff(dim=axis).abs().mean(others)
        assert ratio[at].mean() < 1.05 * ratio[~at].mean()


def test_no_frame_on_dark_pictures(restorer):
    """What the networks make of the zeros beyond their input is cut off with the margin."""
    lq = torch.linspace(-1, -0.94, 48).expand(1, 3, 48, 48).contiguous()
    frames = []
    for margin in (0, restorer.sampler.margin):
        off = 127.5 * (restorer(lq, 4, margin=margin) - resize(lq, (192, 192))).mean((0, 1))
        edges = torch.cat([off[:2, 16:-16], off[-2:, 16:-16], off[16:-16, :2].T, off[16:-16, -2:].T])
        frames.append((edges - off[16:-16, 16:-16].mean()).abs().mean())
    assert frames[1] < 0.6 * frames[0], frames


def test_norms_from_a_sample_change_little(restorer, root):
    """The autoencoder in one pass of tiles, with the statistics of a quarter of the image: a level on average."""
    photo = codec.from_pil(Image.open(root / "consissr" / "assets" / "samples" / "dahlia.jpg").convert("RGB"))
    x = resize(photo.pixels[None], (384, 512))
    z = restorer.latents.encode(x)
    whole = restorer.latents.decode(z)
    results = []
    for side in (256, 160):
        tiled = TiledLatents(restorer.latents, side // restorer.latents.factor, "sampled")
        assert (tiled.encode(x) - z).abs().mean() < 0.02 * z.std()
        results.append(tiled.decode(z))
        assert 0 < 127.5 * (results[-1] - whole).abs().mean() < 1.5
    # Nothing depends on where tiles meet, so there are no seams.
    assert 127.5 * (results[0] - results[1]).abs().max() < 1e-3


def above_loaded(megapixels, **settings):
    """MB that restoring takes at most above the program and the model, in a process of its own."""
    (row,) = table("nano-ccsr", [megapixels], {"device": "cpu"} | settings, scale=4)
    return row["peak_mb"] - row["loaded_mb"]


def test_measuring_a_large_picture_tells_how_far_it_is(capfd, monkeypatch):
    """48 megapixels take minutes."""
    monkeypatch.setattr(progress, "SILENCE", -1)
    monkeypatch.setattr(memory, "set_heap", lambda: None)  # it is for a process of its own
    row = measure("nano-ccsr", 0.06, 2.0, {"device": "cpu", "precision": "fp32", "tile": 0, "vae_tile": TILE})
    said = capfd.readouterr().err
    assert f"0.06 megapixels.png: tile {row['tiles'] - 1} of {row['tiles']}" in said and row["tiles"] > 3


@pytest.mark.slow
def test_tiles_save_memory():
    """More than twice the pixels in less memory than in one piece."""
    whole = above_loaded(1.05, tile=0, vae_tile=0)
    assert 0 < above_loaded(2.4, tile=TILE, vae_tile=TILE) < 0.8 * whole


@pytest.mark.slow
def test_memory_hardly_grows_with_the_image():
    """Sixteen times the pixels in less than twice the memory."""
    small = above_loaded(0.26)
    assert 0 < above_loaded(4.2, tile=TILE, vae_tile=TILE) < 2 * small


@pytest.mark.slow
def test_failures_while_it_restores_are_one_line():
    with pytest.raises(UserError, match=r"0.01 megapixels with nano-crs failed: .*nano-ccsr"):
        table("nano-crs", [0.01], {})
