"""The tiled autoencoder against the untiled one."""

import pytest
import torch

from consissr.models.vae.latents import Latents
from consissr.models.vae.operations import WINDOW_MARGIN
from consissr.models.vae.released import PooledTiles, best_size
from consissr.models.vae.sampled import SampledTiles
from consissr.models.vae.tiling import TiledLatents


def autoencoder(channels, widths):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=4,
    )
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return Latents(vae.eval().requires_grad_(False))


@pytest.fixture(scope="module", params=[(3, (8, 8, 16, 16)), (12, (8, 16, 16))], ids=["factor 8", "space-to-depth"])
def latents(request):
    return autoencoder(*request.param)


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 104, 136, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_exact_tiles_equal_the_whole(latents, image):
    z, moments = latents.encode(image), latents.moments(image)
    decoded = latents.decode(z)
    for tile in (3, 5, 8):
        tiled = TiledLatents(latents, tile)
        for got, want in zip((*tiled.moments(image), tiled.decode(z)), (*moments, decoded), strict=True):
            assert (got - want).abs().max() <= 1e-4 * (want.max() - want.min()), tile


def test_pooled_tiles_approximate(latents):
    z = torch.randn(1, 4, 36, 40, generator=torch.Generator().manual_seed(1))
    got, want = TiledLatents(latents, 12, "as_released").decode(z), latents.decode(z)
    assert got.shape == want.shape
    assert 1e-6 < (got - want).norm() / want.norm() < 0.5


def test_small_images_are_not_tiled(latents, image):
    assert torch.equal(TiledLatents(latents, 21).encode(image), latents.encode(image))


def test_tiles_draw_no_random_numbers():
    """Who trains and restores in one process gets the same training with tiles and without."""
    vae = autoencoder(12, (8, 16)).vae
    vae.register_to_config(linear_path=True)
    linear, state = Latents(vae), torch.get_rng_state()
    tiled = TiledLatents(linear, 8)
    assert torch.equal(torch.get_rng_state(), state) and tiled.linear is linear.linear


def test_tiles_of_the_release_cover_the_latent():
    tiler = PooledTiles([], 16)
    for length in (39, 40, 64, 100):
        spans = tiler.spans(length)
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert [best_size(*pair) for pair in ((9, 16), (13, 16), (17, 224), (17, 17))] == [16, 16, 32, 17]


def test_exact_tiles_need_less_memory(latents):
    """The largest tensor that one pass makes, tiled and not."""
    z = torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(1))

    def largest(decode):
        sizes = []
        hooks = [
            module.register_forward_hook(lambda module, inputs, out: sizes.append(out.numel()))
            for module in latents.vae.modules()
            if isinstance(module, torch.nn.Conv2d)
        ]
        original = torch.nn.functional.conv2d

        def conv2d(*arguments, **options):
            out = original(*arguments, **options)
            sizes.append(out.numel())
            return out

        torch.nn.functional.conv2d = conv2d
        try:
            decode(z)
        finally:
            torch.nn.functional.conv2d = original
            for hook in hooks:
                hook.remove()
        return max(sizes)

    assert largest(TiledLatents(latents, 8).decode) < 0.3 * largest(latents.decode)


def test_sampled_attention_costs_as_much_as_the_area(latents, monkeypatch):
    """One window per tile, no larger than what the tile needs; `exact` looks at all pairs of positions."""
    pairs, original = [], torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, *rest, **options):
        pairs.append(query.shape[-2] * key.shape[-2])
        return original(query, key, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(SampledTiles, "sample", lambda self, x: self.statistics.update(even(self.ops)))
    z = torch.randn(1, 4, 72, 72, generator=torch.Generator().manual_seed(1))
    TiledLatents(latents, 12, "sampled").decode(z)
    convolutions = 11  # what those after the attention see around a tile
    assert len(pairs) == (72 // 12) ** 2 and 12**4 < max(pairs) <= (12 + 2 * (WINDOW_MARGIN + convolutions)) ** 4
    pairs.clear()
    TiledLatents(latents, 6).decode(z[..., :24, :24])
    assert pairs == [24**4]


def even(ops):
    """Means 0 and variances 1 for every norm of `ops`: what a sample says is not looked at here."""
    groups = {i: op.module for i, op in enumerate(ops) if op.kind == "norm"}
    groups |= {i: op.module.group_norm for i, op in enumerate(ops) if op.kind == "attention"}
    return {i: (torch.zeros(1, norm.num_groups), torch.ones(1, norm.num_groups)) for i, norm in groups.items()}
