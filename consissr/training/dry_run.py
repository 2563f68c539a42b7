"""What a training run would be, without running it: `scripts/train.py --config ... --dry-run`.

The networks are built on the meta device, which holds shapes and no numbers; nothing is downloaded and no weight is
read. Sizes are those of the folders that the config names, where they are on this machine, else SD2.1's (or `nano`'s
for names with "nano" in them).
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from consissr.config.data import DataConfig
from consissr.config.folder import FolderConfig
from consissr.config.model import ModelConfig
from consissr.config.sampler import SamplerConfig
from consissr.config.sd21 import SD_BETAS, TEXT, TOKENS, TOWER, UNET, VAE
from consissr.config.training import TrainConfig
from consissr.data import datasets
from consissr.data.patterns import matching
from consissr.errors import UserError
from consissr.evaluation.learned import LPIPS_VGG, find
from consissr.models.image_prompt import build_tower
from consissr.models.vae.latents import empty_latents
from consissr.training.checks import launched, problems, shared_out
from consissr.training.estimate import memory
from consissr.training.restoration import base_for
from consissr.training.stage import Stage, trained_ids
from consissr.weights.base import BUNDLED_BASES, Base, find_base
from consissr.weights.files import BUNDLED, read_config
from consissr.weights.find import find_model
from consissr.weights.folder import untrained
from consissr.weights.hub import is_hub_id, split_hub_id
from consissr.weights.image_encoder import OPEN_CLIP, has_tower
from consissr.weights.model import Model
from consissr.weights.names import published


def describe(config: TrainConfig, builder: Any) -> Iterator[str]:
    """The report, line by line, on the run that `config` and the stage class `builder` make."""
    batch_lines = batches(config)  # from the file's own micro-batch
    config = shared_out(config, config.processes or launched())
    init = model_folder(config.init)
    if init is not None and (init / "config.yaml").is_file() and config.stage.removeprefix("nano_") != "deft":
        config = replace(config, model=replace(config.model, base=base_for(config.model, init)))
    stage = build(config, builder)
    yield f"stage {config.stage}, {config.steps} optimiser steps; output: {config.output_dir}"
    yield from batch_lines
    yield ""
    yield from parameters(stage)
    yield ""
    yield from memory(config, stage)
    yield ""
    yield from inputs(config)
    for error in dict.fromkeys(map(str, (*problems(config), *data_problems(config.data)))):
        yield f"\nthe run itself would stop here: {error}"


def data_problems(config: DataConfig) -> Iterator[UserError]:
    """What the run's data set would refuse of its settings."""
    try:
        datasets.check(config)
    except UserError as error:
        yield error


def build(config: TrainConfig, builder: Any) -> Stage:
    """The stage on the meta device."""
    stage_kind = config.stage.removeprefix("nano_")
    if stage_kind == "rclip":
        with torch.device("meta"):
            towers = [build_tower(*tower_sizes(config)) for _ in range(2)]
        stage = builder(config, *towers)
    elif stage_kind in ("tala", "nuts"):
        stage = builder(config, untrained_model(config))
    elif stage_kind == "deft":
        folder, stored = model_folder(config.init), FolderConfig(model=config.model)
        if folder is not None and (folder / "config.yaml").is_file():
            stored = read_config(folder)
        stage = builder.untrained(config, untrained_model(replace(config, model=stored.model), stored.sampler))
    elif config.stage == "autoencoder":
        stage = builder(config, fit=False)
    elif config.stage == "prior":
        init = config.init if (Path(config.init) / "vae" / "config.json").is_file() else str(BUNDLED_BASES["nano"])
        silent = replace(config.prior, caption_dropout=1.0)  # captions are measured on pixels, which are not here
        stage = builder(replace(config, init=init, prior=silent), UntrainedText(config.prior.context_dim))
    else:
        stage = builder(config)
    exchange(stage, lambda networks: networks.requires_grad_(False).to("meta"))
    return stage


