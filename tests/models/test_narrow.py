"""A narrower decoder: which channels it starts with, and that a folder keeps it."""

import pytest
import torch
from torch import nn

from consissr.errors import UserError
from consissr.models.vae.narrow import Selection, empty_latents, narrow_decoder, narrow_widths
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
    return empty_latents(SETTINGS).eval()


def test_the_strongest_channels_of_every_group_are_kept():
    layer = nn.Conv2d(2, 8, 1)
    layer.weight.data.copy_(torch.tensor([1.0, 9, 2, 8, 7, 3, 0, 4])[:, None, None, None].expand(8, 2, 1, 1))
    assert Selection(2).strongest(layer, 4).tolist() == [1, 3, 4, 7]
    assert Selection(1).strongest(layer, 3).tolist() == [1, 3, 4]


@torch.no_grad()
def test_same_latents_fewer_weights(latents):
    narrow = narrow_decoder(latents, 0.5)
    x = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(narrow.encode(x), latents.encode(x))
    counts = [sum(p.numel() for p in made.vae.decoder.parameters()) for made in (narrow, latents)]
    assert counts[0] < 0.3 * counts[1]
    z = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    assert narrow.decode(z).shape == latents.decode(z).shape
    assert torch.equal(narrow_decoder(latents, 1.0).decode(z), latents.decode(z))


@torch.no_grad()
def test_layers_agree_on_the_channels(latents):
    """The residual stream's channels are the same in all layers that read or write it."""
    full = latents.vae.decoder
    full.mid_block.resnets[0].norm1.weight.uniform_()
    narrow = narrow_decoder(latents, 0.5).vae.decoder
    kept = Selection(4).strongest(full.conv_in, 16)
    assert torch.equal(narrow.conv_in.weight, full.conv_in.weight[kept])
    small, large = narrow.mid_block.resnets[0], full.mid_block.resnets[0]
    assert torch.equal(small.norm1.weight, large.norm1.weight[kept])
    inner = Selection(4).strongest(large.conv1, 16)
    assert torch.equal(small.conv1.weight, large.conv1.weight[inner][:, kept])
    assert torch.equal(small.conv2.weight, large.conv2.weight[kept][:, inner])
    assert torch.equal(
        narrow.mid_block.attentions[0].to_q.weight, full.mid_block.attentions[0].to_q.weight[kept][:, kept]
    )


@torch.no_grad()
def test_a_folder_keeps_it(latents, tmp_path):
    narrow = narrow_decoder(latents, 0.5)
    save_latents(tmp_path, narrow)
    z = torch.randn(1, 4, 4, 6)
    assert torch.equal(load_latents(tmp_path).decode(z), narrow.decode(z))
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"decoder_width": 0.5,', ""))
    with pytest.raises(UserError):
        load_latents(tmp_path)


def test_mistakes_are_named(latents):
    with pytest.raises(UserError, match="factor is 0"):
        narrow_decoder(latents, 0.0)
    with pytest.raises(UserError, match="narrow already"):
        narrow_decoder(narrow_decoder(latents, 0.5), 0.5)
    with pytest.raises(UserError, match="larger factor"):
        narrow_widths([16, 32], 0.1, 4)
