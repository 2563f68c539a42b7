"""A narrower decoder beside the full one: seconds, work and weights on the same latents."""

from __future__ import annotations

from typing import Any

import torch

from consissr.bench.clock import Clock, spread
from consissr.bench.work import counted, without_weights
from consissr.evaluation.complexity import parameters
from consissr.models.vae.narrow import narrow_decoder
from consissr.restorer import Restorer


def compare(model: str, narrow: str, factor: float, pixels: int, runs: int, device: str = "cpu") -> dict[str, Any]:
    """Decodes in turn. narrow: a model folder with a narrow decoder; "": one of `factor`, untrained (speed only)."""
    full = Restorer.load(model, device=device, precision="fp32")
    if narrow:
        other = Restorer.load(narrow, device=device, precision="fp32").latents
    else:
        other = narrow_decoder(full.latents, factor).to(device, memory_format=torch.channels_last).eval()
    both = {"full": full.latents, "narrow": other}
    side = pixels // full.latents.factor
    z = torch.randn(1, full.latents.channels, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    clocks: dict[str, list[Clock]] = {name: [] for name in both}
    with torch.inference_mode():
        for number in range(runs + 1):
            for name, latents in both.items():
                clock = Clock(torch.device(device))
                with clock.part("decode"):
                    latents.decode(z)
                if number:
                    clocks[name].append(clock)
    found: dict[str, Any] = {"model": model, "narrow": narrow or f"untrained, {factor:g}", "pixels": pixels}
    for name, latents in both.items():
        empty = without_weights(latents)
        found[name] = {
            "parameters": parameters(latents.vae.decoder),
            "macs": counted(lambda empty=empty: empty.decode(z.to("meta"))),
            **{kind: spread([getattr(c.parts["decode"], kind) for c in clocks[name]]) for kind in ("wall", "cpu")},
        }
    found["speed_ratio"] = {k: found["full"][k]["median"] / found["narrow"][k]["median"] for k in ("wall", "cpu")}
    return found
