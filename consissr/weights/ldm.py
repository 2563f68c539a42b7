"""Checkpoints in latent-diffusion naming (LDM): sizes from the weights, names in diffusers' layout."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from consissr.config.sd21 import SCALING_FACTOR
from consissr.errors import UserError
from consissr.weights.files import load_strict

State = dict[str, Tensor]

RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
"""Names inside a residual block of the UNet."""

VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
"""Names inside the autoencoder's attention."""


@dataclass
class KeyReport:
    """What became of every key of a checkpoint."""

    dtype: torch.dtype | None = None
    """What networks are read as; None: as stored, without a copy."""
    used: dict[str, int] = field(default_factory=dict)
    """Part of the model -> number of tensors loaded into it."""
    ignored: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> keys that were left out on purpose."""

    def load(self, module: nn.Module, state: State, part: str) -> None:
        """Load exactly `state` into `module` and count it; UserError where a key or a shape does not fit."""
        load_strict(module, state, f"the checkpoint's {part}", dtype=self.dtype)
        self.used[part] = len(state)

    def lines(self) -> list[str]:
        """One line per part and per reason."""
        used = [f"used     {count:5d}  {part}" for part, count in self.used.items()]
        return used + [f"ignored  {len(keys):5d}  {reason}" for reason, keys in self.ignored.items() if keys]


def split_off(state: State, prefix: str) -> State:
    """Remove and return the entries below `prefix`, without the prefix."""
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state.pop(name) for name in names}


def refuse_rest(state: State, kind: str) -> None:
    """UserError where a key is left of a checkpoint that every part was split off."""
    if state:
        raise UserError(
            f"the checkpoint has an unknown key, {next(iter(state))} ({len(state) - 1} more): it is not {kind}"
        )


def rename(state: State, pairs: dict[str, str], inner: dict[str, str]) -> State:
    """`state` with each key's longest prefix in `pairs` replaced, and below it the names in `inner`.

    UserError for a key that no pair covers.
    """
    renamed = {}
    for name, tensor in state.items():
        words = name.split(".")
        prefix = next((p for n in range(len(words), 0, -1) if (p := ".".join(words[:n])) in pairs), None)
        if prefix is None:
            raise UserError(f"the checkpoint has an unknown key, {name}: it is not a model of this kind")
        rest = name[len(prefix) + 1 :]
        stem, leaf = rest.rpartition(".")[::2]
        renamed[f"{pairs[prefix]}.{inner.get(stem, stem)}.{leaf}" if stem else f"{pairs[prefix]}.{leaf}"] = tensor
    return renamed


@dataclass
class Level:
    """One resolution of a UNet's encoder."""

    width: int
    layers: int = 0
    transformer: str = ""
    """Prefix of its first transformer; empty without attention."""


def indices(state: State, prefix: str) -> int:
    """How many numbered children `prefix` has: one more than the highest index below it."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(match[1]) for name in state if (match := pattern.match(name))), default=-1)


def encoder_pairs(state: State) -> tuple[dict[str, str], list[Level]]:
    """LDM -> diffusers prefixes of a UNet's or ControlNet's encoder and middle, and its levels."""
    pairs = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
    levels = [Level(0)]
    for index in range(1, indices(state, "input_blocks")):
        block, level = f"input_blocks.{index}", len(levels) - 1
        if f"{block}.0.op.weight" in state:
            pairs[f"{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            levels.append(Level(0))
            continue
        here = levels[-1]
        pairs[f"{block}.0"] = f"down_blocks.{level}.resnets.{here.layers}"
        if f"{block}.1.norm.weight" in state:
            pairs[f"{block}.1"] = f"down_blocks.{level}.attentions.{here.layers}"
            here.transformer = here.transformer or f"{block}.1"
        here.width = require(state, f"{block}.0.out_layers.3.weight").shape[0]
        here.layers += 1
    return pairs, levels


def decoder_pairs(state: State, levels: list[Level]) -> dict[str, str]:
    """LDM -> diffusers prefixes of a UNet's decoder and head."""
    pairs = {"out.0": "conv_norm_out", "out.2": "conv_out"}
    per_level = levels[0].layers + 1
    for index in range(indices(state, "output_blocks")):
        block, up, layer = f"output_blocks.{index}", *divmod(index, per_level)
        pairs[f"{block}.0"] = f"up_blocks.{up}.resnets.{layer}"
        for child in (1, 2):
            if f"{block}.{child}.conv.weight" in state:
                pairs[f"{block}.{child}.conv"] = f"up_blocks.{up}.upsamplers.0.conv"
            elif f"{block}.{child}.norm.weight" in state:
                pairs[f"{block}.{child}"] = f"up_blocks.{up}.attentions.{layer}"
    return pairs


