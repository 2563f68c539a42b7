"""The ControlNet: the hint's two forms, what is copied from the UNet, saving and loading."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from consissr.config.model import ModelConfig
from consissr.models.controlnet import HintFeatures, LatentHint, build_controlnet, empty_controlnet
from consissr.models.surgery import added_parameters, replace_blocks

FEATURES = ModelConfig(position_embedding=16, transposed_attention=True, image_prompt="hpa", hint="stack")


def test_hint_forms():
    conv, stack = LatentHint("conv", 4, 320), LatentHint("stack", 4, 320)
    assert sum(p.numel() for p in conv.parameters()) == 11_840, "as CCSR v2's condition_conv_in"
    assert sum(p.numel() for p in stack.parameters()) == 1_086_624, "as ConsisSR's input_hint_block"
    z = torch.randn(2, 4, 5, 7)
    assert conv(z).shape == stack(z).shape == (2, 320, 5, 7)
    assert conv(z).abs().max() > 0
    assert stack(z).abs().max() == 0
    assert LatentHint("stack", 16, 64)(torch.randn(1, 16, 4, 4)).shape == (1, 64, 4, 4)


@torch.no_grad()
def test_hints_are_their_convolutions():
    """'conv' is one 3 x 3 convolution; 'stack' eight with SiLU between them; features that are known pass."""
    z = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    conv, stack = LatentHint("conv", 4, 32), LatentHint("stack", 4, 32)
    assert torch.equal(conv(z), F.conv2d(z, conv[0].weight, conv[0].bias, padding=1))
    torch.nn.init.normal_(stack[-1].weight)
    x, layers = z, [layer for layer in stack if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in layers] == [16, 16, 32, 32, 96, 96, 256, 32]
    for i, layer in enumerate(layers):
        x = F.conv2d(F.silu(x) if i else x, layer.weight, layer.bias, padding=1)
    assert torch.allclose(stack(z), x, atol=1e-6)
    for hint in (conv, stack):
        assert hint(HintFeatures(z)) is z


@pytest.mark.parametrize("replaced_first", [False, True])
def test_a_new_controlnet_copies_the_unets_encoder(make_unet, replaced_first):
    from diffusers import ControlNetModel

    unet = make_unet()
    if replaced_first:
        replace_blocks(unet, FEATURES)
        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.position_emb.data.fill_(1.0)
    controlnet = build_controlnet(unet, FEATURES)
    assert type(controlnet) is ControlNetModel
    theirs = unet.state_dict()
    added = set(added_parameters(controlnet))
    copied = [
        name
        for name in controlnet.state_dict()
        if name.startswith(("conv_in", "time_embedding", "down_blocks", "mid_block")) and name not in added
    ]
    assert len(copied) > 100
    assert all(torch.equal(controlnet.state_dict()[name], theirs[name]) for name in copied)
    assert not any(controlnet.state_dict()[name].abs().max() for name in added if "position_emb" in name)
    shared = {p.data_ptr() for p in unet.parameters()} & {p.data_ptr() for p in controlnet.parameters()}
    assert not shared, "the copy must not share memory with the frozen UNet"
    assert all(p.abs().max() == 0 for block in controlnet.controlnet_down_blocks for p in block.parameters())


def test_sizes_survive_saving(make_unet, tmp_path):
    import json

    controlnet = build_controlnet(make_unet(), FEATURES)
    controlnet.save_pretrained(tmp_path)
    again = empty_controlnet(json.loads((tmp_path / "config.json").read_text()), FEATURES)
    assert again.state_dict().keys() == controlnet.state_dict().keys()
    again.load_state_dict(controlnet.state_dict())
    assert again.config.conditioning_channels == 4, "what others read of the file"
    for kind, layers in (("conv", 1), ("stack", 15)):
        assert len(build_controlnet(make_unet(), ModelConfig(hint=kind)).controlnet_cond_embedding) == layers


def test_meta_device(make_unet):
    unet = make_unet().to("meta")
    assert all(p.is_meta for p in build_controlnet(unet, FEATURES).parameters())
