"""Files from the Hugging Face hub, through its own client: its cache, token, endpoint, offline mode, progress bars.

What a repository holds is written down at the first download (its commit, every file's name, size and SHA-256 where the
hub knows it): later calls need no network, and what is missing or cut off is fetched again at that commit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consissr.errors import UserError
from consissr.weights.names import cache_folder

log = logging.getLogger(__name__)

SPARE = 2**28
"""Bytes that stay free on a disk."""

Choose = Callable[[Collection[str]], list[str]]
"""Names of a repository's files -> those that are needed; UserError where it is no repository of the kind."""


class UnreachableError(UserError):
    """The hub does not answer, or may not be asked: another of its repositories won't do better."""


@dataclass
class Listing:
    """What a repository holds at one commit."""

    repository: str
    commit: str
    files: dict[str, dict[str, Any]]
    """Name -> {"size": bytes or None, "sha256": digest or None}."""


def split_place(place: str) -> tuple[str, str]:
    """'owner/name@revision' -> (repository, revision); the revision is 'main' where none is named."""
    repository, _, revision = place.partition("@")
    return repository, revision or "main"


def is_place(name: str) -> bool:
    """Whether `name` could be a hub id, with a revision or without."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repository, _ = split_place(name)
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return False
    return repository.count("/") == 1


def fetch(place: str, choose: Choose, reachable: bool = True) -> tuple[Path, str]:
    """A folder with the files of hub repository `place` that `choose` asks for, and the commit they are of.

    reachable: whether asking the hub is worth while; without, the caches have to do. UserError in one line: no such
    repository or file, no network and no copy, too little space, a damaged download (which is not kept).
    """
    known = recorded(place)
    if known is None:
        try:
            if not reachable:
                raise UnreachableError(f"{place}: no copy")
            known = ask(place)
        except UnreachableError:
            if (known := cached(place)) is None:
                raise
    files = choose(known.files)
    missing = [name for name in files if not is_here(known, name)]
    if not missing:
        record(place, known)
        return folder_of(known, files), known.commit
    check_space(known, missing)
    for name in missing:
        folder = download(known, name).parents[name.count("/")]
        known.commit = folder.name  # what the file came with, should the listing have said another
    record(place, known)
    return folder_of(known, files), known.commit


def ask(place: str) -> Listing:
    """What the hub says a repository holds."""
    from huggingface_hub import HfApi, constants

    repository, revision = split_place(place)
    if constants.HF_HUB_OFFLINE:
        raise UnreachableError(f"{place} is not in the cache of the Hugging Face hub, and HF_HUB_OFFLINE is set")
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=20)
    except network_errors() as error:
        raise told(place, error) from error
    files = {
        sibling.rfilename: {"size": sibling.size, "sha256": sibling.lfs.sha256 if sibling.lfs else None}
        for sibling in info.siblings or []
    }
    return Listing(repository, info.sha or revision, files)


def download(known: Listing, name: str) -> Path:
    """One file into the hub's cache: its place there. What is damaged does not stay."""
    from huggingface_hub import hf_hub_download

    place = f"{known.repository}@{known.commit[:12]}"
    try:
        path = Path(hf_hub_download(known.repository, name, revision=known.commit))
    except network_errors() as error:
        raise told(f"{place}: {name}", error) from error
    size = known.files[name]["size"]
    known.files[name]["size"] = actual = path.stat().st_size
    digest = known.files[name]["sha256"]
    damage = ""
    if size is not None and size != actual:
        damage = f"it has {actual} bytes instead of {size}"
    elif digest and sha256_of(path) != digest:
        damage = f"its SHA-256 is not {digest}"
    elif reason := what_is_wrong(path):
        damage = reason
    if damage:
        remove(path)
        raise UserError(f"{name} of {known.repository} came damaged ({damage}) and was not kept: try again")
    return path


