"""Our transformer blocks: exactly diffusers' without additions or with fresh ones; the additions' formulas."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch.nn import functional as F

from consissr.config.model import ModelConfig
from consissr.errors import UserError
from consissr.models import attention
from consissr.models.controlnet import build_controlnet
from consissr.models.denoiser import Condition, Denoiser
from consissr.models.surgery import added_parameters, our_blocks, replace_blocks, trainable_parameters

ALPHA_BAR = torch.linspace(0.99, 0.01, 1000, dtype=torch.float64)
OFF = ModelConfig()
EVERYTHING = ModelConfig(position_embedding=16, transposed_attention=True, image_prompt="hpa", image_tokens="patches")
IMAGE_FORMS = [
    ModelConfig(image_prompt=prompt, image_kv=kv, image_tokens=tokens)
    for prompt, kv in (("hpa", "shared"), ("hpa", "separate"), ("hpa_separate", "shared"), ("ip_adapter", "shared"))
    for tokens in ("pooled", "patches")
]
SIZES = [(16, 16), (8, 8), (24, 16), (11, 14)]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def condition(config: ModelConfig, size: tuple[int, int], rows: int = 2) -> Condition:
    image = draw(rows, 1 if config.image_tokens == "pooled" else 5, 24) if config.image_prompt != "none" else None
    return Condition(draw(rows, 7, 24), draw(rows, 4, *size), image)


@torch.no_grad()
def test_fresh_blocks_equal_diffusers_bit_for_bit(make_unet, fill):
    """Beside the two networks with diffusers' own blocks."""
    from diffusers import ControlNetModel

    unet, t = make_unet(), torch.tensor([5, 900])
    plain = build_controlnet(unet, OFF)
    fill(plain)
    stock = ControlNetModel.from_unet(unet)
    stock.controlnet_cond_embedding = plain.controlnet_cond_embedding
    stock.load_state_dict(plain.state_dict())
    for config in (OFF, EVERYTHING, *IMAGE_FORMS):
        ours = copy.deepcopy(unet)
        replace_blocks(ours, config)
        controlnet = build_controlnet(ours, config)
        controlnet.load_state_dict(plain.state_dict(), strict=False)
        for size in SIZES if config in (OFF, EVERYTHING) else SIZES[-1:]:
            given, z = condition(config, size), draw(2, 4, *size)
            down, middle = stock(z, t, given.text, given.hint, return_dict=False)
            both = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            eps = Denoiser(ours, controlnet, ALPHA_BAR)(z, t, given)
            assert torch.equal(eps, unet(z, t, given.text, **both).sample), (config, size)
            assert not torch.equal(eps, unet(z, t, given.text).sample), "the ControlNet must matter"


def scramble(model):
    """Random values for everything that was added."""
    added = set(added_parameters(model))
    for name, parameter in model.named_parameters():
        if name in added:
            parameter.data.copy_(0.3 * draw(*parameter.shape))


@pytest.mark.parametrize("config", [EVERYTHING, *IMAGE_FORMS], ids=str)
@torch.no_grad()
def test_every_addition_matters(make_unet, config):
    unet = make_unet()
    given, z, t = condition(config, (16, 16)), draw(2, 4, 16, 16), torch.tensor([5, 900])
    before = unet(z, t, given.text).sample
    replace_blocks(unet, config)
    scramble(unet)
    denoiser = Denoiser(unet, build_controlnet(unet, config), ALPHA_BAR)  # a new ControlNet adds zeros
    eps = denoiser(z, t, given)
    assert (eps - before).abs().max() > 1e-3
    other = denoiser(z, t, replace(given, image=given.image.flip(0)))
    assert (eps - other).abs().max() > 1e-3, "the image tokens must matter"
    added = dict(unet.named_parameters())
    for name in added_parameters(unet):
        if not name.startswith(("down_blocks.0", "mid_block", "up_blocks.2.attentions.1")):
            continue  # one block on the way down, one in the middle, one on the way up
        kept = added[name].data.clone()
        added[name].data.add_(0.5 * draw(*kept.shape))
        changed = denoiser(z, t, given)
        added[name].data.copy_(kept)
        if name.endswith("to_k_ip.weight") and config.image_tokens == "pooled":
            assert torch.equal(changed, eps), "one token has no use for keys"
        else:
            assert not torch.equal(changed, eps), name


