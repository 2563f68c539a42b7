"""The authors' checkpoints as model folders: which release a source is, and its networks in this project's layout."""

from __future__ import annotations

import logging
import shutil
import zipfile
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from consissr.config.sampler import SamplerConfig
from consissr.errors import UserError
from consissr.weights import released_ccsr, released_consissr
from consissr.weights.base import BASE_NETWORKS
from consissr.weights.base import choose as choose_base_files
from consissr.weights.files import read_json, read_weights, weight_names
from consissr.weights.folder import save_base, save_model

if TYPE_CHECKING:
    from consissr.weights.model import Released

log = logging.getLogger(__name__)

CONVERTER = 2
"""Counts up when conversion changes: folders of another version are converted again."""

CHECKPOINTS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
TEXT_FOLDERS = ("text_encoder", "tokenizer")
BESIDE = "stable-diffusion-2-1-base"
"""The base's folder beside CCSR v2's controlnet/ and vae/, as its authors' README arranges them."""


def convert(
    source: Path,
    target: Path,
    base: str = "auto",
    clip: Path | None = None,
    half: bool = False,
    name: str = "",
    finish: Callable[[Path], None] | None = None,
) -> Released:
    """Turn the authors' file or folder `source` into the model folder `target`, at once or not at all.

    base: name, folder, file or hub id; 'own' writes the source's own beside the result; 'auto' does where the source
    has all of it, else takes the folder beside it or 'sd21-base'. clip: open_clip's model config (JSON), if ConsisSR's
    is not ViT-H-14. half: store 16 bits; else weights are stored as they are. name: the model's, for its card.
    finish: called with the folder before it takes its place. Raises UserError.
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
        source = release_in(source)
        model = read(source, clip, with_base=base in ("auto", "own"))
        write(model, part, name or target.name, base, torch.float16 if half else None, source)
        if finish is not None:
            finish(part)
        part.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target} cannot be written ({error}): make room, or name another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return model


def release_in(path: Path) -> Path:
    """The release that a path holds: the file itself, a folder with controlnet/, or a folder's one checkpoint."""
    if path.is_file() and path.suffix in CHECKPOINTS:
        return path
    try:
        chosen = choose_released([n.relative_to(path).as_posix() for n in (*path.glob("*"), *path.glob("*/*"))])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return path if "/" in chosen[0] else path / chosen[0]


def choose_released(files: Collection[str], half: bool = False) -> list[str]:
    """The files of a release among those of a repository: CCSR v2's folders, with their base, or one checkpoint.

    half: those in half precision are preferred.
    """
    networks = []
    for part in ("controlnet", "vae") if "controlnet/config.json" in files else ():
        weights = [n for n in weight_names("diffusion_pytorch_model", half) if f"{part}/{n}" in files]
        if f"{part}/config.json" in files and not weights:
            raise UserError(f"it has {part}/config.json, but not its diffusion_pytorch_model.safetensors")
        networks += [f"{part}/config.json", f"{part}/{weights[0]}"] if weights else []
    if networks:
        whole = all(f"{part}/config.json" in files for part in BASE_NETWORKS)
        return list(dict.fromkeys(networks + (choose_base_files(files, half) if whole else [])))
    checkpoints = [name for name in files if "/" not in name and name.endswith(CHECKPOINTS)]
    halves = [name for name in checkpoints if "fp16" in name]
    full = [name for name in checkpoints if name not in halves]
    if checkpoints and max(len(full), len(halves)) == 1:
        return halves if halves and (half or not full) else full
    several = f", but {len(checkpoints)} checkpoints: give the path of one" if checkpoints else ""
    raise UserError(
        "it holds no model: neither config.yaml (ours), nor controlnet/ and vae/ (CCSR v2), nor one checkpoint "
        f"(CCSR v1, ConsisSR){several}"
    )


def read(source: Path, clip: Path | None = None, with_base: bool = True) -> Released:
    """The authors' model in a file or folder, through the reader that knows it, its numbers as they are stored.

    clip: open_clip's model config. with_base: whether the UNet that lies in CCSR v2's folder is read, too.
    """
    if source.is_dir():
        return released_ccsr.read_v2(source, with_base, dtype=None)
    check_archive(source)
    state = read_weights(source)
    if released_consissr.is_released(state):
        return released_consissr.read(state, None if clip is None else read_json(clip), dtype=None)
    if released_ccsr.is_v1(state):
        return released_ccsr.read_v1(state, dtype=None)
    raise UserError(
        f"{source} is neither ConsisSR's nor CCSR's: its first key is '{next(iter(state))}'; give a file of theirs"
    )


def check_archive(source: Path) -> None:
    """UserError where the contents of a .ckpt's archive are not those that its checksums were made of."""
    if not zipfile.is_zipfile(source):
        return
    try:
        with zipfile.ZipFile(source) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise UserError(f"{source} cannot be read ({error}): download it again") from error
    if damaged:
        raise UserError(f"{source} is damaged (checksum of {damaged}): download it again")


def has_text(source: Path) -> bool:
    """Whether a folder brings its text encoder."""
    return all((source / name).is_dir() for name in TEXT_FOLDERS)


def choose_base(base: str, model: Released, source: Path) -> str:
    """The name of the base to store: 'own', or what can be found from any folder."""
    if base == "auto":
        whole = model.unet is not None and model.latents is not None and (model.text is not None or has_text(source))
        beside = (source / BESIDE).absolute()
        return "own" if whole else str(beside) if (beside / "unet").is_dir() else "sd21-base"
    if base == "own" and (model.unet is None or model.latents is None):
        raise UserError("--base own: the source has no UNet or autoencoder of its own; name a base instead")
    if base != "own" and Path(base).exists():
        return str(Path(base).absolute())
    return base


def runnable(model: Released, base: str, source: Path) -> SamplerConfig:
    """The release's SamplerConfig; without prompts and guidance where an own base has no text encoder for them."""
    sampler = model.config.sampler
    if base != "own" or model.text is not None or has_text(source) or sampler.guidance == 1:
        return sampler
    log.warning(
        "no text encoder in the source, so its own base embeds no prompts, and guidance is off: name a base (--base) "
        "or copy the folders text_encoder and tokenizer into its base/"
    )
    return replace(sampler, positive="", negative="", guidance=1.0, first_prompt="positive")


def write(model: Released, target: Path, name: str, base: str, dtype: torch.dtype | None, source: Path) -> None:
    """The model folder: networks, configuration with its plan, prompts that only this model's text encoder knows."""
    base = choose_base(base, model, source)
    sampler = runnable(model, base, source)
    if model.latents is None:
        log.warning("%s has no vae/: the base's autoencoder decodes, as after the first stage of CCSR alone", source)
    if model.text is not None:
        wanted = dict.fromkeys([sampler.positive, sampler.negative, ""])
        model.prompts, model.own_prompts = {prompt: model.text.encode([prompt]) for prompt in wanted}, True
    if base == "own":
        base = "./base"
        save_base(target / "base", model, dtype)
        model.decoder = "base"  # its autoencoder is the base's
        for folder in TEXT_FOLDERS if model.text is None and has_text(source) else ():
            copied = shutil.copytree(source / folder, target / "base" / folder, copy_function=shutil.copyfile)
            copied.chmod(0o755)  # what is read may be read-only, as shared checkpoints are; the copy can be replaced
    model.config = replace(model.config, model=replace(model.config.model, base=base), sampler=sampler)
    card = f"# {name}\n\nConverted from {model.kind} as its authors published it; weights under their licence.\n"
    save_model(target, model, dtype, card)