def what_is_wrong(path: Path) -> str:
    """Why a file can't be what its name says; empty where it can."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif path.suffix == ".ckpt" and not zipfile.is_zipfile(path) and not is_pickle(path):
            return "it is no checkpoint"
    except (SafetensorError, ValueError, OSError) as error:
        return str(error).splitlines()[0]
    return ""


def is_pickle(path: Path) -> bool:
    """Whether a file begins as pickles do."""
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"


def remove(path: Path) -> None:
    """A file of the hub's cache, with the blob it points to."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def is_here(known: Listing, name: str) -> bool:
    """Whether a file is whole in the hub's cache; one of another size is removed."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(known.repository, name, revision=known.commit)
    if not isinstance(path, str) or not os.path.isfile(path):
        return False
    size = known.files[name]["size"]
    if (size is None or os.path.getsize(path) == size) and not what_is_wrong(Path(path)):
        return True
    log.warning("%s of %s is damaged in the cache: it is fetched again", name, known.repository)
    remove(Path(path))
    return False


def folder_of(known: Listing, files: list[str]) -> Path:
    """The snapshot that holds `files`."""
    from huggingface_hub import try_to_load_from_cache

    name = files[0]
    path = try_to_load_from_cache(known.repository, name, revision=known.commit)
    return Path(path).parents[name.count("/")]


def check_space(known: Listing, missing: list[str]) -> None:
    """UserError where the disk of the hub's cache is too small for what is missing."""
    from huggingface_hub import constants

    need = sum(known.files[name]["size"] or size_of(known, name) for name in missing)
    check_free(Path(constants.HF_HUB_CACHE), need, known.repository, "HF_HOME")


def size_of(known: Listing, name: str) -> int:
    """The size of a file that the hub's listing leaves out, 0 where the hub doesn't say."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        return get_hf_file_metadata(hf_hub_url(known.repository, name, revision=known.commit)).size or 0
    except network_errors() as error:
        raise told(f"{known.repository}: {name}", error) from error


def check_free(folder: Path, need: int, what: str, variable: str) -> None:
    """UserError unless the disk of `folder` has `need` bytes."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if need and need + SPARE > free:
        raise UserError(
            f"{what} needs {need / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free: make room, or set "
            f"{variable} to a folder on another disk"
        )


def record_file(place: str) -> Path:
    """Where the listing of a repository is written down."""
    return cache_folder() / "hub" / f"{place.replace('/', '--')}.json"


def record(place: str, known: Listing) -> None:
    """Write a listing down, under the place's name and under the commit's."""
    for name in {place, f"{known.repository}@{known.commit}"}:
        path = record_file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(json.dumps(vars(known)), "utf-8")
        part.replace(path)


def recorded(place: str) -> Listing | None:
    """The listing that was written down; None where there is none, or it is damaged."""
    try:
        return Listing(**json.loads(record_file(place).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def cached(place: str) -> Listing | None:
    """What other programs have left of a repository in the hub's cache."""
    from huggingface_hub import snapshot_download

    repository, revision = split_place(place)
    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except network_errors():
        return None
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    sizes = {name: {"size": path.stat().st_size, "sha256": None} for name, path in files.items()}
    return Listing(repository, folder.name, sizes) if files else None


def network_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises; its HTTP library's errors are no OSError in every version."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    return (OSError, ValueError, EntryNotFoundError, *HfHubHTTPError.__bases__)


def told(what: str, error: Exception) -> UserError:
    """One line for an error of the hub's client."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return UserError(f"{what} asks for an accepted licence: accept it on its page and set HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"{what} is no repository of the hub, or private (then set HF_TOKEN)")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{what}: the hub has no such revision")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return UserError(f"{what} is not on the hub")
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no answer'}"
    if isinstance(error, HfHubHTTPError):
        return UserError(f"{what} could not be fetched ({reason})")
    return UnreachableError(f"{what} could not be fetched ({reason})")


def sha256_of(path: Path) -> str:
    """The digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
