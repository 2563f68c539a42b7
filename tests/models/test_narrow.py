"""A narrower decoder: which channels it begins with, what it shares, and that a folder keeps it."""

import pytest
import torch
from torch import nn

from consissr.errors import UserError
from consissr.models.vae.latents import empty_latents, narrowed
from consissr.models.vae.narrow import narrow_widths, strongest
from consissr.weights.latents import load_latents, save_latents

SETTINGS = {
    "in_channels": 12,
    "out_channels": 12,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "linear_path": True,
}


@pytest.fixture
def latents():
    torch.manual_seed(0)
    return empty_latents(SETTINGS).eval().requires_grad_(False)


def test_the_strongest_channels_of_every_group_are_kept():
    layer = nn.Conv2d(2, 8, 1)
    layer.weight.data.copy_(torch.tensor([1.0, 9, 2, 8, 7, 3, 0, 4])[:, None, None, None].expand(8, 2, 1, 1))
    assert strongest(layer, 8, 4, 2).tolist() == [1, 3, 4, 7]
    assert strongest(layer, 8, 3, 1).tolist() == [1, 3, 4]


def test_same_latents_fewer_weights(latents):
    narrow = narrowed(latents, 0.5)
    x = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(narrow.encode(x), latents.encode(x))
    counts = [sum(p.numel() for p in made.vae.decoder.parameters()) for made in (narrow, latents)]
    assert counts[0] < 0.3 * counts[1]
    z = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    assert narrow.decode(z).shape == latents.decode(z).shape
    assert torch.equal(narrowed(latents, 1.0).decode(z), latents.decode(z))


def test_channels_that_carry_nothing_go_in_every_layer(latents):
    """Where half the channels of every group are idle, the narrow decoder has the other half of every layer."""
    decoder, idle = latents.vae.decoder, {16: torch.arange(16) % 4 > 1, 32: torch.arange(32) % 8 > 3}
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if (gone := idle.get(len(module.weight))) is not None:
                module.weight[gone], module.bias[gone] = 0, 0
            if (gone := idle.get(module.weight.shape[1])) is not None:
                module.weight[:, gone] = 0
        elif isinstance(module, nn.GroupNorm):
            module.bias.zero_()
    z = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    narrow = narrowed(latents, 0.5)
    kept = dict(decoder.named_parameters())
    for name, small in narrow.vae.decoder.named_parameters():
        large = kept[name]
        for dim, size in enumerate(large.shape):
            if small.shape[dim] != size:
                large = large.index_select(dim, (~idle[size]).nonzero()[:, 0])
        assert torch.equal(small, large), name
    assert narrow.decode(z).isfinite().all()


def test_a_folder_keeps_it(latents, tmp_path):
    narrow = narrowed(latents, 0.5)
    save_latents(tmp_path, narrow)
    z = torch.randn(1, 4, 4, 6)
    assert torch.equal(load_latents(tmp_path).decode(z), narrow.decode(z))
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"decoder_width": 0.5,', ""))
    with pytest.raises(UserError):
        load_latents(tmp_path)


def test_mistakes_are_named(latents):
    with pytest.raises(UserError, match="factor is 0"):
        narrowed(latents, 0.0)
    with pytest.raises(UserError, match="narrow already"):
        narrowed(narrowed(latents, 0.5), 0.5)
    with pytest.raises(UserError, match="larger factor"):
        narrow_widths([16, 32], 0.1, 4)
