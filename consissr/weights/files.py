"""Model folders and weight files: what stands where, read strictly (folder.py loads and saves whole models).

    config.yaml                 model and sampler configuration, every field resolved
    controlnet/                 diffusers' layout, with our hint and additions
    unet_adapter.safetensors    only what was added to the base's UNet, or trained in it
    pytorch_lora_weights.safetensors    low-rank adapters of the base's UNet, in diffusers' format
    image_encoder/              CLIP image tower and adapter, where the model has an image prompt
    vae/                        where the decoder was tuned: the decoder, or a whole autoencoder (converted releases)
    README.md                   model card

The base model is named in config.yaml, never copied. All weights are safetensors, loaded strictly.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from consissr.config.folder import FolderConfig
from consissr.config.loading import load_config
from consissr.errors import UserError
from consissr.weights.ldm import modern, read_state

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = ("nano-ccsr", "nano-consissr")
Built = TypeVar("Built")
BUILD_ERRORS = (
    TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, LookupError, AssertionError, ImportError,
)  # fmt: skip
"""What libraries raise at settings that describe no network."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET_ADAPTER = "unet_adapter.safetensors"
LORA = "pytorch_lora_weights.safetensors"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file; nothing stored in it runs. UserError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        return read_state(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path} cannot be read ({error}): copy or download the model again") from error


def weight_names(stem: str, half: bool) -> list[str]:
    """Names that a network's weights may have, best first; `half`: those in half precision will do."""
    names = [f"{stem}{kind}" for kind in (".safetensors", ".fp16.safetensors")]
    binary = stem if stem.startswith("diffusion") else f"pytorch_{stem}"
    names = names[::-1] if half else names
    return [*names, *(f"{binary}{kind}" for kind in ((".fp16.bin", ".bin") if half else (".bin", ".fp16.bin")))]


def weights_file(folder: Path, stem: str = "diffusion_pytorch_model") -> Path:
    """The file with the weights of a network's folder. UserError if there is none."""
    for name in weight_names(stem, half=False):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no weights: it needs {stem}.safetensors")


def build(what: Path, make: Callable[[], Built], device: str = "meta") -> Built:
    """What `make` builds of the settings in the file `what`; UserError where it can't."""
    try:
        with torch.device(device):
            return make()
    except BUILD_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{what} describes no network ({reason}): copy or download the model again") from error


def read_network(folder: Path, kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers network of class `kind` as `dtype` on the CPU, from config.json and weights of any age."""
    settings = {name: value for name, value in read_json(folder / "config.json").items() if not name.startswith("_")}
    network = build(folder / "config.json", lambda: kind.from_config(settings))
    weights = {modern(name): tensor for name, tensor in read_weights(weights_file(folder)).items()}
    load_strict(network, weights, str(folder), dtype=dtype)
    return network.eval()


def read_json(path: Path) -> dict[str, Any]:
    """A network's config.json. Raises UserError if it is missing or damaged."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy or download the model again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings of a network: copy or download the model again")
    return settings


def write_weights(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Tensors to a safetensors file, floating-point ones stored as `dtype` where one is given."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        name: (t.to(dtype) if dtype is not None and t.is_floating_point() else t).detach().cpu().contiguous()
        for name, t in tensors.items()
    }
    save_file(stored, path, metadata={"format": "pt"})


def load_strict(
    module: nn.Module,
    tensors: dict[str, Tensor],
    what: str,
    subset: set[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Load `tensors` into `module`: exactly its state (or the `subset` of names), else UserError naming the keys.

    The module's parameters take their values. With `dtype` the tensors, floating-point ones as this type, become its
    parameters: a module that was built on the meta device is then in memory once, and never in another type.
    """
    wanted = set(module.state_dict()) if subset is None else subset
    missing, unplanned = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing or unplanned:
        raise UserError(
            f"{what}: {len(missing)} keys are missing (first: {missing[:1]}) and {len(unplanned)} are unplanned "
            f"(first: {unplanned[:1]}): the file belongs to another model"
        )
    own = module.state_dict()
    for name, value in tensors.items():
        if own[name].is_floating_point() != value.is_floating_point():
            raise UserError(f"{what}: {name} is stored as {value.dtype}: weights are floating-point numbers")
        if own[name].shape != value.shape:
            shapes = f"{tuple(value.shape)}, this model's is {tuple(own[name].shape)}"
            raise UserError(f"{what}: {name} has shape {shapes}: the file belongs to a model of another size")
    if dtype is not None:  # copies: what is read may be a view of the file, which somebody may write anew
        kinds = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
        tensors = {name: tensor.to(kinds[name], copy=True) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, strict=False, assign=dtype is not None)
    log.info("%s: %d keys used, %d of the base kept", what, len(tensors), len(own) - len(tensors))


def base_of(folder: Path, config: FolderConfig) -> str:
    """Where the base model of a model folder is: what begins with "./" lies in that folder."""
    base = config.model.base
    return str(folder / base) if base.startswith("./") else base


def read_config(folder: Path) -> FolderConfig:
    """config.yaml of a model folder, taken literally: it may have been downloaded, so nothing in it is resolved."""
    path = folder / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}): copy or download the model again") from error
    if "${" in text:
        raise UserError(f"{path} holds an interpolation, '${{...}}', which a model's settings never need: not loaded")
    return load_config(FolderConfig, path)
