"""CCSR's tiled decoder: a made-up fixture in the format of `tiled_vae.safetensors`, by a slow decoder of its own.

`release` follows the release's rules as they are described, step by step, with diffusers' layers and nothing of ours.
"""

from __future__ import annotations

import json
import re
import sys
from math import ceil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

import check  # noqa: E402

TILE, MARGIN, GROUPS, EPS = 16, 11, 32, 1e-6
LARGE, SMALL = (40, 44), (10, 40)
"""Latents that make two tiles along both axes, and along one."""


def spans(length: int) -> list[tuple[int, int, int, int]]:
    """One axis: (first, last) read, and (first, last) kept, of every tile."""
    count = max(ceil((length - 2 * MARGIN) / TILE), 1)
    least = ceil((length - 2 * MARGIN) / count)
    real = next((ceil(least / m) * m for m in (32, 16, 8, 4, 2) if ceil(least / m) * m <= TILE), least)
    found = []
    for i in range(count):
        first, last = MARGIN + i * real, min(MARGIN + (i + 1) * real, length)
        kept = (first if first > MARGIN else 0, last if last < length - MARGIN else length)
        found.append((max(0, first - MARGIN), min(length, last + MARGIN), *kept))
    return found


def pooled(tiles: list[Tensor], norm: nn.GroupNorm) -> list[Tensor]:
    """Normalised by the tiles' means and variances, averaged by their pixels."""
    pixels = sum(x.shape[2] * x.shape[3] for x in tiles)
    rows = [x.double().reshape(GROUPS, -1) for x in tiles]
    shares = [x.shape[2] * x.shape[3] / pixels for x in tiles]
    mean = sum(share * row.mean(1) for share, row in zip(shares, rows, strict=True))
    variance = sum(share * row.var(1, correction=0) for share, row in zip(shares, rows, strict=True))
    found = []
    for x, row in zip(tiles, rows, strict=True):
        even = ((row - mean[:, None]) / (variance[:, None] + EPS).sqrt()).reshape(x.shape).float()
        found.append(even * norm.weight[None, :, None, None] + norm.bias[None, :, None, None])
    return found


def residual(tiles: list[Tensor], block: nn.Module) -> list[Tensor]:
    """norm, SiLU, convolution, norm, SiLU, convolution, plus the input."""
    inner = [block.conv1(nn.functional.silu(x)) for x in pooled(tiles, block.norm1)]
    inner = [block.conv2(nn.functional.silu(x)) for x in pooled(inner, block.norm2)]
    kept = tiles if block.conv_shortcut is None else [block.conv_shortcut(x) for x in tiles]
    return [x + y for x, y in zip(kept, inner, strict=True)]


def attention(tiles: list[Tensor], layer: nn.Module) -> list[Tensor]:
    """Each tile attends within itself."""
    found = []
    for x, even in zip(tiles, pooled(tiles, layer.group_norm), strict=True):
        tokens = even[0].flatten(1).T
        q, k, v = layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens)
        out = layer.to_out[0](torch.softmax(q @ k.T / q.shape[1] ** 0.5, 1) @ v)
        found.append(x + out.T.reshape(x.shape))
    return found


