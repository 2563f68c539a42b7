"""Models by name: bundled, published (fetched and converted once), a folder, a checkpoint file, or a hub id."""

import hashlib
import json
import logging
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from consissr.config.loading import nearest
from consissr.config.machine import cache_folder, whole
from consissr.errors import UserError
from consissr.weights.base import BASE_NETWORKS, SD21, base_path, find_base
from consissr.weights.base import choose as choose_base
from consissr.weights.cache import by_hand_folder, check_free, locked, stamp_of, unchanged
from consissr.weights.conversion import CONVERTER, TEXT_FOLDERS, choose_released, convert, release_in
from consissr.weights.files import ASSETS, BUNDLED, MODEL_FILES, base_of, read_config
from consissr.weights.hub import UnreachableError, fetch, is_hub_id, recorded, split_hub_id, without_network
from consissr.weights.names import Published, Source, published
from consissr.weights.precision import choose_precision

log = logging.getLogger(__name__)

ORIGIN = "origin.json"
"""Beside a converted model in the cache: where it is from, and what tells whether its files are as they were made."""


def find_model(name: str | Path, half: bool = False) -> Path:
    """The folder of the model `name`, fetched and converted where that is needed; the second call needs no network.

    name: a bundled or published name, a model folder, the authors' checkpoint or folder, or a hub id (owner/name, or
    owner/name@revision) of either kind. half: weights in half precision will do. Raises UserError.
    """
    name, path = str(name), Path(name)
    if name in BUNDLED:
        return ASSETS / "nano" / name
    if name in published() and name != SD21:
        return published_model(published()[name], half)
    if (path / "config.yaml").is_file():
        return path
    if path.exists():
        source = release_in(path)
        return converted(source, *state_of(source), label=path.resolve().name)
    if not is_hub_id(name):
        known = [*BUNDLED, *(known for known in published() if known != SD21)]
        raise UserError(f"model '{name}' is no known name, folder, checkpoint or hub id{nearest(name, known)}")
    try:
        return from_hub(Source(*split_hub_id(name), layout="any"), name, half)
    except UserError as error:
        raise UserError(f"'{name}' is no folder here, and as a hub id: {error}") from error


def published_model(entry: Published, half: bool) -> Path:
    """A model of names.yaml: put there by hand, converted before, or from the first repository that has it."""
    if (source := by_hand(entry)) is not None:
        return converted(source, *state_of(source), label=entry.name)
    if (ready := ready_model(entry.name, half)) is not None:
        return ready
    reasons, reachable = [], True
    for source in entry.in_order(half):
        try:
            return from_hub(source, entry.name, half, reachable)
        except UserError as error:
            reasons.append(str(error))
            reachable = reachable and not isinstance(error, UnreachableError)
    if (ready := ready_model(entry.name, half=True)) is not None:
        log.warning("%s: its weights in half precision, which are here, have to do", entry.name)
        return ready
    reason = f" and could not be fetched ({'; '.join(reasons)})" if reasons else ", and is on no hub"
    raise UserError(f"model '{entry.name}' is not on this machine{reason}: {entry.how()}")


def by_hand(entry: Published) -> Path | None:
    """What a user has put into the folder for downloads by hand; UserError where some of it is missing or unknown."""
    folder = by_hand_folder(entry.name)
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    lacking = [str(wanted) for step in entry.by_hand if not any((wanted := entry.into(step)).glob("*"))]
    if lacking:
        raise UserError(
            f"{folder} is not complete: there is nothing in {' and '.join(lacking)}: {entry.by_hand_words()}"
        )
    try:
        return release_in(folder)
    except UserError as error:
        raise UserError(f"{error}; {entry.by_hand_words()}") from error


def from_hub(source: Source, label: str, half: bool, reachable: bool = True) -> Path:
    """A repository: a model folder of ours as it is, a release converted."""

    def choose(files: Collection[str], half: bool) -> list[str]:
        if source.file:
            if source.file not in files:
                raise UserError(f"{source.hub} has no {source.file}")
            return [source.file]
        if source.layout == "any" and "config.yaml" in files:
            return [name for name in files if name.startswith(MODEL_FILES)]
        try:
            return choose_released(files, half)
        except UserError as error:
            raise UserError(f"{source.hub}: {error}") from error

    fetched = fetch(source.hub_id, choose, half, reachable)
    folder = fetched.folder
    if not source.file and (folder / "config.yaml").is_file():
        return folder
    whole = all((folder / part / "config.json").is_file() for part in BASE_NETWORKS)
    base = f"{source.hub}@{fetched.commit}" if whole else "auto"  # its own base stays in the hub's cache
    try:
        release = folder / source.file if source.file else release_in(folder)
        return converted(release, f"{source.hub}/{source.file}", fetched.commit, label, base, half)
    except UserError as error:
        raise UserError(f"{source.hub}@{fetched.commit[:12]}: {error}") from error


def state_of(path: Path) -> tuple[str, str]:
    """What tells one state of a local source from another: its path, and its files' sizes and times."""
    marks = [f"{file.stat().st_size}-{file.stat().st_mtime_ns}" for file in read_files(path)]
    return str(path.resolve()), " ".join(marks)


