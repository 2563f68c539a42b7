"""Complexity at full SD2.1 size, computed without weights: steps, multiply-accumulates (MACs) and parameters.

ConsisSR Table 2, CCSR Table VII. The networks are built on the meta device, which holds shapes and no numbers; MACs
count convolutions and linear layers, as the usual counters do (attention's own products are left out: 16 % of
UNet and ControlNet, 1 to 3 % of the autoencoder).
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from consissr.config.model import ModelConfig
from consissr.config.sd21 import SD_BETAS, TEXT, TOKENS, TOWER, UNET, VAE
from consissr.evaluation import tables
from consissr.evaluation.markdown import table_lines
from consissr.evaluation.produce import Timing
from consissr.evaluation.tables import Cell, Table

SIDE = 512  # pixels of the output
LATENT = SIDE // 8
MODELS = {
    "ccsr": ModelConfig(),
    "consissr": ModelConfig(hint="stack", position_embedding=64, transposed_attention=True, image_prompt="hpa"),
}


@lru_cache
def networks_of(kind: str) -> dict[str, nn.Module]:
    """The networks of 'ccsr' or 'consissr' by name, at SD2.1 size, without weights."""
    return build(MODELS[kind])


def build(config: ModelConfig) -> dict[str, nn.Module]:
    """The networks of a model by name, at SD2.1 size, without weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from consissr.models.image_prompt import build_tower
    from consissr.models.vae.latents import empty_latents
    from consissr.weights.base import Base
    from consissr.weights.folder import untrained

    with torch.device("meta"):
        base = Base(UNet2DConditionModel(**UNET), empty_latents(VAE), {}, SD_BETAS, "epsilon")
        model = untrained(config, base, lambda: build_tower(1024, TOWER))
        text = CLIPTextModel(CLIPTextConfig(**TEXT))
    networks = {"controlnet": model.controlnet, "unet": model.unet, "vae": model.latents.vae, "text encoder": text}
    if model.image_prompt is not None:
        networks |= {"image encoder": model.image_prompt.tower, "image adapter": model.image_prompt.adapter}
    return {name: network.eval().requires_grad_(False) for name, network in networks.items()}


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def macs(run: Callable[[], Any], attention: bool = False) -> int:
    """Multiply-accumulates of convolutions and linear layers in `run`; `attention`: its matrix products, too."""
    aten = torch.ops.aten
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    flops = counter.get_flop_counts()["Global"]
    operations = flops if attention else (aten.convolution, aten.mm, aten.addmm)
    return sum(flops.get(operation, 0) for operation in operations) // 2


def work(networks: dict[str, nn.Module], attention: bool = False, prepared: bool = False) -> dict[str, int]:
    """MACs of one pass for a 512x512 result: 'denoiser' (UNet and ControlNet), 'encoder' and 'decoder' of the VAE.

    attention: count its matrix products. prepared: what depends on the prompts alone was computed before.
    """
    from consissr.models.denoiser import Condition, Denoiser

    denoiser = Denoiser(networks["unet"], networks["controlnet"], torch.ones(1000, dtype=torch.float64))
    image_tokens = torch.empty(1, 1, 1024, device="meta") if "image adapter" in networks else None
    z = torch.empty(1, 4, LATENT, LATENT, device="meta")
    condition = Condition(torch.empty(1, TOKENS, 1024, device="meta"), z, image_tokens)
    condition = denoiser.prepare(condition) if prepared else condition
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    vae, pixels = networks["vae"], torch.empty(1, 3, SIDE, SIDE, device="meta")
    passes = {
        "denoiser": lambda: denoiser(z, t, condition),
        "encoder": lambda: vae.encode(pixels),
        "decoder": lambda: vae.decode(z),
    }
    return {name: macs(run, attention) for name, run in passes.items()}


@lru_cache
def work_of(kind: str) -> dict[str, int]:
    """`work` of 'ccsr' or 'consissr'."""
    return work(networks_of(kind))


def measured_rows(table: Table, timings: Mapping[str, Timing] | None = None) -> dict[str, dict[str, Cell]]:
    """The rows of ours: steps, MACs in T of all denoising (as the paper counts), parameters in G.

    timings: of models that ran, by row. Parameters are those of UNet, ControlNet, VAE, text encoder and, for ConsisSR,
    image encoder and adapter at full size; a model that ran may be smaller, so its row has none.
    """
    rows = {}
    for row, entry in table.ours.items():
        kind, evaluations = entry["model"], entry["evaluations"]
        cells = {"steps": Cell(evaluations, digits=0)}
        if timings and row in timings:
            cells["seconds"] = Cell(timings[row].seconds, digits=2)
        else:
            cells["params"] = Cell(sum(map(parameters, networks_of(kind).values())) / 1e9, digits=2)
        if "macs" in table.metrics:
            passes = evaluations * (2 if entry["guidance"] else 1)
            cells["macs"] = Cell(passes * work_of(kind)["denoiser"] / 1e12, digits=2)
        rows[row] = cells
    return rows


def comparison(table: Table, dataset: str, timings: Mapping[str, Timing] | None = None) -> str:
    """Markdown: the table with our measured rows, then the networks behind them."""
    kinds = dict.fromkeys(entry["model"] for entry in table.ours.values())
    notes = [
        f"{row}, measured: {timing.told}; its parameters are not counted." for row, timing in (timings or {}).items()
    ]
    compared = tables.comparison(table, dataset, measured_rows(table, timings), notes)
    return "\n".join([compared, *map(networks_text, kinds)])


def networks_text(kind: str) -> str:
    """Parameters of each network and MACs of each pass, as a Markdown table."""
    counts = {name: parameters(network) for name, network in networks_of(kind).items()}
    rows = [
        (name, f"{count / 1e6:.1f} M parameters") for name, count in (counts | {"all": sum(counts.values())}).items()
    ]
    rows += [(f"{name}, one pass", f"{count / 1e9:.1f} G MACs") for name, count in work_of(kind).items()]
    return "\n".join([*table_lines([f"{kind}, {SIDE}x{SIDE}", ""], rows), ""])