@torch.no_grad()
def release(vae: AutoencoderKL, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The image of an unscaled latent (1,4,h,w), and the tiles' boxes [x1, x2, y1, y2] read and written."""
    z, decoder = vae.post_quant_conv(latent), vae.decoder
    places = [(y, x) for y in spans(z.shape[2]) for x in spans(z.shape[3])]
    tiles = [decoder.conv_in(z[:, :, y[0] : y[1], x[0] : x[1]]) for y, x in places]
    first, second = decoder.mid_block.resnets
    tiles = residual(attention(residual(tiles, first), decoder.mid_block.attentions[0]), second)
    for block in decoder.up_blocks:
        for layer in block.resnets:
            tiles = residual(tiles, layer)
        for up in block.upsamplers or []:
            tiles = [up.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")) for x in tiles]
    tiles = [decoder.conv_out(nn.functional.silu(x)) for x in pooled(tiles, decoder.conv_norm_out)]
    image = torch.zeros(1, 3, 8 * z.shape[2], 8 * z.shape[3])
    for (y, x), tile in zip(places, tiles, strict=True):
        top, left = 8 * (y[2] - y[0]), 8 * (x[2] - x[0])
        part = tile[:, :, top : top + 8 * (y[3] - y[2]), left : left + 8 * (x[3] - x[2])]
        image[:, :, 8 * y[2] : 8 * y[3], 8 * x[2] : 8 * x[3]] = part
    read = torch.tensor([[x[0], x[1], y[0], y[1]] for y, x in places])
    return image, read, 8 * torch.tensor([[x[2], x[3], y[2], y[3]] for y, x in places])


def save(folder: Path, network: nn.Module, config: dict, rename: tuple[str, str] = ("", "")) -> None:
    """In the official layout, float16, as the fixtures are; the network gets the rounded values, too."""
    network.half().float().save_config(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    state = {name.replace(*rename) if rename[0] else name: t.half() for name, t in network.state_dict().items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of CCSR's format with ControlNet and autoencoder, of random weights."""
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("conformance") / "ccsr_made_up"
    controlnet = ControlNetModel(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
    )
    controlnet.controlnet_cond_embedding = nn.Conv2d(4, 32, 3, padding=1)
    renamed = ("controlnet_cond_embedding", "condition_conv_in")
    save(made / "controlnet", controlnet, {"use_vae_encode_condition": True}, renamed)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=0.18215,
    )
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    save(made / "vae", vae, {})
    return made


def record(folder: Path, size: tuple[int, int]) -> dict[str, Tensor]:
    """What `tiled_vae.safetensors` holds, for a latent of `size`."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    latent = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))
    latent[..., size[1] // 2 :] *= 3  # so that tiles have other statistics than the whole
    image, read, written = release(vae, latent)
    with torch.no_grad():
        gap = (vae.decode(latent).sample - image).abs().max()
    assert gap > 0.05, "pooled statistics must matter, or this test would pass with any decoder"
    boxes = {"input_bboxes": read, "output_bboxes": written}
    return {"latent": latent, "tiled": image, **boxes, "full_minus_tiled_absmax": gap[None]}


@pytest.fixture(scope="module")
def recorded(folder) -> dict[str, Tensor]:
    return record(folder, SMALL)


def verdict(folder: Path, recorded: dict[str, Tensor], **metadata: str) -> tuple[int, list[str]]:
    """(checks compared, names of those that failed) of the tiled decoder."""
    save_file({name: t.contiguous() for name, t in recorded.items()}, folder / "tiled_vae.safetensors", metadata)
    lines: list[str] = []
    check.run(str(folder), lines.append)
    assert not any(line.startswith("lacks    tiled_vae") for line in lines)
    rows = [line for line in lines if line.startswith("tiled_vae.safetensors:")]
    assert len(rows) == int(re.search(r"# (\d+) compared", lines[-1])[1])
    return len(rows), [re.match(r"\S+:(\w+)", line)[1] for line in rows if line.endswith("FAIL")]


@pytest.mark.parametrize("size", [pytest.param(LARGE, marks=pytest.mark.slow), SMALL])
def test_the_released_decoder_passes(folder, size):
    assert verdict(folder, record(folder, size)) == (4, [])


def test_in_other_words(folder, recorded):
    """A scaled latent, one list of boxes, tile and difference in the metadata."""
    gap = recorded["full_minus_tiled_absmax"].item()
    told = {"latent": recorded["latent"] * 0.18215, "decoded_tiled": recorded["tiled"]}
    words = {"decoder_tile": "16", "n_tiles": "2", "full_minus_tiled_absmax": str(gap)}
    boxes = json.dumps(recorded["input_bboxes"].tolist())
    assert verdict(folder, told, **words, bboxes=boxes) == (3, [])


@pytest.mark.parametrize("name", ["tiled", "latent", "input_bboxes", "output_bboxes", "full_minus_tiled_absmax"])
def test_what_is_off_fails(folder, recorded, name):
    changed = recorded[name].clone()
    changed.view(-1)[7 % changed.numel()] += 0.01 if name in ("tiled", "full_minus_tiled_absmax") else 1
    compared, failed = verdict(folder, recorded | {name: changed})
    assert compared == 4 and failed == (["tiled"] if name == "latent" else [name])


def test_the_untiled_decoder_would_fail(folder, recorded):
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        plain = vae.decode(recorded["latent"]).sample
    assert "tiled" in verdict(folder, recorded | {"tiled": plain})[1]
