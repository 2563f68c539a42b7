"""Typed, documented configuration: dataclasses, YAML files and key=value overrides, strictly checked.

Here stand the configurations of models and samplers, and how any is read; `train_config.py` has that of a training run,
`stage_config.py` what its stages add. Every field is documented by the string below it (meaning, unit, source) and read
by code; `tests/test_config.py` holds all to that. Defaults stand in these three files and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from consissr.errors import UserError

ConfigT = TypeVar("ConfigT")


def nearest(word: str, known: list[str]) -> str:
    """The known word most like `word`, as a phrase for an error message ("" when none is close)."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def check_word(value: str, known: tuple[str, ...], name: str) -> None:
    """Raise UserError unless `value` is one of the `known` words of the field `name`."""
    if value not in known:
        raise UserError(f"{name} is '{value}', which it cannot be{nearest(str(value), list(known))}")


@dataclass(kw_only=True)
class ModelConfig:
    """What the weights of a model need: fixed when it is trained or converted, stored in its folder."""

    base: str = "sd21-base"
    """Base model: 'sd21-base' (known mirrors), a bundled name ('nano'), a diffusers folder, a file or a hub id;
    in a model folder's config.yaml "./..." is a folder inside it."""
    base_sha256: str = ""
    """Optional SHA-256 of the base's UNet weight file; loading fails when it differs. Empty: not checked."""
    hint: str = "conv"
    """How z_lq enters the ControlNet: 'conv' (CCSR v2, one 3x3 convolution) or 'stack' (ConsisSR, eight)."""
    position_embedding: int = 0
    """Side of the latent that learned self-attention positions are made for (ConsisSR: 64); 0 turns them off."""
    unet_trained: list[str] = field(default_factory=list)
    """Parts of the base's UNet (prefixes of names) that are trained and stored with the ControlNet ("we first finetune
    the pre-trained SD", Sec. IV-A, CCSR); empty: the UNet stays as it is (both releases)."""
    residual: float = 0.0
    """Read the network's output as v of (z_hq - z_lq) / residual, the standard deviation of that difference, so that
    restoring starts from z_lq (`nano`: a small network copies it badly); 0: as v of z_hq (both papers)."""
    transposed_attention: bool = False
    """Channel-wise self-attention after the spatial one (Sec. 3.3, ConsisSR)."""
    image_prompt: str = "none"
    """Image branch of the cross-attention: 'none', 'hpa', 'hpa_separate' or 'ip_adapter' (Table 3, ConsisSR)."""
    image_kv: str = "shared"
    """Keys and values of the HPA image branch: 'shared' with the text's (paper) or 'separate', copies of them
    that are not trained (as released). IP-Adapter's are always its own."""
    image_tokens: str = "pooled"
    """Image tokens: 'pooled' (one, as released) or 'patches' (one per CLIP patch)."""
    image_encoder: str = "base"
    """Where a new image branch takes CLIP's image tower from: 'base' (image_encoder/ of the base's folder), a folder
    with image_encoder/ (a run of stage 'rclip') or a bundled model (its tower alone: 'nano-consissr'), or
    'open_clip:NAME/TAG' or '/FILE' (open_clip's weights by tag or as a file; SD2.1's tower is
    open_clip:ViT-H-14/laion2b_s32b_b79k)."""
    adapter_init: str = "default"
    """How a new image adapter starts: 'default' (PyTorch's), 'unit' (tokens of unit deviation, as a text's; a run whose
    `init` has another one begins it anew) or 'as_released' (last layer zero, which blocks all gradients)."""

    def __post_init__(self) -> None:
        check_word(self.hint, ("conv", "stack"), "model.hint")
        if self.residual < 0:
            raise UserError(f"model.residual is {self.residual}: use a standard deviation, or 0 to turn it off")
        if self.position_embedding < 0:
            raise UserError(f"model.position_embedding is {self.position_embedding}: use a side, or 0 to turn it off")
        check_word(self.image_prompt, ("none", "hpa", "hpa_separate", "ip_adapter"), "model.image_prompt")
        check_word(self.image_kv, ("shared", "separate"), "model.image_kv")
        check_word(self.image_tokens, ("pooled", "patches"), "model.image_tokens")
        check_word(self.adapter_init, ("default", "unit", "as_released"), "model.adapter_init")