def exchange(stage: Stage, change: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    """`change` the stage's networks in place, by which parameters become others; the phases train those."""
    names = {id(parameter): name for name, parameter in stage.networks.named_parameters()}
    others = dict(change(stage.networks).named_parameters())
    for phase in stage.phases:
        phase.parameters = {name: others[names[id(p)]] for name, p in phase.parameters.items()}


class UntrainedText:
    """A text encoder's shapes."""

    def __init__(self, width: int) -> None:
        self.width = width

    def encode(self, prompts: list[str]) -> torch.Tensor:
        """(B, L, D) on the meta device."""
        return torch.empty(len(prompts), TOKENS, self.width, device="meta")


# --- sizes ------------------------------------------------------------------------------------------------------------


def base_folder(name: str) -> Path | None:
    """Where sizes of the base `name` can be read on this machine; None: they are SD2.1's."""
    folder = BUNDLED_BASES.get(name, Path(name))
    if (folder / "unet" / "config.json").is_file():
        return folder
    return BUNDLED_BASES["nano"] if "nano" in name else None


def model_folder(name: str) -> Path | None:
    """The folder of a bundled model, or the path that `name` is; None for no name."""
    return find_model(name) if name in BUNDLED else Path(name) if name else None


def untrained_model(config: TrainConfig, sampler: SamplerConfig | None = None) -> Model:
    """The networks of `config.model` on the meta device."""
    from diffusers import UNet2DConditionModel

    folder = base_folder(config.model.base)
    unet, vae = UNET, VAE
    if folder is not None:
        unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(unet)
        text = torch.empty(1, TOKENS, network.config.cross_attention_dim)
        base = Base(network, empty_latents(vae), {"": text}, SD_BETAS, "epsilon")
        model = untrained(config.model, base, lambda: build_tower(*tower_sizes(config)))
    model.config.sampler = sampler or config.sampler
    if model.config.model.residual:
        model.prediction_type = "v_prediction"  # which it is changes no size
    return model


def tower_sizes(config: TrainConfig) -> tuple[int, dict[str, Any]]:
    """(embed_dim, vision_cfg) of the image tower: of the first folder named that is here, of open_clip, or ViT-H/14."""
    name = config.model.image_encoder
    named = base_folder(config.model.base) if name == "base" else model_folder(name)
    for folder in (model_folder(config.init), named):
        if folder is not None and has_tower(folder):
            settings = json.loads((folder / "image_encoder" / "config.json").read_text())
            return settings["embed_dim"], settings["vision_cfg"]
    if name.startswith(OPEN_CLIP):
        import open_clip

        settings = open_clip.get_model_config(name.removeprefix(OPEN_CLIP).split("/")[0])
        if settings:
            return settings["embed_dim"], settings["vision_cfg"]
    return TEXT["hidden_size"], TOWER


# --- the report -------------------------------------------------------------------------------------------------------


def batches(config: TrainConfig) -> Iterator[str]:
    """The global batch, and how it comes about."""
    counts = [config.processes or launched()]
    counts += [n for n in (4, 8, 16) if not config.processes and n not in counts]
    micro = {n: shared_out(config, n).micro_batch for n in counts}
    ways = [
        f"micro_batch {micro[n]} x {n} process{'es' if n > 1 else ''} x {config.batch // (micro[n] * n)} accumulated"
        for n in counts
        if config.batch % (micro[n] * n) == 0
    ]
    fits = ", or ".join(ways) or f"not a multiple of micro_batch {config.micro_batch} x {counts[0]} processes"
    yield f"effective batch {config.batch} = {fits}"
    yield f"{config.steps * config.batch:,} images seen in all, {config.data.crop} x {config.data.crop} pixels"


def parameters(stage: Stage) -> Iterator[str]:
    """Trained parameters by phase and group, frozen ones by network."""
    groups: Counter[str] = Counter()
    for phase in stage.phases:
        for name, parameter in phase.parameters.items():
            part = {"unet": "in the UNet", "adapter": "image adapter"}.get(name.split(".")[0], phase.name)
            groups[part] += parameter.numel()
    yield f"{'trained':44s}{sum(groups.values()):>16,}"
    yield from (f"  {name:42s}{count:>16,}" for name, count in groups.items())
    trained = trained_ids(stage)
    frozen: Counter[str] = Counter()
    for name, parameter in stage.networks.named_parameters():
        if id(parameter) not in trained:
            frozen[group_of(name)] += parameter.numel()
    yield f"{'frozen':44s}{sum(frozen.values()):>16,}"
    yield from (f"  {name:42s}{count:>16,}" for name, count in frozen.items())


def group_of(name: str) -> str:
    """The network that a parameter of `stage.networks` belongs to."""
    words = [word for word in name.split(".") if word not in ("first", "denoiser")]
    if words[0] == "latents" and len(words) > 2:
        return f"autoencoder: {words[2] if words[1] == 'vae' else words[1]}"
    if words[0] in ("image_prompt", "adversary"):
        return f"{words[0]}: {words[1]}"
    return words[0]


def inputs(config: TrainConfig) -> Iterator[str]:
    """What the run reads, where it looks, and what it would download."""
    yield "read from:"
    yield from (f"  {what:18s} {name}: {state}" for what, name, state in needs(config))


def needs(config: TrainConfig) -> Iterator[tuple[str, str, str]]:
    """(what, name, whether it is here)."""
    stage = config.stage.removeprefix("nano_")
    if stage in ("tala", "nuts", "deft"):
        yield "base model", config.model.base, base_state(config.model)
    uses_tower = stage == "rclip" or config.model.image_prompt != "none"
    init = model_folder(config.init)
    given = init is not None and (has_tower(init) or not init.exists() and stage != "rclip")
    if stage in ("rclip", "tala", "nuts") and uses_tower and not given:
        name = config.model.image_encoder
        if name.startswith(OPEN_CLIP):
            rest = name.removeprefix(OPEN_CLIP).partition("/")[2]
            yield "image tower", name, "here" if Path(rest).is_file() else "downloaded by open_clip unless in its cache"
        elif name != "base":
            yield "image tower", name, "here" if has_tower(model_folder(name)) else "missing; sized as ViT-H/14 above"
        else:
            folder = base_folder(config.model.base)
            present = folder is not None and has_tower(folder)
            yield "image tower", "that of the base", "here" if present else "missing; sized as ViT-H/14 above"
    if config.init:
        bundled = config.init in BUNDLED
        yield "init", config.init, "bundled" if bundled else hub_or_here(config.init, "config.yaml")
    if stage == "prior":
        yield "text encoder", config.prior.text, here(config.prior.text)
    if stage == "deft" and config.deft.discriminator == "dino":
        for what, name in (("DINO", config.deft.dino), ("DINOv2", config.deft.dino_v2)):
            yield what, name, hub_or_here(name, "model.safetensors")
    if stage == "deft" and config.deft.perceptual == "lpips":
        folder = Path(config.deft.weights) if config.deft.weights else None
        for file in LPIPS_VGG:
            yield "LPIPS", file.name, str(find(file, folder) or f"missing; from {file.url}")
    if stage == "deft" and config.deft.perceptual == "vgg":
        yield "VGG16", config.deft.weights or "deft.weights", here(config.deft.weights)
    for key, listed in (("photographs", config.data.paths), ("LQ partners", config.data.lq_paths)):
        for name in filter(None, listed):
            yield key, name, here(name)
    if not config.data.paths:
        yield "photographs", "data.paths", "none named"
    if config.data.validation:
        yield "validation", config.data.validation, here(config.data.validation)


def here(name: str) -> str:
    """Whether a path exists, or something that a pattern means."""
    place = os.path.expanduser(name)
    try:
        return "here" if os.path.exists(place) or matching(place) else "missing"
    except UserError:  # a part of a range is missing, which `problems` tells
        return "missing"


def base_state(model: ModelConfig) -> str:
    """Where the base would come from."""
    try:
        sources = find_base(model.base)
    except UserError:
        return f"missing; sized as {'the bundled nano' if base_folder(model.base) else 'SD2.1'} above"
    return "; ".join(f"{source} {hub_or_here(source, 'unet/config.json')}" for source in sources)


def hub_or_here(name: str, file: str) -> str:
    """Whether `name` is a path that exists, a hub id in the cache, or one that would be downloaded."""
    if os.path.exists(os.path.expanduser(name)):
        return "here"
    if name in published():
        return "a published model: consissr-convert --list says where it is"
    if not is_hub_id(name) or name.startswith("runs/"):
        return "missing"
    from huggingface_hub import try_to_load_from_cache

    repository, revision = split_hub_id(name)
    cached = isinstance(try_to_load_from_cache(repository, file, revision=revision), str)
    return "in the hub's cache" if cached else "would be downloaded"
