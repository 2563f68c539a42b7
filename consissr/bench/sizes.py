"""Parameters and multiply-accumulates at SD2.1's size, counted without weights, part by part.

`consissr-released` is what ConsisSR's checkpoint holds: copies of keys and values for the image branch, a second VAE
encoder for the hint, and CLIP whole, with the last text block and the projection that are never used. The paper's
2.13 G is no sum of these parts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from consissr.bench.work import counted
from consissr.evaluation import complexity
from consissr.models.denoiser import Condition, Denoiser
from consissr.models.vae.latents import Latents, narrowed

TEXT_TOWER = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
NARROW = 0.5
"""Width of the narrow decoder of configs/ccsr/deft_narrow.yaml."""
GUIDED = 100
"""Evaluations of 50 guided steps."""


def released_consissr() -> dict[str, nn.Module]:
    """The networks of ConsisSR's checkpoint."""
    from open_clip.model import CLIP

    models = complexity.MODELS
    models["consissr-released"] = replace(models["consissr"], image_kv="separate")
    try:
        parts = dict(complexity.build("consissr-released"))
    finally:
        del models["consissr-released"]
    with torch.device("meta"):
        clip = CLIP(1024, complexity.TOWER, TEXT_TOWER)
        hint = complexity.build("ccsr")["vae"]
    parts.pop("image encoder")
    parts["text encoder"] = clip
    parts["hint encoder"] = nn.ModuleList([hint.encoder, hint.quant_conv])
    return parts | {"CLIP, text and image": parts.pop("text encoder")}


def rows() -> list[dict[str, Any]]:
    """One row per part: parameters in M; MACs of one pass for 512x512, in G, where the part is a pass."""
    found = []
    for kind in ("ccsr", "consissr", "consissr-released"):
        parts = released_consissr() if kind == "consissr-released" else complexity.build(kind)
        counts = {name: complexity.parameters(part) for name, part in parts.items()}
        for name, count in (counts | {"all": sum(counts.values())}).items():
            found.append({"networks": kind, "what": name, "parameters, M": count / 1e6})
    narrow = narrowed(Latents(complexity.build("ccsr")["vae"]), NARROW).vae
    count = complexity.parameters(narrow.decoder)
    found.append({"networks": "ccsr", "what": f"decoder, {NARROW:g} as wide", "parameters, M": count / 1e6})
    full = complexity.parameters(complexity.build("ccsr")["vae"].decoder)
    found.append({"networks": "ccsr", "what": "decoder", "parameters, M": full / 1e6})
    for row in found:
        row["layers, G"] = row["with attention, G"] = ""
    work = work_rows("ccsr", complexity.build("ccsr")) + work_rows("consissr", complexity.build("consissr"))
    z = torch.empty(1, 4, complexity.LATENT, complexity.LATENT, device="meta")
    macs = (complexity.macs(lambda: narrow.decode(z)), counted(lambda: narrow.decode(z)))
    work.append(pass_row("ccsr", f"decoder, {NARROW:g} as wide, one pass", *macs))
    return [*found, *work, *work_rows("consissr-released", complexity.build("consissr"), prepared=False)]


def work_rows(kind: str, parts: dict[str, nn.Module], prepared: bool = True) -> list[dict[str, Any]]:
    """MACs of one pass and of 50 guided steps: convolutions and linear layers alone (the papers), and everything.

    prepared: what depends on the prompts alone is computed before, once (ours), not in every pass (the release).
    """
    layers = complexity.work(parts)
    denoiser = Denoiser(parts["unet"], parts["controlnet"], torch.ones(1000, dtype=torch.float64))
    side, tokens = complexity.LATENT, complexity.TOKENS
    z = torch.empty(1, 4, side, side, device="meta")
    image = torch.empty(1, 1, 1024, device="meta") if "image adapter" in parts else None
    condition = Condition(torch.empty(1, tokens, 1024, device="meta"), z, image)
    if prepared:
        condition = denoiser.prepare(condition)
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    pixels = torch.empty(1, 3, complexity.SIDE, complexity.SIDE, device="meta")
    everything = {
        "denoiser": counted(lambda: denoiser(z, t, condition)),
        "encoder": counted(lambda: parts["vae"].encode(pixels)),
        "decoder": counted(lambda: parts["vae"].decode(z)),
    }
    passes = [(f"{name}, one pass", layers[name], everything[name]) for name in layers]
    passes.append(("50 guided steps", GUIDED * layers["denoiser"], GUIDED * everything["denoiser"]))
    return [pass_row(kind, *one) for one in passes]


def pass_row(kind: str, what: str, few: int, all_: int) -> dict[str, Any]:
    """A row of MACs."""
    return {
        "networks": kind, "what": what, "parameters, M": "", "layers, G": few / 1e9, "with attention, G": all_ / 1e9
    }  # fmt: skip