@pytest.mark.parametrize("config", [EVERYTHING, replace(EVERYTHING, hint="stack"), *IMAGE_FORMS], ids=str)
def test_after_two_steps_every_trainable_tensor_has_a_gradient(make_unet, config):
    unet = make_unet()
    replace_blocks(unet, config)
    unet.requires_grad_(False)
    controlnet = build_controlnet(unet, config)
    trained = set(trainable_parameters(unet))
    frozen = set(added_parameters(controlnet)) - set(trainable_parameters(controlnet))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in trained)
    for name, parameter in controlnet.named_parameters():
        parameter.requires_grad_(name not in frozen)
    parameters = [*unet.named_parameters(), *((f"controlnet.{n}", p) for n, p in controlnet.named_parameters())]
    learning = {name: p for name, p in parameters if p.requires_grad}
    optimizer = torch.optim.Adam(learning.values(), lr=1e-2)
    denoiser, given = Denoiser(unet, controlnet, ALPHA_BAR), condition(config, (16, 16))
    for step in range(3):
        optimizer.zero_grad()
        eps = denoiser(draw(2, 4, 16, 16), torch.tensor([5, 900]), given)
        (eps - draw(2, 4, 16, 16)).square().mean().backward()
        if step < 2:
            optimizer.step()
    dead = [name for name, p in learning.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


def test_positions_are_exact_at_their_size_and_interpolated_elsewhere(make_unet):
    unet = make_unet()
    replace_blocks(unet, ModelConfig(position_embedding=16))
    layer = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    assert layer.side == 8
    layer.position_emb.data.copy_(draw(64, 16))
    assert layer.positions((8, 8)) is layer.position_emb
    row = torch.arange(8.0)
    layer.position_emb.data.copy_(row.repeat_interleave(8)[:, None].expand(64, 16))
    taller = layer.positions((16, 5)).reshape(16, 5, 16)
    inner = taller[4:12, 0, 0]
    assert torch.allclose(inner, torch.arange(1.75, 5.5, 0.5), atol=0.06), "rows must vary along the height"
    assert torch.allclose(taller[:, :1], taller[:, 4:], atol=1e-5), "and not along the width"


def test_positions_halve_with_the_map(make_unet):
    """Of a 16x16 latent: as many at every level as it has pixels there, on the way down, in the middle, and up."""
    unet = make_unet()
    replace_blocks(unet, ModelConfig(position_embedding=16))
    sides = {name: block.attn1.side for name, block in our_blocks(unet)}
    wanted = {"down_blocks.0": 16, "down_blocks.1": 8, "mid_block": 4, "up_blocks.1": 8, "up_blocks.2": 16}
    assert sides == {name: next(s for start, s in wanted.items() if name.startswith(start)) for name in sides}
    assert {name.split(".attentions")[0] for name in sides} == set(wanted)


def test_blocks_that_are_not_stable_diffusions_are_refused(make_unet):
    message = (
        r"^the base's transformer blocks are not Stable Diffusion's \(self, cross, feed-forward\): use SD2.1-base$"
    )
    for name, value in (
        ("norm_type", "ada_norm"),
        ("norm_type", None),
        ("only_cross_attention", True),
        ("attn2", None),
    ):
        unet = make_unet()
        block = unet.mid_block.attentions[0].transformer_blocks[0]
        setattr(block, name, value)
        with pytest.raises(UserError, match=message):
            replace_blocks(unet, ModelConfig())


@torch.no_grad()
def test_self_attention_adds_positions_to_queries_and_keys_only(make_unet):
    unet = make_unet()
    replace_blocks(unet, ModelConfig(position_embedding=16))
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    layer.position_emb.data.copy_(draw(256, 16))
    x = draw(1, 256, 32)
    q, k, v = (f(x)[0].reshape(256, 2, 16) for f in (layer.to_q, layer.to_k, layer.to_v))
    p = layer.position_emb[:, None]
    weights = torch.einsum("ihd,jhd->hij", q + p, k + p).div(4).softmax(-1)
    want = layer.to_out[0](torch.einsum("hij,jhd->ihd", weights, v).reshape(256, 32))
    assert torch.allclose(layer(x, (16, 16))[0], want, atol=1e-5)


@torch.no_grad()
def test_exact_positions_in_a_rounded_layer(make_unet):
    """Training keeps what it trains in float32 and what is frozen in bfloat16."""
    unet = make_unet().to(torch.bfloat16)
    replace_blocks(unet, ModelConfig(position_embedding=16))
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    layer.position_emb.data = draw(256, 16)
    assert layer(draw(1, 256, 32).bfloat16(), (16, 16)).dtype == torch.bfloat16


@torch.no_grad()
def test_transposed_attention_is_its_formula_on_a_map_that_is_not_square():
    layer = attention.TransposedAttention(12, 3, torch.zeros(1))
    layer.to_out[0].weight.data.copy_(draw(12, 12))
    x, (h, w) = draw(2, 35, 12), (5, 7)
    maps = F.conv2d(x.transpose(1, 2).reshape(2, 12, h, w), layer.to_qkv.weight)
    maps = F.conv2d(maps, layer.qkv_dwconv.weight, padding=1, groups=36).flatten(2)
    want = torch.empty(2, 12, 35)
    for head in range(3):
        q, k, v = (maps[:, 12 * i + 4 * head : 12 * i + 4 * head + 4] for i in range(3))
        want[:, 4 * head : 4 * head + 4] = ((q @ k.transpose(1, 2)) / 35**0.5).softmax(-1) @ v
    assert torch.allclose(layer(x, (h, w)), layer.to_out[0](want.transpose(1, 2)), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5])