def require(state: State, name: str) -> Tensor:
    """`state[name]`; UserError if it is not there."""
    if name not in state:
        raise UserError(f"the checkpoint lacks {name}: it is not a model of this kind, or damaged")
    return state[name]


def network_config(state: State, levels: list[Level], heads: Sequence[int] | None = None) -> dict[str, Any]:
    """The part of a diffusers config that UNet and ControlNet share, from LDM weights.

    `heads` are attention heads per level, which plain weights don't show. Without them a head is as wide as ConsisSR's
    additions say, else 64 as in SD2.1.
    """
    attended = [level for level in levels if level.transformer]
    if not attended or len({level.layers for level in levels}) != 1:
        raise UserError("the checkpoint's UNet is not of Stable Diffusion's kind")
    block, head_width = f"{attended[0].transformer}.transformer_blocks", 64
    for added in ("attn1.position_emb", "attn2.to_out_ip.0.weight"):
        if f"{block}.0.{added}" in state:
            head_width = state[f"{block}.0.{added}"].shape[1]
    kinds = ["CrossAttnDownBlock2D" if level.transformer else "DownBlock2D" for level in levels]
    return {
        "in_channels": require(state, "input_blocks.0.0.weight").shape[1],
        "block_out_channels": tuple(level.width for level in levels),
        "layers_per_block": levels[0].layers,
        "down_block_types": tuple(kinds),
        "attention_head_dim": tuple(heads or (max(level.width // head_width, 1) for level in levels)),
        "cross_attention_dim": require(state, f"{block}.0.attn2.to_k.weight").shape[1],
        "transformer_layers_per_block": indices(state, block),
        "use_linear_projection": require(state, f"{attended[0].transformer}.proj_in.weight").ndim == 2,
    }


def vae_names(state: State) -> State:
    """LDM autoencoder weights (whole, or encoder and quant_conv only) under diffusers' names."""
    levels = max(indices(state, "decoder.up"), indices(state, "encoder.down"))
    renamed = {}
    for name, tensor in state.items():
        ours = re.sub(r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2.", name)
        ours = re.sub(r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", ours)
        if match := re.match(r"decoder\.up\.(\d+)\.(block\.(\d+)|upsample)\.(.*)", ours):
            child = f"resnets.{match[3]}" if match[3] else "upsamplers.0"
            ours = f"decoder.up_blocks.{levels - 1 - int(match[1])}.{child}.{match[4]}"
        ours = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", ours)
        ours = re.sub(r"\.norm_out\.", ".conv_norm_out.", ours).replace(".nin_shortcut.", ".conv_shortcut.")
        if match := re.match(r"(.*)\.mid\.attn_1\.(\w+)\.(\w+)$", ours):
            ours = f"{match[1]}.mid_block.attentions.0.{VAE_ATTENTION[match[2]]}.{match[3]}"
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        renamed[ours] = tensor
    return renamed


def vae_config(state: State) -> dict[str, Any]:
    """diffusers config of an AutoencoderKL with these LDM weights (whole)."""
    levels = indices(state, "encoder.down")
    widths = [require(state, f"encoder.down.{i}.block.0.conv1.weight").shape[0] for i in range(levels)]
    return {
        "in_channels": require(state, "encoder.conv_in.weight").shape[1],
        "out_channels": require(state, "decoder.conv_out.weight").shape[0],
        "latent_channels": require(state, "quant_conv.weight").shape[0] // 2,
        "block_out_channels": tuple(widths),
        "layers_per_block": indices(state, "encoder.down.0.block"),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 32,
        "scaling_factor": SCALING_FACTOR,
    }
