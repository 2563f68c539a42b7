"""Reading configurations: a dataclass from a YAML file and key=value overrides, strictly checked."""

import dataclasses
import difflib
import io
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from consissr.errors import UserError, reason_of

ConfigT = TypeVar("ConfigT")

LONGEST = 2**20
"""Bytes of a configuration file."""


def nearest(word: str, known: list[str]) -> str:
    """The known word most like `word`, as a phrase for an error message ("" when none is close)."""
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.4)
    return f"; did you mean '{lower[close[0]]}'?" if close else f"; known: {', '.join(sorted(known))}"


def check_word(value: str, known: tuple[str, ...], name: str) -> None:
    """Raise UserError unless `value` is one of the `known` words of the field `name`."""
    if value not in known:
        raise UserError(f"{name} is '{value}', which it cannot be{nearest(str(value), list(known))}")


def find_config(path: str | Path) -> Path:
    """`path`, or where nothing is there the package's own file of that name, such as configs/ccsr/nuts.yaml."""
    package = Path(__file__).parents[1]  # in a wheel configs/ stands in it, in a clone beside it
    own = (root / path for root in (package, package.parent))
    return Path(path) if Path(path).exists() else next(filter(Path.is_file, own), Path(path))


def read_word(key: str, path: str | Path | None, overrides: list[str] | None = None) -> str:
    """The word that a YAML file and `key=value` overrides give the top-level `key`; '' for none, or an unreadable file.

    It says which dataclass the file is to be loaded as; what is wrong with the file is said then.
    """
    from yaml import YAMLError, safe_load

    word = ""
    try:
        content = safe_load(config_text(path)) if path is not None else {}
        word = str(content.get(key, "")) if isinstance(content, dict) else ""
    except (UserError, OSError, YAMLError, ValueError, RecursionError):
        pass
    for override in overrides or []:
        name, _, value = override.partition("=")
        word = value if name == key else word
    return word


def config_text(path: str | Path) -> str:
    """A configuration file's text. Raises UserError for what is no file or too long for one; OSError, UnicodeError."""
    path = find_config(path)
    if not path.is_file():
        state = "is no file" if path.exists() else "does not exist"
        raise UserError(f"config file {path} {state}: give the path of a YAML file")
    if path.stat().st_size > LONGEST:
        raise UserError(f"config file {path} has more than {LONGEST} bytes: give the path of a YAML file")
    return path.read_text(encoding="utf-8")


def load_config(cls: type[ConfigT], path: str | Path | None = None, overrides: list[str] | None = None) -> ConfigT:
    """A checked `cls` from a YAML file and `key=value` overrides (both optional).

    Raises UserError for a missing file, bad YAML, an unknown key (naming the nearest valid one) or a wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import BaseLoader, YAMLError
    from yaml import load as scalars

    source, layers = str(path), []
    try:
        if path is not None:
            text = config_text(path)
            layers.append((source, OmegaConf.load(io.StringIO(text)), scalars(text, BaseLoader)))
        for word in overrides or []:
            source = f"'{word}'"
            if "=" not in word:
                raise UserError(f"override '{word}' is not of the form key=value, such as steps=100")
            text = f"{word}''" if word.endswith("=") else word  # an empty string rather than null
            key, _, value = text.partition("=")
            raw = scalars(value, BaseLoader)
            for name in reversed(key.split(".")):
                raw = {name: raw}
            layers.append((source, OmegaConf.from_dotlist([text]), raw))
        merged = OmegaConf.structured(cls)
        for source, layer, raw in layers:
            given = OmegaConf.to_container(layer)
            check_keys(cls, given, source)
            merged = OmegaConf.unsafe_merge(merged, as_written(cls, given, raw))
        return OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, RecursionError) as error:
        where = getattr(error, "full_key", None) or source
        what = reason_of(error)
        if mark := getattr(error, "problem_mark", None):  # YAML's own
            where, what = f"{where}, line {mark.line + 1}", error.problem
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
        if isinstance(value, dict) and default is not dataclasses.MISSING and isinstance(default(), list):
            raise UserError(f"{source}: {prefix}{key}: a list is needed: write it in brackets, such as [one,two]")
        if dataclasses.is_dataclass(default) and value is not None:
            check_keys(default, value, source, f"{prefix}{key}.")


def as_written(cls: type, given: dict, raw: Any) -> dict:
    """`given`, but text fields as they are written (`raw`, all text): YAML takes 20261101_1530 for a number."""
    kept = dict(given)
    for f in dataclasses.fields(cls):
        if f.name not in given or not isinstance(raw, dict):
            continue
        value, written = given[f.name], raw.get(f.name)
        if isinstance(value, dict) and dataclasses.is_dataclass(f.default_factory):
            kept[f.name] = as_written(f.default_factory, value, written)
        elif f.type in (str, "str"):
            kept[f.name] = text_of(value, written)
        elif f.type in (list[str], "list[str]") and isinstance(value, list) and isinstance(written, list):
            kept[f.name] = [text_of(*pair) for pair in zip(value, written, strict=True)]
    return kept


def text_of(value: Any, written: Any) -> Any:
    """A scalar that YAML took for a number or a truth, as it is written; others as they are."""
    return written if isinstance(value, (bool, int, float)) and isinstance(written, str) else value


def changed(config: ConfigT, settings: dict[str, Any]) -> ConfigT:
    """`config` with some fields replaced, checked; UserError for a field it lacks, naming the nearest."""
    check_keys(type(config), settings, "settings")
    return dataclasses.replace(config, **settings)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """All fields of a configuration by dotted name."""
    values = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        inner = flat(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value}
        values |= inner
    return values


def changed_fields(a: Any, b: Any, besides: Collection[str] = ()) -> list[str]:
    """Dotted names of the fields in which two configurations of one kind differ, `besides` aside."""
    one, two = flat(a), flat(b)
    return sorted(name for name in one if name not in besides and one[name] != two[name])


def save_config(config: Any, path: str | Path) -> None:
    """Write a config dataclass, every field resolved, as YAML."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.structured(config), path)