@torch.no_grad()
def test_hpa_adds_the_image_per_head_before_the_heads_merge(make_unet, tokens):
    unet = make_unet()
    kind = "pooled" if tokens == 1 else "patches"
    replace_blocks(unet, ModelConfig(image_prompt="hpa", image_tokens=kind))
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.to_out_ip[0].weight.data.copy_(draw(16, 16))
    layer.to_out_ip[0].bias.data.copy_(draw(16))
    x, text, image = draw(2, 9, 64), draw(2, 7, 24), draw(2, tokens, 24)
    q = layer.to_q(x).reshape(2, 9, 4, 16)

    def attend(context):
        k, v = (f(context).reshape(2, -1, 4, 16) for f in (layer.to_k, layer.to_v))
        return torch.einsum("bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", q, k).div(4).softmax(-1), v)

    want = layer.to_out[0]((attend(text) + layer.to_out_ip[0](attend(image))).flatten(2))
    assert torch.allclose(layer(x, text, image), want, atol=1e-5)


@pytest.mark.parametrize(("kv", "copies"), [("shared", 0), ("separate", 2)])
def test_hpa_uses_the_texts_projections_unless_separate(make_unet, kv, copies):
    unet = make_unet()
    before = sum(p.numel() for p in unet.parameters())
    added = replace_blocks(unet, ModelConfig(image_prompt="hpa", image_kv=kv))
    blocks = sum(isinstance(m, attention.TransformerBlock) for m in unet.modules())
    assert blocks == 7
    assert sum("to_k_ip" in name or "to_v_ip" in name for name in added) == copies * blocks
    assert not [name for name in trainable_parameters(unet) if "to_k_ip" in name or "to_v_ip" in name]
    sizes = {name: p.numel() for name, p in unet.named_parameters()}
    assert sum(sizes.values()) == before + sum(sizes[name] for name in added)


def test_additions_take_after_the_loaded_layers(make_unet):
    """Their type, and a norm's epsilon; a new norm starts as one that only normalises."""
    unet = make_unet().to(torch.bfloat16)
    for layer in unet.modules():
        if isinstance(layer, torch.nn.LayerNorm):
            layer.eps = 0.25
    replace_blocks(unet, EVERYTHING)
    assert {unet.get_parameter(name).dtype for name in added_parameters(unet)} == {torch.bfloat16}
    norm = unet.down_blocks[0].attentions[0].transformer_blocks[0].normT
    assert norm.eps == 0.25 and (norm.weight == 1).all() and (norm.bias == 0).all()
    assert norm(torch.tensor([[3.0, 5.0] * 16]).bfloat16())[0, 1].item() == pytest.approx(1 / 1.25**0.5, abs=0.005)


