"""Multiply-accumulates of both paths, counted on the meta device: attention's products included."""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from consissr.bench.models import Networks, SamplingMethod
from consissr.evaluation.complexity import macs
from consissr.models.denoiser import Condition


def without_weights(network: nn.Module) -> nn.Module:
    """A copy on the meta device; the weights themselves are never copied."""
    known = {}
    for tensor in [*network.parameters(), *network.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        known[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return deepcopy(network, known)


def macs_of(networks: Networks, config: Any, method: SamplingMethod, pixels: int) -> dict[str, dict[str, int]]:
    """{path: {"encode", "step", "decode", "total"}} per image, for results of `pixels` x `pixels`.

    Under guidance a step has two rows; where CCSR's first step is unguided, "step" is the mean. The work of a 3x3
    convolution is that of its direct form, whichever way it is computed.
    """
    latents, denoiser = without_weights(networks.latents), without_weights(networks.denoiser)
    side = pixels // latents.factor
    z = torch.empty(1, latents.channels, side, side, device="meta", dtype=networks.dtype)
    x = torch.empty(1, 3, pixels, pixels, device="meta", dtype=networks.dtype)
    text = networks.text([config.positive]).to("meta", networks.dtype)
    tokens = None if networks.image_prompt is None else text[:, :1]
    condition, t = Condition(text, z, tokens), torch.zeros(1, dtype=torch.int64, device="meta")
    prepared = denoiser.prepare(condition)
    plain = without_weights(networks.denoiser)
    counted = partial(macs, attention=True)
    once = {"encode": counted(lambda: latents.moments(x)), "decode": counted(lambda: latents.decode(z))}
    row = {
        "reference": counted(lambda: plain(z, t, condition)),
        "ours": counted(lambda: denoiser(z, t, prepared)),
    }
    guided = config.guidance != 1
    first_alone = guided and config.first_prompt != "guided" and method.plan[0].kind != "step"
    rows = len(method.plan) * (2 if guided else 1) - first_alone
    counts = {}
    for path in row:
        twice = path == "reference" and guided and not method.sequential
        work = {"encode": once["encode"] * (2 if twice else 1), "decode": once["decode"]}
        work["total"] = sum(work.values()) + rows * row[path]
        counts[path] = work | {"step": rows * row[path] // len(method.plan)}
    return counts
