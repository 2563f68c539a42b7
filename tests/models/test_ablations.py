"""Image branches beside HPA's, in plain tensor code: the release's, IP-Adapter's and the layer of its own (Table 3)."""

from __future__ import annotations

import pytest
import torch

from consissr.config.model import ModelConfig
from consissr.models.surgery import replace_blocks

X, TEXT = (2, 9, 64), (2, 7, 24)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def block_of(unet, **config):
    """The middle block, 4 heads of 16, with random values for all that starts at zero or as a copy."""
    replace_blocks(unet, ModelConfig(**config))
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    generator = torch.Generator().manual_seed(7)  # no two layers alike, or one could stand for another
    for name in block.added:
        block.get_parameter(name).data.normal_(std=0.3, generator=generator)
    return block


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(16)) v for each of 4 heads, all (B, N, 64)."""
    q, k, v = (x.reshape(2, -1, 4, 16) for x in (q, k, v))
    return torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", q, k).div(4).softmax(-1), v).flatten(2)


@pytest.mark.parametrize(("tokens", "kind"), [(1, "pooled"), (5, "patches")])
@torch.no_grad()
def test_the_releases_adapter_has_keys_and_values_of_its_own(make_unet, tokens, kind):
    layer = block_of(make_unet(), image_prompt="hpa", image_kv="separate", image_tokens=kind).attn2
    x, text, image = draw(*X), draw(*TEXT), draw(2, tokens, 24)
    q = layer.to_q(x)
    branch = attend(q, layer.to_k_ip(image), layer.to_v_ip(image)).reshape(2, 9, 4, 16)
    want = attend(q, layer.to_k(text), layer.to_v(text)) + layer.to_out_ip[0](branch).flatten(2)
    assert torch.allclose(layer(x, text, image), layer.to_out[0](want), atol=1e-5)


@pytest.mark.parametrize(("tokens", "kind"), [(1, "pooled"), (5, "patches")])
@torch.no_grad()
def test_ip_adapter_adds_its_branch_as_it_is(make_unet, tokens, kind):
    layer = block_of(make_unet(), image_prompt="ip_adapter", image_tokens=kind).attn2
    x, text, image = draw(*X), draw(*TEXT), draw(2, tokens, 24)
    q = layer.to_q(x)
    assert (layer.to_k_ip is None) == (tokens == 1), "one token has no use for keys"
    branch = attend(q, layer.to_k_ip(image), layer.to_v_ip(image)) if tokens > 1 else layer.to_v_ip(image)
    want = attend(q, layer.to_k(text), layer.to_v(text)) + branch
    assert torch.allclose(layer(x, text, image), layer.to_out[0](want), atol=1e-5)


@pytest.mark.parametrize(("tokens", "kind"), [(1, "pooled"), (5, "patches")])
@torch.no_grad()
def test_the_separate_layer_attends_to_the_image_alone(make_unet, tokens, kind):
    block = block_of(make_unet(), image_prompt="hpa_separate", image_tokens=kind)
    layer, x, image = block.attnI, draw(*X), draw(2, tokens, 24)
    assert [layer.norm is None, layer.to_q is None] == [tokens == 1] * 2, "one token has no use for them"
    want = block.attn2.to_v(image)
    if tokens > 1:
        want = attend(layer.to_q(layer.norm(x)), block.attn2.to_k(image), want)
    output = layer.to_out[0]
    assert torch.allclose(layer(x, image, block.attn2), want @ output.weight.T + output.bias, atol=1e-5)


@pytest.mark.parametrize("prompt", ["hpa", "hpa_separate"])
@pytest.mark.parametrize(("tokens", "kind"), [(1, "pooled"), (5, "patches")])
@torch.no_grad()
def test_a_block_is_its_layers_in_the_papers_order(make_unet, prompt, tokens, kind):
    """Self-attention, transposed attention, cross-attention, feed-forward; each behind a norm and added (Fig. 5)."""
    config = {"image_tokens": kind, "position_embedding": 12, "transposed_attention": True}
    block = block_of(make_unet(), image_prompt=prompt, **config)
    x, text, image = draw(*X), draw(*TEXT), draw(2, tokens, 24)
    read = {"image": image, "size": (12, 10)}  # halved twice: 3 x 3 positions
    got = block(x, encoder_hidden_states=text, cross_attention_kwargs=read)
    want = x + block.attn1(block.norm1(x), (3, 3))
    want = want + block.attnT(block.normT(want), (3, 3))
    want = want + block.attn2(block.norm2(want), text, image)
    if prompt == "hpa_separate":
        want = want + block.attnI(want, image, block.attn2)
    want = want + block.ff(block.norm3(want))
    assert torch.allclose(got, want, atol=1e-5)


@torch.no_grad()
def test_what_starts_as_a_copy_and_what_at_zero(make_unet):
    for prompt in ("hpa", "hpa_separate", "ip_adapter"):
        unet = make_unet()
        replace_blocks(unet, ModelConfig(image_prompt=prompt, image_kv="separate", image_tokens="patches"))
        block = unet.mid_block.attentions[0].transformer_blocks[0]
        copies = {"attn2.to_k_ip": "to_k", "attn2.to_v_ip": "to_v"}
        copies |= {"attnI.to_q": "to_q"}
        zeros = ["attn2.to_out_ip.0.", "attnI.to_out.0."] + (["attn2.to_v_ip."] if prompt == "ip_adapter" else [])
        assert block.added
        for name in block.added:
            value = block.get_parameter(name)
            if name.startswith(tuple(zeros)):
                assert value.abs().max() == 0, name
            elif name in ("attnI.norm.weight", "attnI.norm.bias"):
                assert (value == name.endswith("weight")).all(), "a new norm changes nothing else"
            else:
                source = block.attn2.get_submodule(copies[name.removesuffix(".weight")]).weight
                assert torch.equal(value, source) and value is not source, name
