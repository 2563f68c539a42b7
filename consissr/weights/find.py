"""Models by name: bundled, published (fetched and converted once), a folder, a checkpoint file, or a hub id."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from consissr.config.loading import nearest
from consissr.errors import UserError
from consissr.weights.base import BASE_NETWORKS, SD21, base_path
from consissr.weights.base import choose as choose_base
from consissr.weights.conversion import CONVERTER, convert
from consissr.weights.files import ASSETS, BUNDLED, base_of, read_config, weight_names
from consissr.weights.hub import UnreachableError, check_free, fetch, is_place, split_place
from consissr.weights.names import Published, Source, by_hand_folder, cache_folder, published

log = logging.getLogger(__name__)

ORIGIN = "origin.json"
"""Beside a converted model in the cache: where it is from, and the size of every file of it."""

CHECKPOINTS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
PATIENCE = 2.0
"""Seconds of waiting for another process before it is said."""


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
    if path.is_file() and path.suffix in CHECKPOINTS or (path / "controlnet" / "config.json").is_file():
        return converted(path.resolve(), *stamp(path), label=path.name)
    if path.exists():
        raise UserError(f"{name} is no model folder: it has no config.yaml, nor is it a checkpoint of the authors'")
    if not is_place(name):
        known = [*BUNDLED, *(known for known in published() if known != SD21)]
        raise UserError(f"model '{name}' is no known name, folder, checkpoint or hub id{nearest(name, known)}")
    return hub_model(name, half)


def published_model(entry: Published, half: bool) -> Path:
    """A model of names.yaml: put there by hand, converted before, or from the first place on the hub that has it."""
    if (by_hand := by_hand_source(entry.name)) is not None:
        return converted(by_hand, *stamp(by_hand), label=entry.name)
    if (ready := ready_model(entry.name)) is not None:
        return ready
    reasons, reachable = [], True
    for source in entry.in_order(half):
        try:
            return from_release(source, entry.name, half, reachable)
        except UserError as error:
            reasons.append(str(error))
            reachable = reachable and not isinstance(error, UnreachableError)
    reason = f" and could not be fetched ({'; '.join(reasons)})" if reasons else ", and is on no hub"
    raise UserError(f"model '{entry.name}' is not on this machine{reason}: {entry.how()}")


def by_hand_source(name: str) -> Path | None:
    """What a user has put into the folder for downloads by hand: a checkpoint, or the folder with controlnet/."""
    folder = by_hand_folder(name)
    if (folder / "controlnet" / "config.json").is_file():
        return folder
    files = sorted(path for path in folder.glob("*") if path.suffix in CHECKPOINTS and path.is_file())
    return files[0] if files else None


def from_release(source: Source, label: str, half: bool, reachable: bool = True) -> Path:
    """A converted model of a repository in a released layout."""

    def choose(files: Collection[str]) -> list[str]:
        if source.file and source.file not in files:
            raise UserError(f"{source.hub} has no {source.file}")
        return [source.file] if source.file else choose_released(files, half)

    folder, commit = fetch(source.place, choose, reachable)
    checkpoint = folder / source.file if source.file else checkpoint_in(folder)
    repository, _ = split_place(source.place)
    base = f"{repository}@{commit}" if is_base(folder) else "auto"  # its own base stays in the hub's cache
    return converted(checkpoint, f"{repository}/{source.file}", commit, label, base)


def hub_model(place: str, half: bool) -> Path:
    """A repository of the hub: a model folder of ours as it is, a release converted."""

    def choose(files: Collection[str]) -> list[str]:
        if "config.yaml" in files:
            return [name for name in files if not name.startswith(".")]
        return choose_released(files, half)

    folder, _ = fetch(place, choose)
    if (folder / "config.yaml").is_file():
        return folder
    return from_release(Source(*split_place(place), layout="released"), place, half)


def choose_released(files: Collection[str], half: bool) -> list[str]:
    """The files of a release among those of a repository: CCSR v2's folders, with their base, or one checkpoint."""
    stem = "diffusion_pytorch_model"
    found = []
    for part in ("controlnet", "vae"):
        weights = [f"{part}/{name}" for name in weight_names(stem, half) if f"{part}/{name}" in files]
        if weights and f"{part}/config.json" in files:
            found += [f"{part}/config.json", weights[0]]
    if found and found[0].startswith("controlnet/"):
        whole = all(f"{part}/config.json" in files for part in BASE_NETWORKS)
        return list(dict.fromkeys(found + (choose_base(files, half) if whole else [])))
    checkpoints = [name for name in files if "/" not in name and name.endswith(CHECKPOINTS)]
    halves = [name for name in checkpoints if "fp16" in name]
    if len(checkpoints) - len(halves) <= 1 and len(halves) <= 1 and checkpoints:
        return (halves if half and halves else [c for c in checkpoints if c not in halves] or halves)[:1]
    raise UserError("the repository is none of ours (no config.yaml), nor one of CCSR's or ConsisSR's checkpoints")


