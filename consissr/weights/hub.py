"""Files from the Hugging Face hub, through its own client: its cache, token, endpoint, offline mode, progress bars.

What a repository holds is written down at the first download (its commit, every file's name, size and SHA-256): later
calls need no network, and what is missing or damaged is fetched again at that commit.
"""

import json
import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consissr.config.machine import cache_folder, whole
from consissr.errors import UserError, reason_of
from consissr.weights.cache import check_free, locked, sha256_of, stamp_of, unchanged
from consissr.weights.names import published

log = logging.getLogger(__name__)

LARGE = 10 * 2**20
"""Bytes from which on a download that was cut off is worth going on with: the client's chunk."""

Choose = Callable[[Collection[str], bool], list[str]]
"""(names of a repository's files, whether half precision is preferred) -> those that are needed; UserError where it is
no repository of the kind."""


class UnreachableError(UserError):
    """The hub does not answer, or may not be asked: another of its repositories won't do better."""


@dataclass
class Manifest:
    """What a repository holds at one commit."""

    repository: str
    commit: str
    files: dict[str, dict[str, Any]]
    """Name -> what `cache.unchanged` compares the file with."""


@dataclass
class Fetched:
    """Files of a repository on this machine."""

    folder: Path
    """The hub's snapshot that holds them."""
    commit: str


def split_hub_id(hub_id: str) -> tuple[str, str]:
    """'owner/name@revision' -> (repository, revision); the revision is 'main' where none is named."""
    repository, _, revision = hub_id.partition("@")
    return repository, revision or "main"


def is_hub_id(name: str) -> bool:
    """Whether `name` could be a hub id, with a revision or without."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repository, _ = split_hub_id(name)
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return False
    return repository.count("/") == 1


def fetch(hub_id: str, choose: Choose, half: bool = False, reachable: bool = True) -> Fetched:
    """The files of a repository that `choose` asks for, downloaded by one process where they are not here.

    half: half precision will do; what is here in full serves as well. reachable: whether asking the hub is worth while;
    without, the caches have to do. UserError in one line: no such repository or file, no network and no copy, too
    little space, a damaged download (which is not kept).
    """
    if (ready := present(hub_id, choose, half)) is not None:
        return ready
    with locked(record_file(hub_id).stem):
        if (ready := present(hub_id, choose, half)) is not None:  # by now another process has fetched it
            return ready
        from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

        known = recorded(hub_id)
        try:
            manifest = known or ask(hub_id, reachable)
            files = choose(manifest.files, half)
            download(manifest, files, reachable)
        except UserError as error:
            answered = isinstance(error.__cause__, HfHubHTTPError)  # that it has no such repository, or is busy
            if not answered and not isinstance(error, UnreachableError):
                raise
            if (other := without_network(hub_id, choose, half)) is None:
                gone = known and isinstance(error.__cause__, RevisionNotFoundError)
                if not gone or hub_id.endswith(f"@{known.commit}"):
                    raise
                raise UserError(f"{error}; remove {record_file(hub_id)} to take what stands there now") from error
            if answered:
                log.warning("%s; the copy in the hub's cache is used", error)
            return other
        record(hub_id, manifest)
    return Fetched(snapshot(manifest, files), manifest.commit)


def present(hub_id: str, choose: Choose, half: bool) -> Fetched | None:
    """What was fetched before, if all of it is here and whole."""
    manifest = recorded(hub_id)
    if not (files := files_here(manifest, choose, half)):
        return None
    record(hub_id, manifest)
    return Fetched(snapshot(manifest, files), manifest.commit)


def files_here(manifest: Manifest | None, choose: Choose, half: bool) -> list[str]:
    """The files that `choose` asks for, in full or where it will do in half precision; empty unless all are whole."""
    for kind in (False, True) if half else (False,):
        files = [] if manifest is None else choose(manifest.files, kind)
        if files and not [name for name in files if not is_here(manifest, name)]:
            return files
    return []


def without_network(hub_id: str, choose: Choose, half: bool = True) -> Fetched | None:
    """What is here of a repository in any precision, if only because other programs have left it in the hub's cache."""
    for manifest in (recorded(hub_id), cached(hub_id)):
        try:
            files = files_here(manifest, choose, half=True)
            if not files:
                continue
            if not half and files != choose(manifest.files, False):
                log.warning("%s: without a network its weights in half precision, which are here, have to do", hub_id)
            return Fetched(snapshot(manifest, files), manifest.commit)
        except UserError:  # what another program needed is no whole model
            continue
    return None


def ask(hub_id: str, reachable: bool = True) -> Manifest:
    """What the hub says a repository holds; UserError where that is not what names.yaml knows of it."""
    from huggingface_hub import HfApi, constants

    repository, revision = split_hub_id(hub_id)
    if not reachable:
        raise UnreachableError(f"{hub_id}: no copy")
    if constants.HF_HUB_OFFLINE:
        raise UnreachableError(f"{hub_id} is not in the cache of the Hugging Face hub, and HF_HUB_OFFLINE is set")
    with asking(hub_id):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=20)
    files = {
        sibling.rfilename: {"size": sibling.size, "sha256": sibling.lfs.sha256 if sibling.lfs else None}
        for sibling in info.siblings or []
    }
    for name, digest in known_digests(hub_id).items():
        if name in files:
            if files[name]["sha256"] not in (None, digest):
                raise UserError(f"{hub_id} has another {name} than the one that is known: its SHA-256 is not {digest}")
            files[name]["sha256"] = digest
    return Manifest(repository, info.sha or revision, files)