def test_block_names_stay_diffusers_names(make_unet):
    unet = make_unet()
    names = set(unet.state_dict())
    added = replace_blocks(unet, EVERYTHING)
    assert set(unet.state_dict()) == names | set(added)
    assert not names & set(added)


@pytest.mark.parametrize(
    ("latent", "tokens", "size"), [((64, 64), 256, (16, 16)), ((11, 14), 42, (6, 7)), ((3, 200), 50, (1, 50))]
)
def test_a_blocks_map_size_follows_from_its_token_count(latent, tokens, size):
    assert attention.map_size(latent, tokens) == size


def test_wrong_uses_raise(make_unet):
    unet = make_unet()
    replace_blocks(unet, EVERYTHING)
    z, t, text = draw(1, 4, 16, 16), torch.tensor([5]), draw(1, 7, 24)
    with pytest.raises(ValueError, match="^this network attends to image tokens"):
        unet(z, t, text)
    for mask in ("attention_mask", "encoder_attention_mask"):
        with pytest.raises(ValueError, match="^attention masks are not supported$"):
            unet.mid_block.attentions[0].transformer_blocks[0](draw(1, 9, 64), **{mask: draw(1, 9)})
    with pytest.raises(ValueError, match="^this network needs the latent's size"):
        unet(z, t, text, cross_attention_kwargs={"image": draw(1, 5, 24)})
    for config in (ModelConfig(position_embedding=16), ModelConfig(transposed_attention=True), OFF):
        sized = make_unet()
        replace_blocks(sized, config)
        denoiser, oblong = Denoiser(sized, build_controlnet(sized, config), ALPHA_BAR), z[..., :8, :12]
        assert denoiser(oblong, t, Condition(text, oblong)).shape == (1, 4, 8, 12)
        with (
            nullcontext() if config is OFF else pytest.raises(ValueError, match="^this network needs the latent's size")
        ):
            sized(z, t, text)
    with pytest.raises(ValueError, match="^no level of a 16x12 latent has 65 positions$"):
        attention.map_size((16, 12), 65)
    pooled = make_unet()
    replace_blocks(pooled, ModelConfig(image_prompt="ip_adapter"))
    with pytest.raises(ValueError, match="^this network was made for one pooled image token, not 5$"):
        pooled(z, t, text, cross_attention_kwargs={"image": draw(1, 5, 24)})


def test_gradient_checkpointing_gives_the_same_gradients(make_unet):
    results = []
    for checkpointing in (False, True):
        unet = make_unet().train()
        replace_blocks(unet, EVERYTHING)
        scramble(unet)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        denoiser = Denoiser(unet, build_controlnet(unet, EVERYTHING), ALPHA_BAR)
        eps = denoiser(draw(2, 4, 8, 16), torch.tensor([5, 900]), condition(EVERYTHING, (8, 16)))
        eps.square().mean().backward()
        results.append([p.grad for p in unet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_positions_of_other_sizes_are_bicubic():
    """Of a 4 x 4 map, at 8 x 8: new places lie a quarter to either side of old ones; the cubic of a = -0.75."""
    layer = attention.SelfAttention(Attention(query_dim=6, heads=2, dim_head=3), side=4)
    torch.nn.init.normal_(layer.position_emb)

    def cubic(x):
        return 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)

    taps = torch.zeros(8, 4)
    for new in range(8):
        old = (new + 0.5) / 2 - 0.5
        for at in range(math.floor(old) - 1, math.floor(old) + 3):
            taps[new, min(max(at, 0), 3)] += cubic(abs(old - at))
    wanted = torch.einsum("ri,cj,ijd->rcd", taps, taps, layer.position_emb.view(4, 4, -1)).flatten(0, 1)
    assert torch.allclose(layer.positions((8, 8)), wanted, atol=1e-5)
