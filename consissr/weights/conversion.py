"""The authors' checkpoints as model folders: which release a source is, and its networks in this project's layout."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from consissr.config.sampler import SamplerConfig
from consissr.errors import UserError
from consissr.weights import ldm, released, released_ccsr
from consissr.weights.folder import save_base, save_model

if TYPE_CHECKING:
    from consissr.weights.released import Released

log = logging.getLogger(__name__)

CONVERTER = 1
"""Counts up when conversion changes: folders of another version are converted again."""

TEXT_FOLDERS = ("text_encoder", "tokenizer")


def convert(
    source: Path, target: Path, base: str = "auto", clip: Path | None = None, half: bool = False, name: str = ""
) -> Released:
    """Turn the authors' file or folder `source` into the model folder `target`, at once or not at all.

    base: name, folder, file or hub id; 'own' writes the source's own beside the result, 'auto' does where the source
    has all of it and else names 'sd21-base'. clip: open_clip's model config (JSON), if ConsisSR's is not ViT-H-14.
    half: store 16 bits; a source in 16 bits stays so. name: the model's, for its card. Raises UserError.
    """
    if target.exists():
        raise UserError(f"{target} exists: remove it or name another folder")
    if not source.exists():
        raise UserError(f"{source} does not exist: give the authors' checkpoint file or folder")
    if clip is not None and not clip.is_file():
        raise UserError(f"--clip {clip} does not exist: give open_clip's JSON, or leave it out for ViT-H-14")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a conversion that was cut off
    part.mkdir(parents=True)
    try:
        found = read(source, clip)
        write(found, part, name or target.name, base, half, source)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return found


def read(source: Path, clip: Path | None = None) -> Released:
    """The authors' model in a file or folder, through the reader that knows it. `clip`: open_clip's model config."""
    if source.is_dir():
        return released_ccsr.read_v2(source)
    state = ldm.read_state(source)
    if released.is_released(state):
        return released.read(state, None if clip is None else json.loads(clip.read_text()))
    if released_ccsr.is_v1(state):
        return released_ccsr.read_v1(state)
    raise UserError(
        f"{source} is neither ConsisSR's nor CCSR's: its first key is '{next(iter(state))}'; give a file of theirs"
    )


def is_half(source: Path) -> bool:
    """Whether a source stores its weights in 16 bits."""
    if source.is_dir():
        return False
    kinds = {t.dtype for t in ldm.read_state(source).values() if t.is_floating_point() and t.ndim > 1}
    return kinds <= {torch.float16}


def has_text(source: Path) -> bool:
    """Whether a folder brings its text encoder."""
    return all((source / name).is_dir() for name in TEXT_FOLDERS)


def choose_base(base: str, found: Released, source: Path) -> str:
    """The name of the base to store: 'own', or what can be found from any folder."""
    if base == "auto":
        whole = found.unet is not None and found.latents is not None and (found.text is not None or has_text(source))
        return "own" if whole else "sd21-base"
    if base == "own" and (found.unet is None or found.latents is None):
        raise UserError("--base own: the source has no UNet or autoencoder of its own; name a base instead")
    if base != "own" and Path(base).exists():
        return str(Path(base).absolute())
    return base


def runnable(found: Released, base: str, source: Path) -> SamplerConfig:
    """The release's SamplerConfig; without prompts and guidance where an own base has no text encoder for them."""
    sampler = found.config.sampler
    if base != "own" or found.text is not None or has_text(source) or sampler.guidance == 1:
        return sampler
    log.warning(
        "no text encoder in the source, so its own base embeds no prompts, and guidance is off: name a base (--base) "
        "or copy the folders text_encoder and tokenizer into its base/"
    )
    return replace(sampler, positive="", negative="", guidance=1.0, first_prompt="positive")


def write(found: Released, target: Path, name: str, base: str, half: bool, source: Path) -> None:
    """The model folder: networks, configuration with its plan, prompts that only this model's text encoder knows."""
    base, dtype = choose_base(base, found, source), torch.float16 if half or is_half(source) else None
    sampler = runnable(found, base, source)
    if found.text is not None:
        wanted = dict.fromkeys([sampler.positive, sampler.negative, ""])
        found.prompts, found.own_prompts = {prompt: found.text.encode([prompt]) for prompt in wanted}, True
    if base == "own":
        base = "./base"
        save_base(target / "base", found, dtype)
        found.decoder = "base"  # its autoencoder is the base's
        for folder in TEXT_FOLDERS if found.text is None and has_text(source) else ():
            shutil.copytree(source / folder, target / "base" / folder)
    found.config = replace(found.config, model=replace(found.config.model, base=base), sampler=sampler)
    card = f"# {name}\n\nConverted from {found.kind} as its authors published it; weights under their licence.\n"
    save_model(target, found, dtype, card)
