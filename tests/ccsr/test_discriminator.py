"""The projected discriminator: augmentation, what learns, and reading ViT weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from ccsr import discriminator
from ccsr.adversary import DinoAdversary, build_adversary
from ccsr.discriminator import (
    Augmentation,
    ProjectedDiscriminator,
    SpectralConv1d,
    ViT,
    build_vit,
    condition_of,
    draw_windows,
    read_dino,
)
from consissr.config.deft import DeftConfig
from consissr.errors import UserError
from consissr.weights.hub import Fetched


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return ViT(side=32, patch=8, width=16, depth=12, heads=2)


@pytest.fixture
def images():
    return torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_shift_brings_in_zeros_and_the_cutout_stays_square():
    ones = torch.ones(1, 3, 20, 30)
    far = torch.tensor([-100])  # a centre far outside leaves no hole
    shifted = Augmentation(torch.tensor([2]), torch.tensor([-3]), far, far)(ones)
    assert shifted[0, 0, -2:].abs().max() == 0 and shifted[0, 0, :, :3].abs().max() == 0
    assert shifted[0, 0, :-2, 3:].min() == 1
    none = torch.tensor([0])
    hole = Augmentation(none, none, torch.tensor([10]), torch.tensor([15]))(ones)[0, 0]
    assert (hole == 0).sum() == 4 * 6 and hole[8:12, 12:18].abs().max() == 0


def test_augmentation_pixel_by_pixel():
    """out[r, c] = x[r + shift_x, c + shift_y] or 0; the hole begins half its size, rounded down, before its centre."""
    x = torch.rand(3, 3, 20, 31, generator=torch.Generator().manual_seed(0)) + 1
    draws = torch.tensor([[2, -3, 0], [-1, 4, 0], [3, 10, 19], [30, 0, 15]])
    wanted = torch.zeros_like(x)
    for image, (down, across, row, column) in enumerate(draws.T.tolist()):
        for r in range(20):
            for c in range(31):
                hole = 0 <= r - row + 2 < 4 and 0 <= c - column + 3 < 6  # a fifth of 20 and of 31, rounded
                if 0 <= r + down < 20 and 0 <= c + across < 31 and not hole:
                    wanted[image, :, r, c] = x[image, :, r + down, c + across]
    assert torch.equal(Augmentation(*draws)(x), wanted)
    assert Augmentation(*draws)(x.to("meta")).is_meta, "draws are of the CPU, images of any device"


def test_draws_reach_their_limits():
    """Shifts of an eighth, rounded; centres on every pixel, and on the far edge where the hole's side is even."""
    seeds = range(2000)
    for size, limits in (
        ((44, 40), ((-6, 6), (-5, 5), (0, 43), (0, 40))),
        ((40, 44), ((-5, 5), (-6, 6), (0, 40), (0, 43))),
    ):
        drawn = Augmentation.draw([torch.Generator().manual_seed(i) for i in seeds], *size)
        for values, (low, high) in zip(vars(drawn).values(), limits, strict=True):
            assert values.shape == (2000,) and (values.min(), values.max()) == (low, high)
        alone = Augmentation.draw([torch.Generator().manual_seed(7)], *size)
        assert [int(value) for value in vars(alone).values()] == [int(value[7]) for value in vars(drawn).values()]


def test_only_the_heads_learn(vit, images):
    judge = ProjectedDiscriminator(vit, c_dim=6).train()
    assert not judge.vit.training and judge.heads.training
    logits, features = judge(images, torch.randn(2, 6))
    assert logits.shape == (2, 5 * 16) and [f.shape for f in features] == 5 * [(2, 16, 16)]
    logits.sum().backward()
    assert all(parameter.grad is None for parameter in judge.vit.parameters())
    assert all(parameter.grad is not None for parameter in judge.heads.parameters())


def spectral(conv, x):
    """Convolution, circular at the ends, with weights over their largest singular value's estimate."""
    sigma = conv.weight_u @ conv.weight_orig.flatten(1) @ conv.weight_v
    margin = conv.weight_orig.shape[2] // 2
    x = torch.cat([x[..., x.shape[2] - margin :], x, x[..., :margin]], 2)
    return F.conv1d(x, conv.weight_orig / sigma, conv.bias)


