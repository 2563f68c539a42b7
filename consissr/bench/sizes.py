"""Parameters and multiply-accumulates at SD2.1's size, counted without weights, part by part.

`consissr-released` is what ConsisSR's checkpoint holds: copies of keys and values for the image branch, a second VAE
encoder for the hint, and CLIP whole, with the last text block and the projection that are never used. The paper's
2.13 G is no sum of these parts.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from consissr.evaluation import complexity
from consissr.models.vae.latents import Latents, narrowed

TEXT_TOWER = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
NARROW = 0.5
"""Width of the narrow decoder of configs/ccsr/deft_narrow.yaml."""
GUIDED = 100
"""Evaluations of 50 guided steps."""


def released_consissr() -> dict[str, nn.Module]:
    """The networks of ConsisSR's checkpoint."""
    from open_clip.model import CLIP

    parts = complexity.build(replace(complexity.MODELS["consissr"], image_kv="separate"))
    del parts["image encoder"], parts["text encoder"]
    hint = complexity.networks_of("ccsr")["vae"]
    with torch.device("meta"):
        clip = CLIP(1024, complexity.TOWER, TEXT_TOWER)
    return parts | {"hint encoder": nn.ModuleList([hint.encoder, hint.quant_conv]), "CLIP, text and image": clip}


def rows() -> list[dict[str, Any]]:
    """One row per part: parameters in M; MACs of one pass for 512x512, in G, where the part is a pass."""
    networks = {kind: complexity.networks_of(kind) for kind in ("ccsr", "consissr")}
    full = networks["ccsr"]["vae"]
    narrow = narrowed(Latents(full), NARROW).vae
    listed = []
    for kind, parts in (networks | {"consissr-released": released_consissr()}).items():
        counts = {name: complexity.parameters(part) for name, part in parts.items()}
        listed += [row(kind, name, count) for name, count in (counts | {"all": sum(counts.values())}).items()]
    decoders = {f"decoder, {NARROW:g} as wide": narrow.decoder, "decoder": full.decoder}
    listed += [row("ccsr", name, complexity.parameters(decoder)) for name, decoder in decoders.items()]
    for kind, parts in networks.items():
        listed += passes(kind, parts)
    z = torch.empty(1, 4, complexity.LATENT, complexity.LATENT, device="meta")
    macs = [complexity.macs(lambda: narrow.decode(z), attention) for attention in (False, True)]
    listed.append(row("ccsr", f"decoder, {NARROW:g} as wide, one pass", None, *macs))
    return listed + passes("consissr-released", networks["consissr"], prepared=False)


def passes(kind: str, parts: dict[str, nn.Module], prepared: bool = True) -> list[dict[str, Any]]:
    """MACs of one pass and of 50 guided steps: convolutions and linear layers alone (the papers), and everything.

    prepared: what depends on the prompts alone is computed before, once (ours), not in every pass (the release).
    """
    layers = complexity.work(parts)
    everything = complexity.work(parts, attention=True, prepared=prepared)
    listed = [row(kind, f"{name}, one pass", None, layers[name], everything[name]) for name in layers]
    return [*listed, row(kind, "50 guided steps", None, GUIDED * layers["denoiser"], GUIDED * everything["denoiser"])]


def row(kind: str, what: str, parameters: int | None, layers: int | None = None, everything: int | None = None) -> dict:
    """One row of the table; what is not known stays empty."""
    counts = {"parameters, M": parameters, "layers, G": layers, "with attention, G": everything}
    units = {"parameters, M": 1e6, "layers, G": 1e9, "with attention, G": 1e9}
    return {"networks": kind, "what": what} | {n: "" if c is None else c / units[n] for n, c in counts.items()}