def files_of(path: Path) -> list[Path]:
    """The file itself, or every file below a folder."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def read_files(source: Path) -> list[Path]:
    """The files of a release that a conversion may read: not what else lies in its folder, such as a base model."""
    parts = ("controlnet", "vae", "scheduler", *BASE_NETWORKS, *TEXT_FOLDERS)
    inside = (source / "controlnet").is_dir()
    return [file for part in dict.fromkeys(parts) for file in files_of(source / part)] if inside else files_of(source)


def converted(source: Path, address: str, revision: str, label: str, base: str = "auto", half: bool = False) -> Path:
    """The model folder of a release in this project's cache, made once by whichever process comes first.

    address, revision: where the release is from, and its state there. half: it was chosen where half precision will do.
    """
    origin = {"name": label, "source": address, "revision": revision, "converter": CONVERTER, "half": half}
    digest = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]
    target = cache_folder() / "models" / f"{label.replace('/', '--')[:80]}-{digest}"
    if intact(target):
        return target
    with locked(target.name):
        if intact(target):
            return target
        read = read_files(source)
        if base != "auto" and source.is_dir():  # its own base stays where it is
            read = [file for part in ("controlnet", "vae") for file in files_of(source / part)]
        size = sum(file.stat().st_size for file in read)
        check_free(target, size, f"converting {label}", "CONSISSR_HOME")
        log.warning("converting %s to %s (once)", label, target)
        shutil.rmtree(target, ignore_errors=True)
        convert(source, target, base, name=label, finish=lambda folder: write_origin(folder, origin))
        for other in target.parent.iterdir():  # of another state of the same source, or of another converter
            was = read_origin(other)
            if other != target and [was.get(key) for key in ("name", "source", "half")] == [label, address, half]:
                shutil.rmtree(other, ignore_errors=True)
    return target


def write_origin(folder: Path, origin: dict[str, Any]) -> None:
    """origin.json, the last file of a conversion."""
    files = {path.relative_to(folder).as_posix(): stamp_of(path) for path in files_of(folder) if path.name != ORIGIN}
    save_origin(folder, origin | {"files": files})


def save_origin(folder: Path, origin: dict[str, Any]) -> None:
    """Write origin.json, whole."""
    with whole(folder / ORIGIN) as part:
        part.write_text(json.dumps(origin, indent=1))


def read_origin(folder: Path) -> dict[str, Any]:
    """origin.json of a converted model; empty where it is damaged or missing."""
    try:
        origin = json.loads((folder / ORIGIN).read_text())
        return origin if isinstance(origin["files"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def intact(folder: Path) -> bool:
    """Whether a converted model's files are as this version of the converter made them."""
    origin = read_origin(folder)
    before = json.dumps(origin)
    if origin.get("converter") != CONVERTER:
        return False
    for name, stamp in origin["files"].items():
        if not unchanged(folder / name, stamp):
            log.warning("%s is damaged: the model is made again", folder / name)
            with suppress(OSError):
                (folder / ORIGIN).unlink()  # said once
            return False
    if json.dumps(origin) != before:  # copied from elsewhere: found to be the same by digest, which need not be twice
        with suppress(OSError):
            save_origin(folder, origin)
    return True


def ready_model(name: str, half: bool) -> Path | None:
    """An intact conversion of a published model, in full if there is one; `half`: one in half precision will do.

    What a user converted from a folder that happens to be called so is none: its source is a path, and not by-hand's.
    """
    found = []
    for folder in sorted((cache_folder() / "models").glob("[!.]*")):
        origin = read_origin(folder)
        source = str(origin.get("source", ""))
        published_one = not Path(source).is_absolute() or f"/by-hand/{name}" in Path(source).as_posix()
        if origin.get("name") == name and published_one and (half or not origin.get("half")):
            found.append((bool(origin.get("half")), folder))
    return next((folder for _, folder in sorted(found) if intact(folder)), None)


def places(name: str, base: str | None = None) -> list[Path]:
    """Where the weights of a model lie, in the precision that this machine takes: its folder, and its base or `base`.

    A base that is fetched from the hub stands there by its id.
    """
    folder = find_model(name, choose_precision("auto", "cuda" if torch.cuda.is_available() else "cpu") != "fp32")
    return [folder, *map(Path, find_base(base or base_of(folder, read_config(folder))))]


def prefetch(name: str, half: bool = False) -> str:
    """Fetch everything that `name` needs, its base included, for a machine that will be offline: where it stands."""
    if name == SD21:
        return base_path(SD21, half)
    folder = find_model(name, half)
    base_path(base_of(folder, read_config(folder)), half)
    return str(folder)


def listing() -> list[dict[str, str]]:
    """Published models as rows: what they are, where they are from, whether they are here, and what to do by hand."""
    return [
        {
            "name": entry.name,
            "what": entry.what,
            "download": f"{entry.gigabytes['full']:g} GB, or {entry.gigabytes['half']:g} GB in half precision"
            if entry.gigabytes["half"] < entry.gigabytes["full"]
            else f"{entry.gigabytes['full']:g} GB",
            "steps": entry.steps,
            "licence": entry.licence,
            "here": here(entry) or "not on this machine",
            "from": ", ".join(dict.fromkeys(map(revision_of, entry.sources))) or "no hub",
            "by hand": entry.by_hand_words(),
        }
        for entry in published().values()
    ]


def revision_of(source: Source) -> str:
    """A repository and the commit that is pinned, or that this machine took at its first download."""
    if source.revision != "main":
        return f"{source.hub} (pinned: {source.revision[:12]})"
    known = recorded(source.hub_id)
    return f"{source.hub} ({f'taken: {known.commit[:12]}' if known else 'main at the first download'})"


def here(entry: Published) -> str:
    """Where a published model stands on this machine; empty where it doesn't."""
    try:
        if entry.name != SD21:
            return str(by_hand(entry) or ready_model(entry.name, half=True) or "")
    except UserError:
        return ""
    if (by_hand_folder(SD21) / "unet").is_dir():
        return str(by_hand_folder(SD21))
    copies = (without_network(source.hub_id, choose_base) for source in entry.sources)
    return next((str(copy.folder) for copy in copies if copy is not None), "")