@torch.no_grad()
def test_logits_project_features_on_the_condition(vit, images):
    """Of the embedded patches and of blocks 3, 6, 9, 12, each patch token plus the class token; as CCSR's release."""
    judge = ProjectedDiscriminator(vit, c_dim=6).eval()
    c = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    x = F.interpolate(images / 2 + 0.5, size=(32, 32), mode="area")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    embedded, *blocks = vit.tokens((x - mean) / std)
    wanted = []
    for head, tokens in zip(judge.heads, [blocks[i - 1] for i in (3, 6, 9, 12)] + [embedded], strict=True):
        y = (tokens[:, 1:] + tokens[:, :1]).transpose(1, 2)
        for i, layers in enumerate((head.main[0], head.main[1].fn)):
            new = F.group_norm(spectral(layers[0], y), 4, layers[1].weight, layers[1].bias)
            new = torch.where(new > 0, new, 0.2 * new)
            y = (new + y) / 2**0.5 if i else new
        condition = c @ head.cmapper.weight.T / 6**0.5 + head.cmapper.bias
        wanted.append((spectral(head.cls, y) * condition[:, :, None]).sum(1) / 64**0.5)
    assert torch.allclose(judge(images, c)[0], torch.cat(wanted, 1), atol=1e-4)


@torch.no_grad()
def test_a_vit_is_its_formula():
    """Patches in rows, a class token before them, positions; pre-norm attention and MLP with GELU, scaled in DINOv2."""
    torch.manual_seed(0)
    vit, x = ViT(side=16, patch=8, width=8, depth=2, heads=2, layer_scale=True), torch.rand(2, 3, 16, 16)
    for parameter in vit.parameters():
        parameter.normal_(std=0.4)
    proj = vit.patch_embed.proj
    patches = [F.linear(x[:, :, r : r + 8, c : c + 8].flatten(1), proj.weight.flatten(1), proj.bias)
               for r in (0, 8) for c in (0, 8)]  # fmt: skip
    y = torch.stack([vit.cls_token[0].expand(2, -1), *patches], 1) + vit.pos_embed
    wanted = [y]
    for block in vit.blocks:
        even = F.layer_norm(y, (8,), block.norm1.weight, block.norm1.bias, 1e-6)
        q, k, v = (part.view(2, 5, 2, 4) for part in block.attn.qkv(even).chunk(3, -1))
        shares = torch.einsum("bihd,bjhd->bhij", q, k).div(2).softmax(-1)
        y = y + block.attn.proj(torch.einsum("bhij,bjhd->bihd", shares, v).flatten(2)) * block.ls1.gamma
        even = F.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias, 1e-6)
        y = y + block.mlp.fc2(F.gelu(block.mlp.fc1(even))) * block.ls2.gamma
        wanted.append(y)
    for got, want in zip(vit.tokens(x), wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-4)
    assert torch.allclose(vit(x), F.layer_norm(y, (8,), vit.norm.weight, vit.norm.bias, 1e-6)[:, 0], atol=1e-4)