def known_digests(hub_id: str) -> dict[str, str]:
    """SHA-256 of a repository's files, as names.yaml has them."""
    sources = [source for entry in published().values() for source in entry.sources if source.hub_id == hub_id]
    return {name: digest for source in sources for name, digest in source.sha256.items()}


def download(manifest: Manifest, files: list[str], reachable: bool) -> None:
    """What is missing of `files`, into the hub's cache. What comes damaged does not stay."""
    from huggingface_hub import constants, hf_hub_download

    if not reachable:
        raise UnreachableError(f"{manifest.repository}: no copy of all its files")
    missing = [name for name in files if not is_here(manifest, name)]
    begun = [part for name in missing if (part := part_of(manifest, name)).is_file()]
    need = sum(manifest.files[name]["size"] or 0 for name in missing) - sum(part.stat().st_size for part in begun)
    check_free(Path(constants.HF_HUB_CACHE), need, manifest.repository, "HF_HOME")
    for name in missing:
        with asking(f"{manifest.repository}@{manifest.commit[:12]}: {name}"):
            resume(manifest, name)
            path = Path(hf_hub_download(manifest.repository, name, revision=manifest.commit))
        manifest.commit = path.parents[name.count("/")].name  # what it came with, should the manifest have said another
        said, stamp = manifest.files[name], stamp_of(path)
        damage = ""
        if said["size"] not in (None, stamp["size"]):
            damage = f"it has {stamp['size']} bytes instead of {said['size']}"
        elif said["sha256"] not in (None, stamp["sha256"]):
            damage = f"its SHA-256 is not {said['sha256']}"
        if damage:
            remove(path)
            raise UserError(f"{name} of {manifest.repository} came damaged ({damage}) and was not kept: try again")
        manifest.files[name] = stamp


def part_of(manifest: Manifest, name: str) -> Path:
    """Where what came of a large file waits for the rest, beside what will be the file."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=manifest.repository, repo_type="model"), "blobs")
    return blobs / f"{manifest.files[name]['sha256']}.consissr-part"


def resume(manifest: Manifest, name: str) -> None:
    """Fetch a large file into the hub's cache, going on where a killed process stopped: the client would begin anew.

    Only where the hub says its SHA-256, which is the file's name there. What proves damaged is left to the client.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    size, digest = manifest.files[name]["size"], manifest.files[name]["sha256"]
    if not digest or (size or 0) < LARGE:
        return
    part = part_of(manifest, name)
    blob = part.with_name(digest)
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as file:
        if file.tell() > size:
            file.truncate(0)
        url = hf_hub_url(manifest.repository, name, revision=manifest.commit)
        http_get(
            url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=size, displayed_filename=name
        )
    if sha256_of(part) == digest:
        part.replace(blob)
    part.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """A file of the hub's cache, with the blob it points to."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def path_here(manifest: Manifest, name: str) -> Path | None:
    """A file's place in the hub's cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(manifest.repository, name, revision=manifest.commit)
    return Path(path) if isinstance(path, str) and os.path.isfile(path) else None


def is_here(manifest: Manifest, name: str) -> bool:
    """Whether a file is whole in the hub's cache; a damaged one is removed."""
    path = path_here(manifest, name)
    if path is None:
        return False
    if unchanged(path, manifest.files[name]):
        return True
    log.warning("%s of %s is damaged in the cache: it is fetched again", name, manifest.repository)
    remove(path)
    return False


def snapshot(manifest: Manifest, files: list[str]) -> Path:
    """The folder that holds `files`."""
    return path_here(manifest, files[0]).parents[files[0].count("/")]


def record_file(hub_id: str) -> Path:
    """Where the manifest of a repository is written down."""
    return cache_folder() / "hub" / f"{hub_id.replace('/', '--')}.json"


def record(hub_id: str, manifest: Manifest) -> None:
    """Write a manifest down, under the hub id that was asked for and under the commit's, where that can be done."""
    text = json.dumps(vars(manifest))
    for name in {hub_id, f"{manifest.repository}@{manifest.commit}"}:
        path = record_file(name)
        if path.is_file() and path.read_text("utf-8") == text:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as part:
                part.write_text(text, "utf-8")
        except OSError as error:
            log.debug("%s cannot be written: %s", path, error)


def recorded(hub_id: str) -> Manifest | None:
    """The manifest that was written down; None where there is none, or it is damaged."""
    try:
        return Manifest(**json.loads(record_file(hub_id).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def cached(hub_id: str) -> Manifest | None:
    """What other programs have left of a repository in the hub's cache."""
    from huggingface_hub import snapshot_download

    repository, revision = split_hub_id(hub_id)
    try:
        with asking(hub_id):
            folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except UserError:
        return None
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return Manifest(repository, folder.name, {name: {"size": None, "sha256": None} for name in files})


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Errors of the hub's client as one line: UnreachableError where the hub does not answer, else UserError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{what} asks for an accepted licence: accept it on its page and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{what} is no repository of the hub, or private (then set HF_TOKEN)") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{what}: the hub has no such revision") from error
    # HTTP errors are not OSErrors in every version, and xet's are RuntimeErrors
    except (errors.EntryNotFoundError, *errors.HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            raise UserError(f"{what} is not on the hub") from error
        reason = f"{type(error).__name__}: {reason_of(error)}"
        kind = UserError if isinstance(error, errors.HfHubHTTPError) else UnreachableError
        raise kind(f"{what} could not be fetched ({reason})") from error