@dataclass(kw_only=True)
class SamplerConfig:
    """How images are restored: the model's default, changed by the flags of scripts/infer.py."""

    plan: str = "nuts"
    """Timesteps: 'nuts' (CCSR) or 'ddpm' (ConsisSR, spaced DDPM)."""
    steps: int = 6
    """Grid steps T: 6 for NUTS (Sec. IV-A, CCSR), 50 for spaced DDPM (Sec. 4.1, ConsisSR)."""
    t_max: float = 2 / 3
    """NUTS: fraction of T where uniform steps begin (Sec. IV-A, CCSR)."""
    t_min: float = 1 / 2
    """NUTS: fraction of T where sampling is cut off (Sec. IV-A, CCSR)."""
    grid: str = "trailing"
    """NUTS grid: 'trailing' (ours), 'leading' (CCSR v2 as released) or 'linspace' (CCSR v1)."""
    timesteps: list[Any] = field(default_factory=list)
    """The plan itself, a list of [t, t_next, kind]; written into model folders by training and conversion. Empty:
    from `plan`, `steps`, `t_max`, `t_min` and `grid`."""
    start: str = "lq"
    """First latent: 'lq' (z_lq noised to T-1, CCSR v2) or 'noise' (ConsisSR, CCSR v1)."""
    guidance: float = 1.0
    """Scale of classifier-free guidance by the text; 1 evaluates the positive prompt only."""
    positive: str = ""
    """Positive prompt."""
    negative: str = ""
    """Negative prompt, used when guidance is not 1."""
    first_prompt: str = "positive"
    """First step under guidance, in plans whose first step is no DDPM step (NUTS; one single step of either kind):
    'guided' like the others (ConsisSR), or unguided with the 'positive' or the 'negative' prompt (CCSR v2 as released:
    negative). A DDPM step is always guided."""
    posterior: str = "mode"
    """z_lq: 'mode' or 'sample' of the VAE posterior (CCSR v2 samples)."""
    posterior_rows: int = 1
    """Under guidance: 1 posterior sample for both halves, or 2 (CCSR v2 as released)."""
    geometry: str = "pad"
    """Size rules: 'pad' (ours: exact scale, reflection), or as released 'ccsr' (v2), 'ccsr_v1' or 'consissr'."""
    color_fix: str = "adain"
    """Colour transfer from the LQ image: 'adain', 'wavelet' or 'none'."""
    tile: int = -1
    """Side of a diffusion tile in output pixels; 0 turns tiles off, -1 chooses from image size and memory."""
    tile_overlap: int = -1
    """How far diffusion tiles overlap, in output pixels (CCSR: half the tile); -1: a quarter of the tile."""
    tile_weights: str = "symmetric"
    """Gaussian weights of a tile: 'symmetric' (ours) or 'as_released' (CCSR v2, centred half a pixel low)."""
    vae_tile: int = -1
    """Side of an autoencoder tile in output pixels; 0 turns tiles off, -1 chooses from image size and memory."""
    vae_tiling: str = "exact"
    """Autoencoder tiles: 'exact', 'windowed' (attention in windows) or 'as_released' (CCSR v2, decoder only)."""

    def __post_init__(self) -> None:
        check_word(self.plan, ("nuts", "ddpm"), "sampler.plan")
        check_word(self.grid, ("trailing", "leading", "linspace"), "sampler.grid")
        check_word(self.start, ("lq", "noise"), "sampler.start")
        check_word(self.first_prompt, ("guided", "positive", "negative"), "sampler.first_prompt")
        check_word(self.posterior, ("mode", "sample"), "sampler.posterior")
        check_word(self.geometry, ("pad", "ccsr", "ccsr_v1", "consissr"), "sampler.geometry")
        check_word(self.color_fix, ("adain", "wavelet", "none"), "sampler.color_fix")
        check_word(self.tile_weights, ("symmetric", "as_released"), "sampler.tile_weights")
        check_word(self.vae_tiling, ("exact", "windowed", "as_released"), "sampler.vae_tiling")
        for name in ("tile", "tile_overlap", "vae_tile"):
            if getattr(self, name) < -1:
                raise UserError(f"sampler.{name} is {getattr(self, name)}: use pixels, 0 for off or -1 for automatic")
        if self.posterior_rows not in (1, 2):
            raise UserError(f"sampler.posterior_rows is {self.posterior_rows}: use 1 or 2")


@dataclass(kw_only=True)
class FolderConfig:
    """`config.yaml` of a model folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What the weights need."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the model samples unless told otherwise."""


def load_config(cls: type[ConfigT], path: str | Path | None = None, overrides: list[str] | None = None) -> ConfigT:
    """A checked `cls` from a YAML file and `key=value` overrides (both optional).

    Raises UserError for a missing file, bad YAML, an unknown key (naming the nearest valid one) or a wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    layers = []
    try:
        if path is not None:
            if not Path(path).is_file():
                raise UserError(f"config file {path} does not exist: give the path of a YAML file")
            layers.append((str(path), OmegaConf.load(path)))
        for word in overrides or []:
            if "=" not in word:
                raise UserError(f"override '{word}' is not of the form key=value, such as steps=100")
            text = f"{word}''" if word.endswith("=") else word  # an empty string rather than null
            layers.append((f"'{word}'", OmegaConf.from_dotlist([text])))
        merged = OmegaConf.structured(cls)
        for source, layer in layers:
            check_keys(cls, OmegaConf.to_container(layer), source)
            merged = OmegaConf.merge(merged, layer)
        return OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError) as error:
        where = getattr(error, "full_key", None) or "file"
        what = str(error).strip().splitlines()[0]
        if "is not a ListConfig" in what:
            what = "a list is needed: write it in brackets, such as [one,two]"
        raise UserError(f"bad configuration: {where}: {what}") from error


def check_keys(cls: type, given: Any, source: str, prefix: str = "") -> None:
    """Raise UserError if the mapping `given` has a key that the dataclass `cls` lacks, at any depth."""
    if not isinstance(given, dict):
        raise UserError(f"{source}: {prefix or 'the file'} must be a mapping of keys to values")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in given.items():
        if key not in fields:
            raise UserError(f"{source}: unknown key '{prefix}{key}'{nearest(str(key), list(fields))}")
        default = fields[key].default_factory
        if dataclasses.is_dataclass(default) and value is not None:
            check_keys(default, value, source, f"{prefix}{key}.")


def changed(config: ConfigT, settings: dict[str, Any]) -> ConfigT:
    """`config` with some fields replaced, checked; UserError for a field it lacks, naming the nearest."""
    check_keys(type(config), settings, "settings")
    return dataclasses.replace(config, **settings)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """All fields of a configuration by dotted name."""
    found = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        inner = flat(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value}
        found |= inner
    return found


def changed_fields(a: Any, b: Any, besides: Collection[str] = ()) -> list[str]:
    """Dotted names of the fields in which two configurations of one kind differ, `besides` aside."""
    one, two = flat(a), flat(b)
    return sorted(name for name in one if name not in besides and one[name] != two[name])


def save_config(config: Any, path: str | Path) -> None:
    """Write a config dataclass, every field resolved, as YAML."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.structured(config), path)