@torch.no_grad()
def test_the_judge_sees_augmented_images_through_their_windows(vit, images):
    judge = ProjectedDiscriminator(vit, c_dim=6).eval()
    c, draws = torch.randn(2, 6), torch.tensor([[2, -1], [3, 0], [9, 30], [12, 20]])
    windows = [(3, 5), (8, 16)]
    shown = Augmentation(*draws)(images)
    shown = torch.stack([shown[0, :, 3:35, 5:37], shown[1, :, 8:40, 16:48]])
    for found, wanted in zip(judge(images, c, Augmentation(*draws), windows), judge(shown, c), strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    assert not torch.allclose(judge(images, c)[0], judge(shown, c)[0], atol=1e-2)


def test_windows_show_a_part_at_its_own_size(vit, images):
    generators = [torch.Generator().manual_seed(i) for i in range(200)]
    windows = draw_windows(generators, 40, 48, vit.side)
    found = [window for window in windows if window]
    assert 60 < len(found) < 140
    assert {top for top, _ in found} == set(range(9)) and {left for _, left in found} == set(range(17))
    assert not any(draw_windows(generators, 32, 64, 32))
    again = [torch.Generator().manual_seed(i) for i in range(200)]
    assert [draw_windows([generator], 40, 48, vit.side)[0] for generator in again] == windows, "each image's own"
    judge = ProjectedDiscriminator(vit, c_dim=6)
    shown = judge.shown(images, [(3, 5), None])
    assert torch.equal(shown[0], images[0, :, 3:35, 5:37])
    assert torch.equal(shown[1:], judge.shown(images[1:], None))
    with pytest.raises(ValueError, match="shorter"):
        judge.shown(images, [(3, 5)])


def test_spectral_norm_tends_to_one():
    torch.manual_seed(0)
    conv = SpectralConv1d(6, 5, 3).train()
    for _ in range(50):
        conv(torch.randn(1, 6, 8))
    sigma = torch.linalg.matrix_norm(conv.weight_orig.flatten(1), 2)
    estimate = conv.weight_u @ conv.weight_orig.flatten(1) @ conv.weight_v
    assert estimate.item() == pytest.approx(sigma.item(), rel=1e-3)
    before = conv.weight_u.clone()
    conv.eval()(torch.randn(1, 6, 8))
    assert torch.equal(conv.weight_u, before)


def test_sizes_come_from_the_weights(vit, tmp_path):
    again = build_vit(vit.state_dict() | {"mask_token": torch.zeros(1)}, heads=2)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(again(x), vit.eval()(x))
    torch.save(vit.state_dict(), tmp_path / "dino.pth")
    assert torch.equal(read_dino(tmp_path / "dino.pth", 2)(x), vit(x))
    small = torch.rand(2, 3, 17, 9) * 2 - 1
    shown = F.interpolate(small / 2 + 0.5, size=(32, 32), mode="bilinear", align_corners=False)
    assert torch.allclose(condition_of(again, small), vit(shown), atol=1e-5)


def test_dino_has_six_heads(tmp_path):
    """Which its weights do not show."""
    torch.save(ViT(side=16, patch=8, width=12, depth=1, heads=6).state_dict(), tmp_path / "dino.pth")
    assert read_dino(tmp_path / "dino.pth").blocks[0].attn.num_heads == 6


def test_layer_scales_of_dino_v2():
    vit = ViT(side=16, patch=8, width=8, depth=1, heads=1, layer_scale=True)
    torch.nn.init.zeros_(vit.blocks[0].ls1.gamma)
    torch.nn.init.zeros_(vit.blocks[0].ls2.gamma)
    embedded, out = vit.tokens(torch.rand(1, 3, 16, 16))
    assert torch.equal(embedded, out)
    assert build_vit(vit.state_dict(), heads=1).blocks[0].ls1.gamma.abs().max() == 0


def test_missing_or_foreign_weights_are_named(tmp_path):
    for name in (
        tmp_path / "none.pth",
        "owner/none.pth",
        "./none",
        "/none",
        "~/none",
        "none",
        "a/b/none",
        "my dino/x y",
    ):
        with pytest.raises(
            UserError,
            match=rf"^DINO weights '{name}' cannot be had \(there is no such file\): download "
            r"dino_deitsmall16_pretrain\.pth and dinov2_vits14_pretrain\.pth \(or timm's model\.safetensors\) "
            "where there is a network, copy them here, and name them: deft.dino=FILE deft.dino_v2=FILE$",
        ):
            read_dino(name)
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth does not hold a DINO ViT \(.*patch_embed.*\): give DINO's weights"):
        read_dino(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(b"no")
    with pytest.raises(UserError, match=r"b\.pth was not loaded: it is no checkpoint, or damaged; download it again"):
        read_dino(tmp_path / "b.pth")
    torch.save({"patch_embed.proj.weight": Path(), "a": torch.nn.Linear(1, 1)}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c\.pth"):  # it would execute code
        read_dino(tmp_path / "c.pth")


def test_weights_come_from_the_hub_by_timms_names(vit, tmp_path, monkeypatch):
    """A hub id, with a revision or without, asks for model.safetensors; what the hub says is passed on."""
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def fetched(name, choose):
        asked.append((name, choose(["README.md", "model.safetensors"], False)))
        return Fetched(tmp_path, "0" * 40)

    monkeypatch.setattr(discriminator, "fetch", fetched)
    x = torch.rand(1, 3, 32, 32)
    for name in ("timm/vit", "timm/vit@v1"):
        assert torch.equal(read_dino(name, 2)(x), vit.eval()(x))
        assert asked.pop() == (name, ["model.safetensors"])

    def refuse(*_):
        raise UserError("the network is off")

    monkeypatch.setattr(discriminator, "fetch", refuse)
    with pytest.raises(UserError, match=r"'timm/vit' cannot be had \(.*the network is off.*\): download dino_"):
        read_dino("timm/vit")


def test_untrained_adversaries_have_the_released_sizes():
    """Dry runs: DINOv2's ViT-S/14 for 518 pixels, which tells, and DINO's ViT-S/16 for 224, which judges."""
    with torch.device("meta"):
        adversary = build_adversary(DeftConfig(discriminator="dino"), untrained=True)
    for vit, side, patch, scaled in ((adversary.summary, 518, 14, True), (adversary.discriminator.vit, 224, 16, False)):
        assert (vit.side, vit.blocks[0].attn.num_heads, len(vit.blocks)) == (side, 6, 12)
        assert vit.cls_token.shape[-1] == 384 and vit.patch_embed.proj.kernel_size == (patch, patch)
        assert any("ls1.gamma" in name for name, _ in vit.named_parameters()) == scaled
    nowhere = DeftConfig(discriminator="dino", dino="none.pth", dino_v2="none.pth")
    for build in (DinoAdversary, build_adversary):
        with pytest.raises(UserError, match="DINO weights 'none.pth' cannot be had"):
            build(nowhere)
