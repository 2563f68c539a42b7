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

import json
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from consissr.config.folder import FolderConfig
from consissr.config.loading import load_config
from consissr.errors import UserError, reason_of

log = logging.getLogger(__name__)

CARD = "README.md"
MODEL_FILES = (
    "config.yaml", "controlnet/", "unet_adapter.safetensors", "pytorch_lora_weights.safetensors", "image_encoder/",
    "vae/", "hint_vae/", "prompts.safetensors", "base/", CARD,
)  # fmt: skip
"""How the names of a model folder's files begin."""
ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = ("nano-ccsr", "nano-consissr")
Built = TypeVar("Built")
BUILD_ERRORS = (
    TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, LookupError, AssertionError, ImportError,
)  # fmt: skip
"""What libraries raise at settings that describe no network."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names inside an autoencoder's attention in diffusers' files before 0.15, and today."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET_ADAPTER = "unet_adapter.safetensors"
LORA = "pytorch_lora_weights.safetensors"


class Inert:
    """Stands in for every class that a checkpoint names but weights don't need: nothing of it runs."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors or torch file, on the CPU; nothing stored in it runs.

    A Lightning file's `state_dict` is unwrapped and a `module.` prefix removed. UserError if the file is missing,
    damaged, larger than the memory, or holds no tensors by name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights {path} do not exist: copy or download the model again")
    try:
        stored = load_file(path) if path.suffix == ".safetensors" else read_pickle(path)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks to run {code[1]}, which weights never need" if code else "it is no checkpoint, or damaged"
        raise UserError(f"{path} was not loaded: {reason}; download it again from its authors") from error
    except (SafetensorError, EOFError, OSError, MemoryError, struct.error, zipfile.BadZipFile, *BUILD_ERRORS) as error:
        reason = reason_of(error)
        short = isinstance(error, MemoryError) or "allocate memory" in reason  # torch's is a RuntimeError
        remedy = "close other programs, or use a larger machine" if short else "copy or download the model again"
        raise UserError(f"weights {path} cannot be read ({reason}): {remedy}") from error
    if isinstance(stored, dict) and isinstance(stored.get("state_dict"), dict):
        stored = stored["state_dict"]
    tensors = {n: t for n, t in stored.items() if isinstance(t, Tensor)} if isinstance(stored, dict) else {}
    if not tensors:
        raise UserError(f"{path} holds no weights by name: give the file of a model")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def read_pickle(path: Path) -> Any:
    """A torch file with `weights_only`; classes it names beside tensors are replaced by `Inert`."""
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    if not zipfile.is_zipfile(path):  # torch before 1.6
        return torch.load(path, map_location="cpu", weights_only=True)
    foreign = get_unsafe_globals_in_checkpoint(path)
    with safe_globals([(Inert, name) for name in foreign]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


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


def build(what: Path | str, make: Callable[[], Built], device: str = "meta") -> Built:
    """What `make` builds of the settings `what`, such as a file; UserError where it can't."""
    try:
        with torch.device(device):
            return make()
    except BUILD_ERRORS as error:
        reason = reason_of(error)
        raise UserError(f"{what} describes no network ({reason}): copy or download the model again") from error


def read_network(
    folder: Path,
    make: Callable[[dict[str, Any]], Any],
    dtype: torch.dtype | None = None,
    names: Mapping[str, str] | None = None,
) -> Any:
    """The diffusers network that `make` builds of config.json, with weights of any age, on the CPU.

    dtype: see `load_strict`; None: as stored. names: modules that have other names in the file -> theirs here.
    """
    settings = {name: value for name, value in read_json(folder / "config.json").items() if not name.startswith("_")}
    network = build(folder / "config.json", lambda: make(settings))
    weights = {modern(name): tensor for name, tensor in read_weights(weights_file(folder)).items()}
    for theirs, ours in (names or {}).items():
        weights = {
            f"{ours}.{n.removeprefix(f'{theirs}.')}" if n.startswith(f"{theirs}.") else n: weights[n] for n in weights
        }
    load_strict(network, weights, str(folder), dtype=dtype)
    return network.eval()


def modern(name: str) -> str:
    """The name of an autoencoder's parameter in a diffusers file of any age, as it is today."""
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{OLD_ATTENTION[m[2]]}.", name
    )


def read_json(path: Path) -> dict[str, Any]:
    """A network's config.json. Raises UserError if it is missing or damaged."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
    """Load `tensors` into `module`: exactly its state (or the `subset` of names), else UserError naming the key.

    The module's parameters take their values. With `dtype` copies of the tensors, floating-point ones as this type,
    become its parameters: a module that was built on the meta device is then in memory once, and never in another
    type. Without, a module on the meta device takes the tensors themselves.
    """
    own = module.state_dict()
    wanted = own.keys() if subset is None else subset
    both = sorted(wanted & tensors.keys())
    kinds = [name for name in both if own[name].is_floating_point() != tensors[name].is_floating_point()]
    wrong = {
        "lacks": sorted(wanted - tensors.keys()),
        "has unknown": sorted(tensors.keys() - wanted),
        "has no floating-point numbers in": kinds,
        "has another shape for": [name for name in both if own[name].shape != tensors[name].shape],
    }
    for problem, names in wrong.items():
        if names:
            shapes = (
                f" ({tuple(tensors[names[0]].shape)}, not {tuple(own[names[0]].shape)})" if "shape" in problem else ""
            )
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{what} {problem} {names[0]}{shapes}{rest}: it belongs to another model")
    on_meta = any(tensor.is_meta for tensor in own.values())
    if dtype is not None:  # copies: what is read may be a view of the file, which somebody may write anew
        types = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
        tensors = {name: tensor.to(types[name], copy=True) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, strict=False, assign=dtype is not None or on_meta)
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
