"""Reading and writing the autoencoder of a vae/ folder: whole, or a tuned decoder alone."""

from pathlib import Path

import torch

from consissr.errors import UserError
from consissr.models.vae.latents import Latents, decoder_names, empty_latents
from consissr.weights.files import WEIGHTS, build, load_strict, read_json, read_weights, write_weights

LINEAR_PATH = "linear_path.safetensors"
TUNED = "decoder.safetensors"
"""A tuned decoder by the names it has in `Latents`; everything else is the base's."""


def load_latents(folder: Path, base: Latents | None = None, dtype: torch.dtype = torch.float32) -> Latents:
    """The autoencoder of a `vae/` folder: diffusers' layout (as `dtype` on the CPU), or a tuned decoder.

    Where only a decoder is stored, it replaces that of `base`, in place. UserError for damaged files, and for a decoder
    without a base or of another.
    """
    if (folder / TUNED).is_file():
        if base is None:
            raise UserError(f"{folder} holds a decoder only: give the model folder it is in, whose base has the rest")
        load_strict(base, read_weights(folder / TUNED), str(folder / TUNED), subset=decoder_names(base))
        return base
    settings = read_json(folder / "config.json")
    latents = build(folder / "config.json", lambda: empty_latents(settings))
    load_strict(latents.vae, read_weights(folder / WEIGHTS), str(folder), dtype=dtype)
    if latents.linear is not None:
        load_strict(latents.linear, read_weights(folder / LINEAR_PATH), str(folder / LINEAR_PATH), dtype=dtype)
    return latents


def same_encoder(one: Latents, other: Latents) -> bool:
    """Whether two autoencoders have the same weights but for the decoder's, up to what half precision rounds."""
    own, theirs = ({n: x.float() for n, x in each.state_dict().items() if n not in decoder_names(each)}
                   for each in (one, other))  # fmt: skip
    return own.keys() == theirs.keys() and all(
        x.shape == theirs[n].shape and (x - theirs[n]).abs().max() <= 0.01 * x.abs().max() for n, x in own.items()
    )


def save_decoder(folder: Path, latents: Latents, dtype: torch.dtype | None = None) -> None:
    """Write the tuned decoder of `latents`, whose other parts are the base's; `dtype` is the storage type."""
    state = latents.state_dict()
    write_weights(folder / TUNED, {name: state[name] for name in decoder_names(latents)}, dtype)


def save_latents(folder: Path, latents: Latents, dtype: torch.dtype | None = None) -> None:
    """Write what `load_latents` reads; `dtype` is the storage type."""
    folder.mkdir(parents=True, exist_ok=True)
    latents.vae.save_config(folder)
    write_weights(folder / WEIGHTS, latents.vae.state_dict(), dtype)
    if latents.linear is not None:
        write_weights(folder / LINEAR_PATH, latents.linear.state_dict(), dtype)


def stored_decoder(folder: Path) -> str:
    """What a model's vae/ folder has instead of the base's: nothing ('base'), a 'tuned' decoder, or all ('own')."""
    if not folder.is_dir():
        return "base"
    return "tuned" if (folder / TUNED).is_file() else "own"