def checkpoint_in(folder: Path) -> Path:
    """The source of a conversion in a fetched folder."""
    if (folder / "controlnet" / "config.json").is_file():
        return folder
    return next(path for path in sorted(folder.iterdir()) if path.suffix in CHECKPOINTS)


def is_base(folder: Path) -> bool:
    """Whether a fetched folder holds a base, too."""
    return all((folder / part / "config.json").is_file() for part in BASE_NETWORKS)


def stamp(path: Path) -> tuple[str, str]:
    """What tells one state of a local source from another: its place, and its files' sizes and times."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    marks = [f"{file.stat().st_size}-{file.stat().st_mtime_ns}" for file in files]
    return str(path.resolve()), " ".join(marks)


def converted(source: Path, place: str, revision: str, label: str, base: str = "auto") -> Path:
    """The model folder of a release in this project's cache, made once by whichever process comes first."""
    import hashlib

    origin = {"name": label, "source": place, "revision": revision, "converter": CONVERTER}
    digest = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]
    target = cache_folder() / "models" / f"{label.replace('/', '--')}-{digest}"
    with locked(target.name):
        if intact(target):
            return target
        shutil.rmtree(target, ignore_errors=True)
        files = [source] if source.is_file() else [file for file in source.rglob("*") if file.is_file()]
        check_free(target, sum(file.stat().st_size for file in files), f"converting {label}", "CONSISSR_HOME")
        log.warning("converting %s to %s (once)", label, target)
        work = target.with_name(f".{target.name}.new")
        shutil.rmtree(work, ignore_errors=True)
        try:
            convert(source, work, base, name=label)
            sizes = {path.relative_to(work).as_posix(): path.stat().st_size for path in files_of(work)}
            (work / ORIGIN).write_text(json.dumps(origin | {"sizes": sizes}, indent=1))
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def files_of(folder: Path) -> Iterator[Path]:
    """Every file below a folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def read_origin(folder: Path) -> dict:
    """origin.json of a converted model; empty where it is damaged or missing."""
    try:
        found = json.loads((folder / ORIGIN).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def intact(folder: Path) -> bool:
    """Whether a converted model has every file at its size, and was made by this converter."""
    origin = read_origin(folder)
    sizes = origin.get("sizes", {})
    here = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files_of(folder)}
    return origin.get("converter") == CONVERTER and bool(sizes) and sizes.items() <= here.items()


def ready_model(name: str) -> Path | None:
    """The newest intact conversion of a published model."""
    folders = [f for f in (cache_folder() / "models").glob(f"{name}-*") if read_origin(f).get("name") == name]
    for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True):
        if intact(folder):
            return folder
        log.warning("%s is damaged: it is made again", folder)
    return None


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time; the others wait, and say so."""
    from filelock import FileLock, Timeout

    path = cache_folder() / "locks" / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written ({error}): set CONSISSR_HOME to a folder that can") from error
    lock = FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        log.warning("another process is preparing %s: waiting for it", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def prefetch(name: str, half: bool = False) -> str:
    """Fetch everything that `name` needs, its base included, for a machine that will be offline: where it stands."""
    if name == SD21:
        return base_path(SD21, half)
    folder = find_model(name, half)
    base_path(base_of(folder, read_config(folder)), half)
    return str(folder)


def listing(tell: Callable[[Published], str] = lambda entry: here(entry)) -> list[dict[str, str]]:
    """Published models as rows: name, method, size, licence, steps, whether it is here."""
    return [
        {
            "name": entry.name,
            "method": entry.method,
            "download": f"{entry.gigabytes['full']:g} GB",
            "steps": entry.steps,
            "licence": entry.licence,
            "here": tell(entry) or "not on this machine",
            "from": ", ".join(dict.fromkeys(source.place for source in entry.sources)) or "no hub",
            "by hand": entry.by_hand_words(),
        }
        for entry in published().values()
    ]


def here(entry: Published) -> str:
    """Where a published model stands on this machine; empty where it doesn't."""
    if entry.name != SD21:
        return str(ready_model(entry.name) or by_hand_source(entry.name) or "")
    for source in entry.sources:
        try:
            return str(fetch(source.place, choose_base, reachable=False)[0])
        except UserError:
            continue
    return ""
